"""Symmetric integers by rows: a weight is a level times the step of its row.

The step has no floor. Its limit is either the largest weight of the row, or ``k`` times the row's root mean square,
whatever the largest is: for Gaussian weights the levels then carry about ``bits - log2(k) + 1.05`` bits each, and a
compressed file follows that entropy, not the width of the integers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hrs.errors import HRSError

BITS = (8, 7, 6, 5, 4)
MIN_COLUMNS = 16
"""Shorter rows would spend more than a bit per weight on their steps."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Which levels a row may use."""

    bits: int = 8
    """4 to 8; levels run from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1."""
    k: float | None = None
    """Largest level in root mean squares of the row; None for the row's largest weight."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise HRSError(f"bits must lie between {min(BITS)} and {max(BITS)}, got {self.bits}")
        if self.k is not None and not 0 < self.k < math.inf:
            raise HRSError(f"k must be above 0, got {self.k}")

    @property
    def limit(self) -> int:
        """The highest level."""
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """Levels and steps of one weight; R rows of C columns."""

    levels: Tensor
    """[R, C] int8."""
    scales: Tensor
    """[R] float16; the step of a row is its scale times ``unit``."""
    unit: float
    """A power of two that brings the largest scale near 1: float16 alone would lose steps below 6e-8."""

    @property
    def steps(self) -> Tensor:
        """[R] float32."""
        return _steps(self.scales, self.unit)

    def dequantize(self) -> Tensor:
        """[R, C] float32."""
        return self.levels.float() * self.steps[:, None]


def rows_of(weight: Tensor) -> Tensor:
    """A weight [..., C] as rows [R, C]: vectors along the last dimension, or, if that is short, as in a convolution
    [out, in, width], along all but the first."""
    if weight.ndim < 2 or weight.numel() == 0:
        return weight.reshape(1, -1)
    return weight.reshape(-1, weight.shape[-1]) if weight.shape[-1] >= MIN_COLUMNS else weight.flatten(1)


def rounded_steps(rows: Tensor, grid: Grid) -> tuple[Tensor, float]:
    """Scales [R] float16 and their unit for rows [R, C] float32: what can be stored, not what was wished.

    Scales are rounded up, so that a row's largest weight never lies more than half a step beyond the last level.

    Raises:
        HRSError: if a weight is not finite.
    """
    largest = rows.abs().amax(dim=1).double()
    if not torch.isfinite(largest).all():
        raise HRSError("a weight is not finite: training diverged, and such a model cannot be exported")
    if grid.k is not None:
        # Divided first: squares of very large or small weights would leave float32.
        relative = rows / largest.clamp_min(torch.finfo(torch.float32).tiny).float()[:, None]
        largest = grid.k * largest * relative.square().mean(dim=1, dtype=torch.float64).sqrt()
    steps = largest / grid.limit
    unit = 2.0 ** math.floor(math.log2(top)) if (top := float(steps.max())) > 0 else 1.0
    exact = steps / unit  # [R], at most 2
    scales = exact.half()
    # The next float16 above, for positive numbers, is the next integer of the same bits.
    up = (scales.view(torch.int16) + 1).view(torch.float16)
    scales = torch.where(scales.double() < exact, up, scales)
    return scales, unit


def divisors(scales: Tensor, unit: float) -> Tensor:
    """Steps [R] float32 to divide rows by: 1 where the step is 0, as in a row of zeros."""
    steps = _steps(scales, unit)
    return torch.where(steps > 0, steps, 1.0)


def _steps(scales: Tensor, unit: float) -> Tensor:
    return (scales.double() * unit).float()


def quantize(weight: Tensor, grid: Grid) -> Quantized:
    """Round to nearest. ``weight`` [..., C] floating, on the CPU.

    Raises:
        HRSError: if a weight is not finite.
    """
    rows = rows_of(weight.detach().float())
    scales, unit = rounded_steps(rows, grid)
    levels = (rows / divisors(scales, unit)[:, None]).round().clamp(-grid.limit, grid.limit).to(torch.int8)
    return Quantized(levels, scales, unit)
