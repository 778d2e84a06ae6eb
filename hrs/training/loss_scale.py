"""A factor of the loss that keeps gradients in float16's range (Micikevicius et al. 2018, arXiv:1710.03740).

torch's GradScaler waits for the device and knows neither gradients summed over micro-batches and workers nor the run's
own rule for skipped steps; this one is two scalars on the device.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

INITIAL = 2.0**16
LARGEST = 2.0**24
GROWTH_STEPS = 2000
"""Steps in a row without overflow after which the factor is doubled."""


class LossScale:
    """The factor, a power of two: halved after an overflow, at least 1, and doubled when there was none for long.

    Scaling and unscaling by a power of two changes no digit of a float32 gradient.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL, device=device)
        self._steps = torch.zeros((), device=device)  # since the last change

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the factor, in place, those with sparse gradients too."""
        gradients = [p.grad._values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self.scale.reciprocal())

    def overflowed(self, total: Tensor, norm: Tensor) -> Tensor:
        """Return, as a boolean scalar, whether a smaller factor may mend a step that is not finite.

        Args:
            total: loss, which was not scaled.
            norm: of the gradients.
        """
        return total.isfinite() & ~norm.isfinite() & (self.scale > 1)

    def update(self, taken: Tensor) -> None:
        """Adapt the factor after a step; ``taken`` is a boolean scalar, False if the step was skipped."""
        self._steps = torch.where(taken, self._steps + 1, 0.0)
        grow = self._steps >= GROWTH_STEPS
        factor = torch.where(taken, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale = (self.scale * factor).clamp(1.0, LARGEST)
        self._steps = torch.where(grow, 0.0, self._steps)

    def state(self) -> list[float]:
        """Return what :meth:`restore` takes: JSON values. Waits for the device."""
        return [self.scale.item(), self._steps.item()]

    def restore(self, state: list[float]) -> None:
        """Continue where another instance was."""
        self.scale.fill_(state[0])
        self._steps.fill_(state[1])
