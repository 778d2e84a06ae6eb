"""The layers of a hop that look at one token at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig

_LARGEST_STEP = 0.2
_SMALLEST_NORM = 1e-8

Modulation = tuple[Tensor, Tensor, Tensor]
"""Factor, offset and gate [B, S, D] of a cell's update."""


class HopCell(nn.Module):
    """A residual update whose scale, offset and gate are functions of the token's coordinates."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, n = config.d_model, config.manifold.geometry.n_coordinates
        self.structure = nn.Sequential(nn.Linear(n, d), nn.GELU(), nn.Linear(d, 3 * d))
        self.update = nn.Sequential(nn.Linear(2 * d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.norm = nn.LayerNorm(d)

    def modulation(self, coordinates: Tensor) -> Modulation:
        """Of coordinates [B, S, N]; the same for both calls of a hop."""
        factor, offset, gate = self.structure(coordinates).chunk(3, dim=-1)
        return factor, offset, gate.sigmoid()

    def forward(self, states: Tensor, modulation: Modulation, incoming: Tensor) -> Tensor:
        """[B, S, D] of states and incoming messages [B, S, D]."""
        factor, offset, gate = modulation
        update = self.update(torch.cat((states, incoming), dim=-1))
        return self.norm(states + gate * (factor * update + offset))


class GeodesicMixer(nn.Module):
    """A gated feed-forward step, at most a fifth as long as the state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, n = config.d_model, config.manifold.geometry.n_coordinates
        self.up = nn.Linear(d, 2 * d, bias=False)
        self.down = nn.Linear(2 * d, d, bias=False)
        self.gate = nn.Linear(n, 2 * d)
        for parameter in (self.down.weight, self.gate.weight, self.gate.bias):
            nn.init.zeros_(parameter)

    def forward(self, states: Tensor, coordinates: Tensor) -> Tensor:
        """The moved states [B, S, D] of states [B, S, D] and coordinates [B, S, N]."""
        step = self.down(F.gelu(self.up(states)) * self.gate(coordinates).sigmoid())
        length = step.norm(dim=-1, keepdim=True).clamp_min(_SMALLEST_NORM)
        return states + step * (_LARGEST_STEP * states.norm(dim=-1, keepdim=True) / length).clamp_max(1.0)
