"""The original's export, to compare with: openai/parameter-golf PR #663.

Integers by rows as well, with two differences that its numbers hang on. The step of a row is at least 1/127, which is
every row's step as long as no weight reaches 1: the search for the best clipping beside it then changes nothing. And
everything large and two-dimensional is rounded, the frozen coordinates too.
"""

import io
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
THRESHOLD = 65_536
"""Tensors with no more numbers become float16."""
FLOOR = 1 / 127


def quantize_as_built(weight: Tensor, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """Levels [R, C] int8 and steps [R] float16 of ``weight`` [R, C]: of each row the clipping with the least error.

    Args:
        floor: smallest step; 0 for what the scheme looks like without it.
    """
    rows = weight.float()
    best_error = torch.full((len(rows),), torch.inf)
    best_levels, best_steps = torch.zeros(rows.shape, dtype=torch.int8), torch.ones(len(rows)).half()
    # Not torch.quantile, which refuses more than 2^24 numbers.
    for percentile in np.quantile(rows.abs().numpy(), PERCENTILES, axis=1):
        clip = torch.from_numpy(percentile).float()  # [R]
        steps = (clip / 127).clamp_min(max(floor, torch.finfo(torch.float16).tiny)).half()  # [R]
        clipped = rows.clamp(-clip[:, None], clip[:, None])
        levels = (clipped / steps.float()[:, None]).round().clamp(-127, 127)
        error = (levels * steps.float()[:, None] - rows).square().mean(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_levels[better] = levels[better].to(torch.int8)
        best_steps = torch.where(better, steps, best_steps)
    return best_levels, best_steps


def export_as_built(
    state: Mapping[str, Tensor], *, floor: float = FLOOR, threshold: int = THRESHOLD
) -> tuple[dict[str, Tensor], bytes]:
    """A state_dict after the original's round trip, and the bytes its file would have."""
    restored: dict[str, Tensor] = {}
    stored: dict[str, object] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            stored[name] = restored[name] = tensor
        elif tensor.ndim == 2 and tensor.numel() > threshold:
            levels, steps = quantize_as_built(tensor, floor)
            stored[name] = {"levels": levels, "steps": steps}
            restored[name] = (levels.float() * steps.float()[:, None]).to(tensor.dtype)
        else:
            stored[name] = tensor.half()
            restored[name] = tensor.half().to(tensor.dtype)
    file = io.BytesIO()
    torch.save(stored, file)
    return restored, zlib.compress(file.getvalue(), 9)
