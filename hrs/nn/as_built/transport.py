"""What the original calls parallel transport."""

import torch.nn.functional as F
from torch import Tensor

from hrs.nn.as_built.directions import unit

_SLOWEST = 0.05


def transport(states: Tensor, before: Tensor, after: Tensor, share: float) -> Tensor:
    """Mix states with their reflections along ``before - after`` and ``before + after``.

    The two axes are orthogonal for unit vectors, so together the reflections are -1 on the plane of the two velocities,
    whatever the angle: ``before`` goes to ``-before`` instead of ``after``.

    Args:
        states: [B, S, D].
        before: velocities [B, S, N] of the hop before, of norm 1 or 0; they act on the first N coordinates.
        after: the present ones.
        share: of the state that is replaced when the velocity turns back; none when it does not turn.
    """
    reflected = states
    for axis in (before - after, before + after):
        axis = F.pad(unit(axis), (0, states.shape[-1] - axis.shape[-1]))  # [B, S, D]
        reflected = reflected - 2 * axis * (axis * reflected).sum(dim=-1, keepdim=True)
    cosine = (before * after).sum(dim=-1, keepdim=True)
    moving = (before.norm(dim=-1, keepdim=True) > _SLOWEST) & (after.norm(dim=-1, keepdim=True) > _SLOWEST)
    return states + share * (1 - cosine) / 2 * moving * (reflected - states)
