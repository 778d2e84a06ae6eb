"""Sparsemax: a softmax that gives exact zeros (Martins & Astudillo 2016, arXiv:1602.02068).

The weights are the Euclidean projection of a row of scores onto the simplex: max(score - tau, 0), with the one
threshold tau for which they sum to 1. Two properties matter to whoever masks with it. The projection does not change
when a constant is added to a row, so a row in which everything was "forbidden" by the same finite number becomes
uniform over the forbidden. And where nothing is allowed there is no distribution at all. Hence ``allowed``: what is
outside takes no part whatever its score, and a row without anything inside is zero.

The threshold is searched, not sorted for. Starting at max - 1, below which no score has weight, Newton's method gives
tau <- (sum of the scores above tau - 1) / (their number): it never passes the solution, drops at least one score per
step, and stands still exactly when the scores above tau are the support (Michelot 1986). Rows that stand still stay
as they are, so no row depends on how long the others take. It is an operator of torch's library, because when to stop
depends on data: so it works on fake tensors and in compiled graphs.

To ask whether all rows stand still is to wait for a GPU at every step. There the scores are sorted instead: of the
scores in descending order z_1, z_2, ... those with 1 + k z_k > z_1 + ... + z_k are the support. One step of Newton's
method follows, so that a support which rounding in the running sum has made too large is corrected.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


class Sparsemax(nn.Module):
    """Sparsemax over the last dimension, without parameters."""

    def forward(self, scores: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Weights [..., n] of scores [..., n], in float32 at least.

        Args:
            scores: a score of minus infinity is as good as forbidden. NaN and infinities that are not allowed have no
                effect, nor a gradient.
            allowed: bool, broadcastable to ``scores``; None allows everything.

        Returns:
            Nonnegative, exactly zero outside ``allowed``; each row sums to 1, or is zero where nothing is allowed.
        """
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return _sparsemax(scores, allowed)


@torch.library.custom_op("hrs::sparsemax", mutates_args=())
def _sparsemax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    scores = scores.contiguous()
    if allowed is not None:
        scores = scores.where(allowed, -math.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    largest.masked_fill_(largest == -math.inf, 0.0)  # nothing is allowed: infinity minus itself would be NaN
    below = (scores - largest).clamp_min_(-1.0)  # [..., n] in [-1, 0]; what is at -1 has no weight
    threshold = _threshold_by_sorting(below) if below.is_cuda else _threshold_by_search(below)
    return below.sub_(threshold).clamp_min_(0.0)


def _threshold_by_search(below: Tensor) -> Tensor:
    """Return the thresholds [..., 1] of scores [..., n] in [-1, 0]."""
    threshold = torch.full_like(below[..., :1], -1.0)
    inside = torch.empty_like(below)
    while True:
        following = _newton_step(below, threshold, inside)
        # Written so that NaN ends the search. It ends anyway: the same scores inside give the same bits.
        if not bool((following > threshold).any()):
            return following
        threshold = following


def _threshold_by_sorting(below: Tensor) -> Tensor:
    """Do as :func:`_threshold_by_search` does without looking at a value."""
    ordered = below.sort(dim=-1, descending=True).values
    sums = ordered.cumsum(dim=-1)
    ranks = torch.arange(1, below.shape[-1] + 1, device=below.device, dtype=below.dtype)
    n_inside = (1 + ranks * ordered > sums).sum(dim=-1, keepdim=True).clamp_min_(1)
    threshold = (sums.gather(-1, n_inside - 1) - 1) / n_inside
    # Where nothing is allowed all scores are -1, and no weight is wanted.
    return _newton_step(below, threshold.clamp_min_(-1.0), torch.empty_like(below))


def _newton_step(below: Tensor, threshold: Tensor, inside: Tensor) -> Tensor:
    """Return the thresholds [..., 1] after one step; ``inside`` [..., n] is scratch space."""
    torch.gt(below, threshold, out=inside)
    count = inside.sum(dim=-1, keepdim=True)
    total = inside.mul_(below).sum(dim=-1, keepdim=True)
    return torch.maximum(threshold, (total - 1) / count)  # -inf, hence no change, where nothing is allowed


@_sparsemax.register_fake
def _(scores: Tensor, allowed: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape)


def _keep_weights(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """On the support the gradient minus its mean there, zero elsewhere: the projection is linear on a face."""
    (weights,) = ctx.saved_tensors
    support = weights.sign()
    mean = (grad * support).sum(dim=-1, keepdim=True) / support.sum(dim=-1, keepdim=True).clamp_min(1.0)
    return (grad - mean) * support, None


_sparsemax.register_autograd(_gradient, setup_context=_keep_weights)
