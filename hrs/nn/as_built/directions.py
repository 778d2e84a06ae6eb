"""Unit vectors, and the attitude of a token that moves."""

from torch import Tensor

LOOKAHEAD = 0.4
"""Of a unit step along the velocity, added to a direction before comparing it with others."""
_SMALLEST_NORM = 1e-6


def unit(x: Tensor) -> Tensor:
    """Vectors [..., n] scaled to norm 1; what is shorter than 1e-6 becomes zero, without a gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    return (x / norm.clamp_min(_SMALLEST_NORM)).masked_fill(norm < _SMALLEST_NORM, 0.0)


def extrapolate(directions: Tensor, velocities: Tensor) -> Tensor:
    """One straight step along the velocity, back onto the sphere: [B, S, N] of two [B, S, N]."""
    return unit(directions + LOOKAHEAD * velocities)
