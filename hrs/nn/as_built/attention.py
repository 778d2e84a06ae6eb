"""Post-norm attention that also sees directions and velocities."""

import math

import torch
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.as_built.context import FORBIDDEN
from hrs.nn.as_built.directions import extrapolate

CLAMP = 50.0
_LEAST_WEIGHT = 0.05
_WEIGHT_START = -5.0
_PRIOR_START = 0.1
_OUTPUT_START = 0.01


class ManifoldAttention(nn.Module):
    """Attention whose scores have two terms from the geometry. Scores are clamped after the mask."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, n = config.d_model, config.manifold.geometry.n_coordinates
        self.n_heads = config.n_heads
        self.query = nn.Linear(d + 2 * n, d, bias=False)
        self.key = nn.Linear(d + n, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.norm = nn.LayerNorm(d)
        self.manifold_weight = nn.Parameter(torch.tensor(_WEIGHT_START))
        self.ahead_weight = nn.Parameter(torch.tensor(_WEIGHT_START))

    @torch.no_grad()
    def initialise(self, coordinates: Tensor) -> None:
        """Values start as the identity, output as a hundredth of it, and what reads directions as the principal axes of
        coordinates [V, N]; the product of query and key is then about 2e-6 times a cosine, that is nothing."""
        identity = torch.eye(self.value.in_features)
        self.value.weight.copy_(identity)
        self.output.weight.copy_(_OUTPUT_START * identity)
        d, n = self.output.in_features, coordinates.shape[1]
        axes = torch.linalg.svd(coordinates, full_matrices=False).Vh  # [min(V, N), N]
        for projection in (self.query, self.key):
            columns = projection.weight[:, d : d + n]
            columns.zero_()
            columns[: len(axes)] = axes * (_PRIOR_START / math.sqrt(n))

    def forward(self, states: Tensor, directions: Tensor, velocities: Tensor) -> Tensor:
        """[B, S, D] of states [B, S, D], directions and velocities [B, S, N]."""
        q = self._heads(self.query(torch.cat((states, directions, velocities), dim=-1)))
        k = self._heads(self.key(torch.cat((states, directions), dim=-1)))
        v = self._heads(self.value(states))
        cosines = directions @ directions.mT  # [B, S, S]
        ahead = extrapolate(directions, velocities) @ directions.mT
        prior = self._weight(self.manifold_weight) * cosines + self._weight(self.ahead_weight) * cosines * ahead
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + prior[:, None]  # [B, H, S, S]
        positions = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(positions[:, None] < positions, FORBIDDEN).clamp(-CLAMP, CLAMP)
        attended = scores.softmax(dim=-1).to(v.dtype) @ v
        return self.norm(states + self.output(attended.transpose(1, 2).flatten(2)))

    def _heads(self, projected: Tensor) -> Tensor:
        """[B, S, D] to [B, H, S, d_head]."""
        return projected.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    @staticmethod
    def _weight(parameter: Tensor) -> Tensor:
        return _LEAST_WEIGHT + (1 - _LEAST_WEIGHT) * parameter.sigmoid()
