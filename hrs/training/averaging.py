"""Exponential moving averages (EMA) of the weights (Polyak & Juditsky 1992), and the one a run is evaluated with."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hrs.config import AveragingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Averaged weights that were set aside, to evaluate the run with."""

    weights: dict[str, Tensor]
    """A whole state_dict on the CPU: averaged parameters, and the buffers the model had at that step."""
    step: int
    """Steps that were done."""
    decay: float
    loss: float | None
    """Validation loss in nats per token; None where they were kept without one."""

    def facts(self) -> dict[str, Any]:
        """Everything but the weights, for JSON."""
        return {"step": self.step, "decay": self.decay, "loss": self.loss}


class Averages:
    """One average of all parameters per decay d: after each update a <- d a + (1 - d) w.

    They begin as copies of the weights after ``round(start_frac * steps)`` steps and do not move in a step that was
    skipped. Parameters that rest, or that a phase draws anew, are averaged like all others. Buffers are not averaged:
    they hold counts and statistics, and an average is always read together with the buffers the model has at that
    moment. Without decays every method does nothing.

    The averages live on the model's device, the kept weights in the memory of the host.
    """

    def __init__(self, config: AveragingConfig, model: nn.Module, steps: int) -> None:
        self.start = round(config.start_frac * steps)
        self.kept: Kept | None = None
        self._keep_best = config.keep == "best"
        self._model = model
        self._parameters = dict(model.named_parameters())  # tied ones once
        self._began = False
        # Before the first step, so that a card that is too small for them shows at once.
        self._averages = {
            decay: [torch.empty_like(p, requires_grad=False) for p in self._parameters.values()]
            for decay in config.decays
        }

    # ---- every step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, step: int, *, updated: bool | Tensor) -> None:
        """Take in the weights after ``step`` steps; ``updated`` is whether the last of them changed any, a tensor where
        only the device knows."""
        weights: list[Tensor] = list(self._parameters.values())
        for decay, average in self._averages.items():
            if step == self.start:
                torch._foreach_copy_(average, weights)
            elif step > self.start and isinstance(updated, Tensor):
                share = (1.0 - decay) * updated  # 0 leaves an average as it is, to the bit
                torch._foreach_lerp_(average, weights, [share] * len(weights))
            elif step > self.start and updated:
                torch._foreach_lerp_(average, weights, 1.0 - decay)
        self._began = step >= self.start

    # ---- validation --------------------------------------------------------------------------------------------------

    @contextmanager
    def in_place_of_weights(self, decay: float) -> Iterator[None]:
        """Within it the model computes with an average. Its parameters are pointed elsewhere and back, not copied, so
        that afterwards they are the same to the bit."""
        weights = [p.data for p in self._parameters.values()]
        for parameter, average in zip(self._parameters.values(), self._averages[decay], strict=True):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, weight in zip(self._parameters.values(), weights, strict=True):
                parameter.data = weight

    def validate(self, loss: Callable[[], float], step: int) -> dict[str, float]:
        """``validation_loss_ema_<decay>`` of every average that has begun, in nats per token; ``loss`` takes it of the
        model as it is. Keeps the average with the lowest loss so far, the earlier one of equals."""
        metrics: dict[str, float] = {}
        for decay in self._averages if self._began else ():
            with self.in_place_of_weights(decay):
                value = metrics[f"validation_loss_ema_{decay}"] = loss()
            best = float("inf") if self.kept is None or self.kept.loss is None else self.kept.loss
            if self._keep_best and value < best:
                self._set_aside(step, decay, value)
        return metrics

    def finish(self, step: int) -> None:
        """After the last step: keep the first decay's average, unless an earlier one is to be kept and was.

        With ``keep=best`` there is none where no validation came after the start, or none had a finite loss.
        """
        if self._averages and self.kept is None:
            self._set_aside(step, next(iter(self._averages)), None)

    def _set_aside(self, step: int, decay: float, loss: float | None) -> None:
        self.kept = None  # first, so that there are never two
        with self.in_place_of_weights(decay):
            weights = {name: value.detach().to("cpu", copy=True) for name, value in self._model.state_dict().items()}
        self.kept = Kept(weights=weights, step=step, decay=decay, loss=loss)

    # ---- what survives -----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Every average, as ``<decay>/<parameter>``; empty before they begin."""
        return {
            f"{decay}/{name}": value
            for decay, average in (self._averages.items() if self._began else ())
            for name, value in zip(self._parameters, average, strict=True)
        }

    def restore(
        self, tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor], facts: Mapping[str, Any] | None
    ) -> None:
        """Put back :meth:`tensors`, and the weights and facts of what was kept, if anything was."""
        if not self._averages:
            return
        self._began = bool(tensors)
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
        self.kept = None if facts is None else Kept(weights=dict(kept), **facts)
