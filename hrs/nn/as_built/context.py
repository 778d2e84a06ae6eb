"""What the token ids alone decide: coordinates, neighbours seen so far, and where the past points."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.config import ManifoldConfig
from hrs.nn.as_built.directions import unit

FORBIDDEN = -1e4
"""The score of what may not be read. Finite: a row of nothing else is a constant row, hence uniform after a sparsemax
or softmax over the whole window."""
_FIRST_MOVING = 3
_FALLBACK_SLOPE = 0.01


@dataclass(frozen=True, kw_only=True)
class TokenContext:
    """The same for all hops. j is an earlier position than t, or where noted the same."""

    coordinates: Tensor
    """[B, S, N]"""
    directions: Tensor
    """[B, S, N], the coordinates with norm 1."""
    recency: Tensor
    """[S, S], weight of j for t; rows sum to 1, the first is zero."""
    confidence: Tensor
    """[S, 1], from 0 at the first token to 1."""
    past: Tensor
    """[S, S] bool, whether j < t."""
    local_scores: Tensor
    """[B, S, S], before the temperature."""
    slots: Tensor
    """[B, S, S] int64, which neighbour of token t token j is, j <= t; K where it is none."""
    counts: Tensor
    """[B, S, K], how often each neighbour of t occurs among j <= t."""
    neighbour_cosines: Tensor
    """[B, S, K]"""
    coverage: Tensor
    """[B, S, 1], share of the neighbours that occur among j <= t."""

    def velocities(self, directions: Tensor) -> Tensor:
        """Where each token lies as seen from its past [B, S, N]: unit vectors, zero for the first three tokens."""
        offset = unit(self.recency @ directions - directions)
        still = torch.arange(offset.shape[1], device=offset.device)[:, None] < _FIRST_MOVING
        return offset.masked_fill(still, 0.0)


def read_tokens(tokens: Tensor, coordinates: Tensor, neighbours: Tensor, config: ManifoldConfig) -> TokenContext:
    """The context of token ids [B, S] under coordinates [V, N] and neighbours [V, K], distinct ids or -1."""
    n_tokens, device = tokens.shape[1], tokens.device
    positions = torch.arange(n_tokens, device=device)
    lag = positions[:, None] - positions  # [S, S], t - j
    own = F.embedding(tokens, coordinates)
    directions = unit(own)
    cosines = directions @ directions.mT  # [B, S, S]
    nearest = F.embedding(tokens, neighbours)  # [B, S, K]
    unit_table = unit(coordinates)
    slots = torch.full_like(lag, nearest.shape[-1]).expand(len(tokens), -1, -1)
    counts, neighbour_cosines = [], []
    for k, ids in enumerate(nearest.unbind(-1)):  # one at a time: all K at once are [B, S, K, S] and [B, S, K, N]
        match = (ids[:, :, None] == tokens[:, None, :]) & (lag >= 0)  # [B, S, S]
        slots = slots.masked_fill(match, k)
        counts.append(match.sum(dim=-1))
        neighbour_cosines.append((directions * F.embedding(ids.clamp_min(0), unit_table)).sum(dim=-1))
    seen = torch.stack(counts, dim=-1)  # [B, S, K]
    return TokenContext(
        coordinates=own,
        directions=directions,
        recency=_recency(positions, lag > 0, config.recency, coordinates.dtype),
        confidence=(positions.to(own.dtype) / config.confidence_tokens).clamp_max(1.0)[:, None],
        past=lag > 0,
        local_scores=_local_scores(own.argmax(dim=-1), cosines, lag),
        slots=slots,
        counts=seen.to(own.dtype),
        neighbour_cosines=torch.stack(neighbour_cosines, dim=-1),
        coverage=(seen > 0).to(own.dtype).mean(dim=-1, keepdim=True),
    )


def _recency(positions: Tensor, past: Tensor, tau: float, dtype: torch.dtype) -> Tensor:
    """Weights proportional to exp((t - j) / tau): the sign is wrong, and the oldest tokens weigh most.

    exp(-j / tau) has the same proportions and does not overflow.
    """
    weights = torch.exp(-positions.to(dtype) / tau) * past  # [S, S]
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1.0)  # the sum is 0 or begins with exp(0)


def _local_scores(modes: Tensor, cosines: Tensor, lag: Tensor) -> Tensor:
    """Cosine for an earlier token of the same mode, 0 for others; -0.01 * lag if there is none of the same mode.

    ``modes`` [B, S]: each token's largest coordinate.
    """
    same = (modes[:, :, None] == modes[:, None, :]) & (lag > 0)  # [B, S, S]
    fallback = -_FALLBACK_SLOPE * lag.to(cosines.dtype)
    scores = torch.where(same.any(dim=-1, keepdim=True), cosines * same, fallback)
    return scores.masked_fill(lag <= 0, FORBIDDEN)
