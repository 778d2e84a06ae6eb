"""Three ways a token hears others: neighbours of the frozen geometry, the same mode, and where it is heading."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.as_built.context import FORBIDDEN, TokenContext
from hrs.nn.as_built.directions import extrapolate, unit
from hrs.nn.sparsemax import Sparsemax

_EDGE_HIDDEN = 8
_AIM_SHARE = 0.3
_MESSAGE_SHARE = 0.5
_GATE_BIAS = -4.0


class SparsemaxAverage(nn.Module):
    """Averages of all messages with sparsemax weights, forbidden or not: here the first token reads the future."""

    def __init__(self) -> None:
        super().__init__()
        self.sparsemax = Sparsemax()

    def forward(self, scores: Tensor, messages: Tensor) -> Tensor:
        """[B, S, D] of scores [B, S, S] and messages [B, S, D]."""
        return self.sparsemax(scores).to(messages.dtype) @ messages


class HopRouter(nn.Module):
    """The message that each token gets in one hop."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, n = config.d_model, config.manifold.geometry.n_coordinates
        self.temperature = config.manifold.temperature
        self.velocity_projection = nn.Linear(n, d, bias=False)
        self.edge = nn.Sequential(nn.Linear(1, _EDGE_HIDDEN), nn.GELU(), nn.Linear(_EDGE_HIDDEN, 1))
        self.probe = nn.Linear(d, d, bias=False)
        self.geo_gate = nn.Linear(d, 1)
        nn.init.zeros_(self.geo_gate.weight)
        nn.init.constant_(self.geo_gate.bias, _GATE_BIAS)
        self.local_sparsemax = SparsemaxAverage()
        self.geo_sparsemax = SparsemaxAverage()

    def forward(
        self, states: Tensor, messages: Tensor, velocities: Tensor, entropy: Tensor, context: TokenContext
    ) -> Tensor:
        """[B, S, D] of states and messages [B, S, D], velocities [B, S, N] and entropy [B, S, 1] in [0, 1].

        The geodesic route has no say at the first token, whose confidence is 0, and the static route none without
        neighbours: what is left there is the local route's average over the whole window.
        """
        local = self.local_sparsemax(self.temperature * context.local_scores, messages)
        base = context.coverage * self._static(messages, context) + (1 - context.coverage) * local
        geo = self.geo_sparsemax(self._geo_scores(states, messages, velocities, entropy, context), messages)
        share = self.geo_gate(states).sigmoid() * context.confidence
        heard = share * geo + (1 - share) * base
        agreement = (unit(heard) * unit(self.probe(states))).sum(dim=-1, keepdim=True)
        return heard * agreement.sigmoid()

    def _static(self, messages: Tensor, context: TokenContext) -> Tensor:
        """Messages of neighbours, by one weight per neighbour; those that do not occur keep theirs to themselves.

        As one matrix [B, S, S]: the original gathered [B, S, K, D].
        """
        evidence = context.counts * context.neighbour_cosines
        weights = self.edge(evidence.unsqueeze(-1)).squeeze(-1).softmax(dim=-1)  # [B, S, K]
        return F.pad(weights, (0, 1)).gather(-1, context.slots).to(messages.dtype) @ messages

    def _geo_scores(
        self, states: Tensor, messages: Tensor, velocities: Tensor, entropy: Tensor, context: TokenContext
    ) -> Tensor:
        """[B, S, S]: alignment with a straight step along the velocity, and with messages."""
        ahead = extrapolate(context.directions, velocities)
        aim = unit(states + _AIM_SHARE * self.velocity_projection(velocities))
        scores = entropy * (ahead @ context.directions.mT) + _MESSAGE_SHARE * (aim @ messages.mT)
        return self.temperature * scores.masked_fill(torch.logical_not(context.past), FORBIDDEN)
