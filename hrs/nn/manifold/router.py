"""The router: what a token receives from earlier ones, over three routes whose weights are merged before one product.

Forbidden tokens are named by a boolean mask, which sparsemax takes; no finite number stands for them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.nn.manifold.context import ahead, unit, wide
from hrs.nn.manifold.window import TokenWindow
from hrs.nn.products import Linear
from hrs.nn.sparsemax import Sparsemax

_MESSAGE_SHARE = 0.5
_VELOCITY_SHARE = 0.3
_EDGE_WIDTH = 8
_TINY = 1e-6


@dataclass(slots=True)
class RouteStatistics:
    """Means over all tokens of a pass, detached scalars."""

    support: Tensor
    """Tokens that get weight on the geodesic route, the null slot not counted."""
    null: Tensor
    """Weight of the null slot."""
    share: Tensor
    """Weight of the geodesic route among the three."""


class GeodesicRoute(nn.Module):
    """Sparsemax over earlier tokens and one null slot that is always allowed, whose message is zero.

    The null slot defines the first token's row, and lets every token abstain. Its score is learned from 0, and so is
    the temperature of all others; both are free scalars.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        self.null_score = nn.Parameter(torch.zeros(()))
        self.sparsemax = Sparsemax()

    def forward(self, queries: Tensor, keys: Tensor, earlier: Tensor) -> Tensor:
        """Weights [B, n, S + 1], the null slot last.

        Args:
            queries: [B, n, F]; ``keys``: [B, S, F]. Their product is the agreement of tokens.
            earlier: [n, S], the keys that each query may get weight from.
        """
        scores = self.temperature * queries @ keys.mT  # [B, n, S]
        null = self.null_score.to(scores.dtype).expand(*scores.shape[:-1], 1)
        return self.sparsemax(torch.cat((scores, null), dim=-1), F.pad(earlier, (0, 1), value=True))


class NeighbourRoute(nn.Module):
    """Weights over tokens seen that are among the K neighbours of a token, in the token's own table.

    W_tj = sum_k q_tk match_tkj with q = softmax over the neighbours of a small function of their evidence. Neighbours
    that have not been seen keep their part of q, and no token gets it. As at most one k matches a pair, the sum is a
    lookup in q, and K x S flags per token are never made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Sequential(Linear(1, _EDGE_WIDTH), nn.GELU(), Linear(_EDGE_WIDTH, 1))

    def forward(self, evidence: Tensor, ranks: Tensor) -> Tensor:
        """[B, n, S] of evidence [B, n, K] and ranks [B, n, S]."""
        shares = wide(self.edge(evidence.unsqueeze(-1)).squeeze(-1)).softmax(dim=-1)  # [B, n, K]
        return F.pad(shares, (0, 1)).gather(-1, ranks)


class Router(nn.Module):
    """Merges the routes: ``coverage`` decides between neighbours and local ones, a gate how much is geodesic.

    The geodesic agreement is certainty * e_t . c_j + aim_t . m_j / 2: e is the token's direction one step ahead, aim
    its state moved along its velocity, m_j a message of unit length. The certainty is a learned scalar of the state;
    the entropy of a prediction in every hop, which the original took, costs as much as the output layer each time.

    Args:
        temperature: start of the geodesic route's.
    """

    def __init__(self, d_model: int, temperature: float) -> None:
        super().__init__()
        self.geo = GeodesicRoute(temperature)
        self.neighbour = NeighbourRoute()
        self.certainty = Linear(d_model, 1)
        self.geo_gate = Linear(d_model, 1)
        self.probe = Linear(d_model, d_model, bias=False)

    def forward(
        self, state: Tensor, messages: Tensor, velocity: Tensor, lifted: Tensor, window: TokenWindow
    ) -> tuple[Tensor, RouteStatistics]:
        """What n tokens receive [B, n, D], and statistics.

        Args:
            state: [B, n, D], normalised.
            messages: [B, S, D].
            velocity: [B, n, N]; ``lifted``: the same in D dimensions.
        """
        certainty, gate = wide(self.certainty(state)).sigmoid(), wide(self.geo_gate(state)).sigmoid()  # [B, n, 1]
        wanted = wide(self.probe(state))
        neighbour = self.neighbour(window.evidence, window.ranks)
        with torch.autocast(state.device.type, enabled=False):
            messages = wide(messages)
            own = window.directions[:, -state.shape[1] :]
            aim = unit(_normalised(wide(state)) + _VELOCITY_SHARE * lifted)
            queries = torch.cat((certainty * ahead(own, velocity), _MESSAGE_SHARE * aim), dim=-1)  # [B, n, N + D]
            keys = torch.cat((window.directions, _normalised(messages)), dim=-1)  # [B, S, N + D]
            geodesic = self.geo(queries, keys, window.earlier)  # [B, n, S + 1]
            share = gate * window.confidence  # [B, n, 1]
            base = torch.lerp(window.local, neighbour, window.coverage)
            received = torch.lerp(base, geodesic[..., :-1], share) @ messages  # [B, n, D]
            welcome = (_normalised(received) * _normalised(wanted)).sum(dim=-1, keepdim=True).sigmoid()
        statistics = RouteStatistics(
            support=(geodesic[..., :-1] > 0).sum(dim=-1).to(geodesic.dtype).mean().detach(),
            null=geodesic[..., -1].mean().detach(),
            share=share.mean().detach(),
        )
        return received * welcome, statistics


def _normalised(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=_TINY)
