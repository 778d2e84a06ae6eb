"""One optimiser step: micro-batches, recovery from out-of-memory, and a guard against non-finite updates."""

import logging
import math

import torch
from torch import Tensor

from hrs.config import TrainingConfig
from hrs.errors import HRSError
from hrs.models.base import LanguageModel, WindowContext
from hrs.training.loss import cross_entropy
from hrs.training.optimizer import clip_gradients, gradient_norm
from hrs.training.randomness import get_rng, set_rng
from hrs.training.runtime import autocast

_log = logging.getLogger(__name__)

Diagnostics = dict[str, list[Tensor]]
"""Detached values by name, one per micro-batch; still on the device, so that collecting them does not wait for it."""


class Stepper:
    """Turns batches of windows into weight updates.

    ``micro_batch`` falls when memory runs out. The effective batch never changes: it is what a run is, and the
    micro-batch is only how this machine computes it.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
        device: torch.device,
        micro_batch: int,
        *,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.device = device
        self.micro_batch = micro_batch
        # The bound method, not the module: torch.compile(model) would prefix every name of the state_dict.
        self._encode = torch.compile(model.encode) if compiled else model.encode
        self._unembed = torch.compile(model.unembed) if compiled else model.unembed

    def step(self, tokens: Tensor, context: WindowContext | None = None) -> Diagnostics | None:
        """Learn from windows [batch_sequences, T + 1] of token ids and their context. None if the step was skipped: its
        loss or gradient was not finite, and the weights are untouched.

        Raises:
            HRSError: if even one window at a time does not fit the memory.
        """
        diagnostics, total = self._gradients(tokens, context)
        norm = gradient_norm(self.optimizer)
        # The only wait for the device in a step.
        finite = all(map(math.isfinite, torch.stack([norm, total]).tolist()))
        if finite:
            self._apply(norm)
            self.model.keep_observations()
            diagnostics["grad_norm"] = [norm]
        else:
            self.model.drop_observations()
        self.optimizer.zero_grad(set_to_none=True)
        return diagnostics if finite else None

    def _apply(self, norm: Tensor) -> None:
        if self.config.optimizer.clip_norm:
            clip_gradients(self.optimizer, self.config.optimizer.clip_norm, norm)
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Activations are gone by now: a smaller micro-batch would not help.
            raise self._too_large("the moments of AdamW are too much", error) from error

    def _gradients(self, tokens: Tensor, context: WindowContext | None) -> tuple[Diagnostics, Tensor]:
        """Accumulate the gradients of one step, with ever smaller micro-batches until they fit."""
        rng = get_rng(self.device)
        while True:
            try:
                return self.accumulate(tokens, context)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failure = self._too_large("one window at a time is too much", error) if self.micro_batch == 1 else None
            # Outside the except block: the exception's traceback keeps the activations alive.
            self.optimizer.zero_grad(set_to_none=True)
            self.model.drop_observations()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            set_rng(rng, self.device)
            if failure:
                raise failure
            self._shrink()

    def _too_large(self, what: str, error: RuntimeError) -> HRSError:
        return HRSError(
            f"the model does not fit on {self.device}: {what} ({str(error).splitlines()[0]}); "
            "use a smaller scale, a larger card, or activation checkpointing"
        )

    def _shrink(self) -> None:
        smaller = largest_divisor(self.config.batch_sequences, self.micro_batch // 2)
        _log.warning("out of memory at micro_batch %d, going on with %d", self.micro_batch, smaller)
        self.micro_batch = smaller

    def accumulate(self, tokens: Tensor, context: WindowContext | None = None) -> tuple[Diagnostics, Tensor]:
        """Gradients of the mean loss over all micro-batches, diagnostics, and that loss with its auxiliary terms."""
        diagnostics: Diagnostics = {}
        parts = tokens.split(self.micro_batch)
        sum_of_totals = torch.zeros((), device=self.device)
        for index, part in enumerate(parts):
            rows = slice(index * self.micro_batch, (index + 1) * self.micro_batch)
            told = None if context is None else context.rows(rows)
            with autocast(self.config.precision, self.device):
                output = self._encode(part[:, :-1], told)
                loss = cross_entropy(
                    self._unembed,
                    output.hidden,
                    part[:, 1:],
                    vocab_size=self.model.vocab_size,
                    label_smoothing=self.config.label_smoothing,
                )
            total = loss
            for auxiliary in output.losses.values():
                total = total + auxiliary
            (total / len(parts)).backward()
            sum_of_totals += total.detach()
            values = {"train_loss": loss, **output.losses}
            for name, value in output.metrics.items():
                if name != "expert_usage":  # a number per expert is for evaluation
                    values[name] = value.float().mean(0).flatten()  # over layers
            for name, value in values.items():
                diagnostics.setdefault(name, []).append(value.detach())
        return diagnostics, sum_of_totals / len(parts)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: torch's own exception, or what the CPU's allocator and cuBLAS raise instead."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "DefaultCPUAllocator: can't allocate memory" in text
        or "DefaultCPUAllocator: not enough memory" in text
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
    )


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of ``n`` that is at most ``limit`` (at least 1)."""
    return next(d for d in range(limit, 0, -1) if n % d == 0)
