"""Where the text is heading: from a token's own direction to the recency-weighted mean of those before it."""

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = 0.05
"""A difference of unit vectors shorter than this points nowhere: it is not blown up to length 1."""
_EXTRAPOLATION = 0.4


def wide(x: Tensor) -> Tensor:
    """In float32 at least: differences of directions and thresholds cancel badly in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """x / max(|x|, :data:`SHORTEST`) over the last dimension: continuous at 0, with a gradient of at most 20.

    A plain normalisation makes a unit vector of rounding noise, for instance where a token repeats and the mean of
    the past equals its own direction; decoding and the parallel pass would then disagree.
    """
    return F.normalize(x, dim=-1, eps=SHORTEST)


def recency_weights(distance: Tensor, recency: float, dtype: torch.dtype) -> Tensor:
    """exp(-distance / recency) over the past, each row with sum 1; a zero row where there is no past.

    Args:
        distance: [n, S] int64, position of the query minus that of the key; above 0 is the past.
        recency: tokens over which the weight falls by e.
    """
    # Relative to the nearest, whose 1 keeps every sum with a past at 1 or above, however long the text.
    weights = torch.exp((1 - distance.clamp_min(1)).to(dtype) / recency) * (distance > 0)
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1.0)


def context_velocity(directions: Tensor, weights: Tensor) -> Tensor:
    """:func:`unit` of (mean of the past directions - own direction), zero without a past; [B, n, N].

    Args:
        directions: [B, S, N], of unit length or zero; the last n are those of the queries.
        weights: [n, S] of :func:`recency_weights`.
    """
    n = weights.shape[0]
    has_past = weights.sum(dim=-1, keepdim=True) > 0  # [n, 1]
    return unit((weights @ directions - directions[:, -n:]) * has_past)


def ahead(directions: Tensor, velocity: Tensor) -> Tensor:
    """The direction [B, n, N] one step on: a straight line from each token along its velocity, back on the sphere."""
    return unit(directions + _EXTRAPOLATION * velocity)
