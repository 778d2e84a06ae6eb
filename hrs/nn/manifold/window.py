"""What all hops read of the tokens alone: directions, cosines, which tokens are neighbours, and the local route."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ManifoldConfig
from hrs.nn.manifold.context import recency_weights
from hrs.nn.sparsemax import Sparsemax

_FALLBACK_SLOPE = 0.01


@dataclass(slots=True)
class TokenWindow:
    """Facts about the n tokens of a pass and the S that they may see, the same in every hop."""

    tokens: Tensor
    """[B, n] ids."""
    positions: Tensor
    """[n]"""
    coordinates: Tensor
    """[V, N], of all ids."""
    directions: Tensor
    """[B, S, N], coordinates as unit vectors; zero where a token has none."""
    cosines: Tensor
    """[B, n, S] between directions, zero for later tokens."""
    visible: Tensor
    """[n, S] bool, a token itself and those before it."""
    earlier: Tensor
    """[n, S] bool, those before it."""
    recency: Tensor
    """[n, S], weights of the past, see :func:`hrs.nn.manifold.context.recency_weights`."""
    confidence: Tensor
    """[n, 1], from 0 at the first token to 1 where the context counts fully."""
    ranks: Tensor
    """[B, n, S] int64, which of token t's K neighbours token j is; K if none or not visible."""
    evidence: Tensor
    """[B, n, K], how often a neighbour has been seen times its cosine."""
    coverage: Tensor
    """[B, n, 1], share of the neighbours that have been seen."""
    local: Tensor
    """[B, n, S], weights of the local route."""


def per_token(module: Callable[[Tensor], Tensor], coordinates: Tensor, tokens: Tensor) -> Tensor:
    """``module`` of the coordinates [V, N] of tokens [B, n], evaluated for all ids once if these are the fewer rows.

    The choice depends on shapes alone, so a compiled graph is whole.
    """
    if tokens.numel() <= coordinates.shape[0]:
        return module(F.embedding(tokens, coordinates))
    table = module(coordinates)
    # Gradients of many tokens add up in a row: too much for half precision.
    return F.embedding(tokens, table.to(torch.promote_types(table.dtype, torch.float32)))


class LocalRoute(nn.Module):
    """Weights over earlier tokens with the same mode, the largest coordinate; by nearness where there are none.

    Sparsemax of temperature * cosine for those of the same mode and 0 for others, or of -temperature * distance / 100
    if no earlier token shares the mode; and of 0 for a null slot whose message is zero, which the first token has only.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.sparsemax = Sparsemax()

    def forward(self, directions: Tensor, cosines: Tensor, distance: Tensor) -> Tensor:
        """[B, n, S] from directions [B, S, N], their cosines [B, n, S] and distances [n, S]; sums are at most 1."""
        n, earlier = distance.shape[0], distance > 0
        mode = torch.where((directions != 0).any(dim=-1), directions.argmax(dim=-1), -1)  # [B, S]
        own = mode[:, -n:, None]
        same = (own == mode[:, None, :]) & (own >= 0) & earlier  # [B, n, S]
        nearness = (-_FALLBACK_SLOPE * distance).to(cosines.dtype)
        scores = torch.where(same.any(dim=-1, keepdim=True), cosines * same, nearness) * self.temperature
        return self.sparsemax(F.pad(scores, (0, 1)), F.pad(earlier, (0, 1), value=True))[..., :-1]


class WindowReader(nn.Module):
    """Tokens to their :class:`TokenWindow`; nothing in it is learned."""

    def __init__(self, config: ManifoldConfig) -> None:
        super().__init__()
        self.config = config
        self.local = LocalRoute(config.temperature)

    def forward(self, tokens: Tensor, n: int, coordinates: Tensor, neighbours: Tensor) -> TokenWindow:
        """
        Args:
            tokens: [B, S] ids from the beginning of the text.
            n: how many of them, the last, are asked for.
            coordinates: [V, N].
            neighbours: [V, K] distinct ids, or -1.
        """
        length = tokens.shape[1]
        places = torch.arange(length, device=tokens.device)
        positions = places[length - n :]
        distance = positions[:, None] - places[None, :]  # [n, S]
        new = tokens[:, length - n :]
        with torch.autocast(tokens.device.type, enabled=False):
            directions = F.normalize(F.embedding(tokens, coordinates), dim=-1)
            cosines = (directions[:, length - n :] @ directions.mT) * (distance >= 0)
            local = self.local(directions, cosines, distance)
        ranks = neighbour_ranks(tokens, F.embedding(new, neighbours), distance >= 0)
        none = cosines.new_zeros(*new.shape, neighbours.shape[1] + 1)  # [B, n, K + 1]
        counts = none.scatter_add(-1, ranks, torch.ones_like(cosines))[..., :-1]
        return TokenWindow(
            tokens=new,
            positions=positions,
            coordinates=coordinates,
            directions=directions,
            cosines=cosines,
            visible=distance >= 0,
            earlier=distance > 0,
            recency=recency_weights(distance, self.config.recency, directions.dtype),
            confidence=(positions / self.config.confidence_tokens).clamp_max(1.0).to(cosines.dtype)[:, None],
            ranks=ranks,
            evidence=none.scatter_add(-1, ranks, cosines)[..., :-1],
            coverage=(counts > 0).to(cosines.dtype).mean(dim=-1, keepdim=True),
            local=local,
        )


def neighbour_ranks(tokens: Tensor, neighbours: Tensor, visible: Tensor) -> Tensor:
    """[B, n, S] int64: k where token j is the k-th of token t's neighbours [B, n, K] and visible [n, S], else K.

    One index per pair in place of K flags: neighbours are distinct, so at most one matches.
    """
    batch, n, n_neighbours = neighbours.shape
    ranks = torch.full((batch, n, tokens.shape[1]), n_neighbours, dtype=torch.int16, device=tokens.device)
    for k in range(n_neighbours):
        ranks = torch.where(tokens[:, None, :] == neighbours[:, :, k, None], k, ranks)
    return ranks.masked_fill(~visible, n_neighbours).long()
