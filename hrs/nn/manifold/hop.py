"""One hop: transport, message, router, cell, attention and mixer, each added to the residual stream."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.cache import KeyValueCache, TailCache
from hrs.nn.dropout import Dropout
from hrs.nn.manifold.attention import ManifoldAttention
from hrs.nn.manifold.context import ahead, context_velocity, unit, wide
from hrs.nn.manifold.hop_cell import HopCell
from hrs.nn.manifold.mixer import SpectralMixer
from hrs.nn.manifold.router import Router, RouteStatistics
from hrs.nn.manifold.transport import orthonormal_lift, transported
from hrs.nn.manifold.window import TokenWindow
from hrs.nn.products import Linear

_PRIOR_START = 0.05


class HopCache:
    """What one hop remembers of the tokens so far while decoding."""

    def __init__(self, capacity: int) -> None:
        self.attention = KeyValueCache(capacity)
        self.messages = TailCache(capacity)
        """[B, S, D]"""
        self.directions = TailCache(capacity)
        """[B, S, N], moved by the states of this hop."""


@dataclass(slots=True)
class HopStatistics:
    """What a hop tells about one pass."""

    routes: RouteStatistics
    prior: Tensor
    """[2], weights of the geometry in attention: of the cosine, and of its product with the step ahead."""


class SharedLayers(nn.Module):
    """Weights that all hops use: the message function, the attention, and the maps between states and coordinates."""

    lift: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, n_coordinates = config.d_model, config.manifold.geometry.n_coordinates
        self.message = nn.Sequential(Linear(d, d), nn.GELU(), Linear(d, d))
        self.attention = ManifoldAttention(config)
        self.to_coordinates = Linear(d, n_coordinates, bias=False)
        # In checkpoints: another machine's decomposition may differ in its last digits.
        self.register_buffer("lift", orthonormal_lift(n_coordinates, d))

    def lifted(self, velocity: Tensor) -> Tensor:
        """Velocities [B, n, N] in the D dimensions of the stream."""
        return F.linear(velocity, self.lift)


class Hop(nn.Module):
    """Pre-norm residual branches around one residual stream, so no branch has to be held small by force.

    Args:
        config: the model's.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, manifold = config.d_model, config.manifold
        n_coordinates = manifold.geometry.n_coordinates
        self.share = manifold.transport_share
        self.cell_norm = nn.LayerNorm(d)
        self.cell = HopCell(d, n_coordinates)
        self.message_norm = nn.LayerNorm(d)
        self.router = Router(d, manifold.temperature)
        self.attention_norm = nn.LayerNorm(d)
        self.hop_embedding = nn.Parameter(torch.empty(d))
        # Free scalars: training may turn the geometry off or round, which a floor above zero forbids.
        self.prior = nn.Parameter(torch.full((2,), _PRIOR_START))
        self.mixer_norm = nn.LayerNorm(d)
        self.mixer = SpectralMixer(d, n_coordinates)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        velocity: Tensor,
        before: Tensor | None,
        window: TokenWindow,
        shared: SharedLayers,
        cache: HopCache | None = None,
    ) -> tuple[Tensor, Tensor, HopStatistics]:
        """The residual stream [B, n, D] after this hop, the velocity [B, n, N] its states point to, and statistics.

        Args:
            velocity: [B, n, N], of the last hop, or of the tokens alone.
            before: the one before that, from which states are transported; None in the first hop.
        """
        with torch.autocast(x.device.type, enabled=False):
            lifted = shared.lifted(velocity)
            if before is not None:
                x = transported(x, shared.lifted(before), lifted, self.share)
        state = self.cell_norm(x)
        projected, modulation = self.cell.state(state), self.cell.modulation(window)
        messages = shared.message(self.message_norm(x + self.cell(projected, modulation)))
        if cache is not None:
            messages = cache.messages.extend(messages)
        incoming, routes = self.router(state, messages, velocity, lifted, window)
        x = x + self.dropout(self.cell(projected, modulation, incoming))

        state = self.attention_norm(x)
        velocity, prior = self._look(shared.to_coordinates(state), window, cache)
        memory = None if cache is None else cache.attention
        attended = shared.attention(state, self.hop_embedding, velocity, prior, window, memory)
        x = x + self.dropout(attended)
        x = x + self.dropout(self.mixer(self.mixer_norm(x), window))
        return x, velocity, HopStatistics(routes, self.prior.detach())

    def _look(self, moved: Tensor, window: TokenWindow, cache: HopCache | None) -> tuple[Tensor, Tensor]:
        """The velocity [B, n, N] between directions ``moved`` [B, n, N] by the states, and the prior [B, n, S]."""
        with torch.autocast(moved.device.type, enabled=False):
            own = window.directions[:, -moved.shape[1] :]
            directions = unit(own + wide(moved))
            if cache is not None:
                directions = cache.directions.extend(directions)
            velocity = context_velocity(directions, window.recency)
            along = ahead(own, velocity) @ window.directions.mT  # [B, n, S]
            return velocity, window.cosines * (self.prior[0] + self.prior[1] * along)
