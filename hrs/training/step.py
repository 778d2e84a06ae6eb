"""One optimiser step: micro-batches, recovery from out-of-memory, and a guard against non-finite updates."""

import logging
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from hrs.config import TrainingConfig
from hrs.gpu import explain, gpu_of, is_gone
from hrs.models.base import LanguageModel, WindowContext
from hrs.nn import recycled_memory
from hrs.training.loss import Chunking, chunking_for, cross_entropy
from hrs.training.loss_scale import LossScale
from hrs.training.optimizer import clip_gradients, gradient_norm
from hrs.training.randomness import get_rng, set_rng
from hrs.training.runtime import autocast, half_type
from hrs.training.sharing import GradientExchange, Workers, unshared_parameters

_log = logging.getLogger(__name__)

Diagnostics = dict[str, list[Tensor]]
"""Detached values by name, one per micro-batch; still on the device, so that collecting them does not wait for it.
Those that several workers exchanged are one mean."""

REMEDY = "use a smaller scale, a larger GPU, or activation checkpointing"
"""What to do if a model does not fit."""

_TOTAL = "loss with its auxiliary terms"


class Stepper:
    """Turns batches of windows into weight updates.

    ``micro_batch`` falls when memory runs out. The effective batch never changes: it is what a run is, and the
    micro-batch is only how this machine computes it.

    With ``training.sharing.workers`` a batch has that many equal parts. ``workers`` is this process's place among those
    that compute a part each; without it all parts are computed here, one after another. Either way the result is the
    same up to rounding (and the micro-batches of routed models, whose auxiliary losses are taken in each): every part
    draws noise from a seed of its own, unshared groups learn from the first part only, and what a model remembers of
    its passes it remembers of the first part.
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
        compile_may_fail: bool = False,
        workers: Workers | None = None,
        chunking: Chunking | None = None,
    ) -> None:
        """Raises HRSError if ``config.sharing`` names a group that the model does not have. ``chunking`` is that of the
        loss; None takes the device's default. With ``compile_may_fail`` a failure to compile is a warning."""
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.device = device
        self.micro_batch = micro_batch
        self.workers = workers
        self.chunking = chunking or chunking_for(device)
        self.loss_scale = LossScale(device) if half_type(config.precision, device) is torch.float16 else None
        self.overflowed: Tensor | None = None
        """Whether the last step was skipped by the loss scale, a boolean scalar on the device; None without one."""
        self._parameters = list(model.parameters())
        self._unshared = unshared_parameters(model.parameter_groups(), config.sharing)
        self._exchange: GradientExchange | None = None
        if workers is not None:
            self._exchange = GradientExchange(workers, self._parameters, {id(p) for p in self._unshared})
        self._compile_may_fail = compile_may_fail
        self._encode, self._unembed = model.encode, model.unembed
        if compiled:
            # What other models of this process left behind counts against the limit of compilations of a function.
            torch.compiler.reset()
            # The bound method, not the module: torch.compile(model) would prefix every name of the state_dict.
            self._encode, self._unembed = torch.compile(model.encode), torch.compile(model.unembed)

    def step(self, tokens: Tensor, context: WindowContext | None = None) -> Diagnostics | None:
        """Learn from windows [batch_sequences, T + 1] of token ids and their context. None if the step was skipped: its
        loss or gradient was not finite, and the weights are untouched.

        Raises:
            HRSError: if even one window at a time does not fit the memory.
        """
        diagnostics, total, norm = self._everyones_gradients(tokens, context)
        finite = bool(self._finite(norm, total))  # the only wait for the device in a step
        if finite:
            self._apply(norm)
            self._remember()
            diagnostics["grad_norm"] = [norm]
        else:
            self.model.drop_observations()
        self.optimizer.zero_grad(set_to_none=True)
        return diagnostics if finite else None

    def step_without_waiting(self, tokens: Tensor, context: WindowContext | None = None) -> tuple[Diagnostics, Tensor]:
        """Do as :meth:`step` does without waiting for the device.

        Returns:
            The diagnostics, which count only if the step was taken, and whether it was: a boolean scalar on the device.
            If it was not, neither weights nor moments have changed.
        """
        diagnostics, total, norm = self._everyones_gradients(tokens, context)
        taken = self._finite(norm, total)
        # What torch's fused optimisers look at in their kernels, as they do for a gradient scaler.
        self.optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
        try:
            self._apply(norm)
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        self.model.drop_observations_unless(taken)
        self._remember()
        diagnostics["grad_norm"] = [norm]
        self.optimizer.zero_grad(set_to_none=True)
        return diagnostics, taken

    def _everyones_gradients(self, tokens: Tensor, context: WindowContext | None) -> tuple[Diagnostics, Tensor, Tensor]:
        """Return diagnostics, loss and norm of the gradients of the whole batch, which the parameters then hold."""
        diagnostics, total = self._gradients(tokens, context)
        if self._exchange is not None:
            means = self._exchange.finish(diagnostics | {_TOTAL: [total]})
            total = means.pop(_TOTAL)[0]
            diagnostics = {name: [mean] for name, mean in means.items()}
        if self.loss_scale is not None:
            self.loss_scale.unscale(self._parameters)
        return diagnostics, total, gradient_norm(self.optimizer)

    def _finite(self, norm: Tensor, total: Tensor) -> Tensor:
        """Return whether the step can be taken, a boolean scalar on the device; adapts the loss scale."""
        finite = norm.isfinite() & total.isfinite()
        if self.loss_scale is not None:
            self.overflowed = self.loss_scale.overflowed(total, norm)
            self.loss_scale.update(finite)
        return finite

    def _apply(self, norm: Tensor) -> None:
        if self.config.optimizer.clip_norm:
            clip_gradients(self.optimizer, self.config.optimizer.clip_norm, norm)
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            # Activations are gone by now: a smaller micro-batch would not help.
            sentence = explain(error, self.device, "the moments of AdamW are too much", REMEDY)
            if sentence is None:
                raise
            raise sentence from error

    def _remember(self) -> None:
        """The passes of the first part made an update, those of the others are forgotten."""
        if self.workers is None or self.workers.first:
            self.model.keep_observations()
        else:
            self.model.drop_observations()
        if self.workers is not None:
            self.workers.share_buffers(self.model)

    def _gradients(self, tokens: Tensor, context: WindowContext | None) -> tuple[Diagnostics, Tensor]:
        """Accumulate the gradients of one step, with ever smaller micro-batches until they fit.

        Where compiling may fail and does, the step is done again uncompiled, as are all that follow.
        """
        rng = get_rng(self.device)
        while True:
            try:
                return self.accumulate(tokens, context)
            except (RuntimeError, MemoryError) as error:
                sentence = explain(error, self.device, "one window at a time is too much", REMEDY)
                if sentence is None:
                    if not (self._compile_may_fail and isinstance(error, TorchDynamoException)):
                        raise
                    _log.warning("torch.compile failed (%s): training uncompiled", str(error).strip().splitlines()[0])
                elif is_gone(error):
                    raise sentence from error
            # Outside the except block: the exception's traceback keeps the activations alive.
            self.optimizer.zero_grad(set_to_none=True)
            self.model.drop_observations()
            recycled_memory.release()
            gpu = gpu_of(self.device)
            if gpu is not None:
                gpu.release_cached_memory()
            set_rng(rng, self.device)
            if sentence is None:
                self._encode, self._unembed, self._compile_may_fail = self.model.encode, self.model.unembed, False
            elif self.micro_batch == 1:
                raise sentence
            else:
                self._shrink()

    def _shrink(self) -> None:
        part = self.config.batch_sequences // self.config.sharing.workers
        smaller = largest_divisor(part, self.micro_batch // 2)
        _log.warning("out of memory at micro_batch %d, going on with %d", self.micro_batch, smaller)
        self.micro_batch = smaller

    def accumulate(self, tokens: Tensor, context: WindowContext | None = None) -> tuple[Diagnostics, Tensor]:
        """Gradients of the mean loss over this process's parts of the batch, diagnostics, and that loss with its
        auxiliary terms."""
        diagnostics: Diagnostics = {}
        n = self.config.sharing.workers
        if n == 1:
            return diagnostics, self._accumulate_part(tokens, context, 1, None, diagnostics)
        # One draw from the run's generator, the same on every worker, which is then left where that put it.
        seeds = torch.randint(2**62, (n,)).tolist()
        rng = get_rng(self.device)
        parts = range(n) if self.workers is None else (self.workers.rank,)
        size, unshared = len(tokens) // n, {id(parameter) for parameter in self._unshared}
        learning: list[Tensor] = [p for p in self._parameters if p.requires_grad and id(p) not in unshared]
        shared = learning if unshared else None
        sum_of_totals = torch.zeros((), device=self.device)
        for part in reversed(parts):  # the first one last, so that the others' observations can be dropped
            torch.manual_seed(seeds[part])
            rows = slice(part * size, (part + 1) * size)
            told = None if context is None else context.rows(rows)
            if part == 0 and len(parts) > 1:
                self.model.drop_observations()
            into = shared if part else None
            sum_of_totals += self._accumulate_part(tokens[rows], told, len(parts), into, diagnostics)
        set_rng(rng, self.device)
        for parameter in self._unshared if len(parts) > 1 else ():
            if parameter.grad is not None:  # of the first part alone, and divided like all others
                (parameter.grad._values() if parameter.grad.is_sparse else parameter.grad).mul_(n)
        return diagnostics, sum_of_totals / len(parts)

    def _accumulate_part(
        self,
        tokens: Tensor,
        context: WindowContext | None,
        n_parts: int,
        into: list[Tensor] | None,
        diagnostics: Diagnostics,
    ) -> Tensor:
        """Add the gradients of the mean loss of a part's micro-batches over ``n_parts``, for the parameters ``into``
        only (None: for all that learn), and one value for each micro-batch to ``diagnostics``. Returns the mean of the
        loss with its auxiliary terms."""
        micro_batches = tokens.split(self.micro_batch)
        sum_of_totals = torch.zeros((), device=self.device)
        for index, windows in enumerate(micro_batches):
            rows = slice(index * self.micro_batch, (index + 1) * self.micro_batch)
            told = None if context is None else context.rows(rows)
            with autocast(self.config.precision, self.device):
                output = self._encode(windows[:, :-1], told)
                loss = cross_entropy(
                    self._unembed,
                    output.hidden,
                    windows[:, 1:],
                    vocab_size=self.model.vocab_size,
                    unembedding=self.model.unembedding(),
                    chunking=self.chunking,
                    label_smoothing=self.config.label_smoothing,
                )
            total = loss
            for auxiliary in output.losses.values():
                total = total + auxiliary
            last = index == len(micro_batches) - 1
            with self._exchange.during_backward() if self._exchange is not None and last else nullcontext():
                if into is None or into:
                    share = total / (n_parts * len(micro_batches))
                    (share if self.loss_scale is None else share * self.loss_scale.scale).backward(inputs=into)
            sum_of_totals += total.detach()
            values = {"train_loss": loss, **output.losses}
            for name, value in output.metrics.items():
                if name != "expert_usage":  # a number per expert is for evaluation
                    values[name] = value.float().mean(0).flatten()  # over layers
            for name, value in values.items():
                diagnostics.setdefault(name, []).append(value.detach())
        return sum_of_totals / len(micro_batches)


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of ``n`` that is at most ``limit`` (at least 1)."""
    return next(d for d in range(limit, 0, -1) if n % d == 0)
