"""One hop: transport, message passing, attention, and a feed-forward step."""

import torch
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.as_built.attention import ManifoldAttention
from hrs.nn.as_built.context import TokenContext
from hrs.nn.as_built.directions import unit
from hrs.nn.as_built.hop_cell import GeodesicMixer, HopCell
from hrs.nn.as_built.router import HopRouter
from hrs.nn.as_built.transport import transport


class SharedLayers(nn.Module):
    """What all hops have in common; passed to them, so that each parameter has one name."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, n = config.d_model, config.manifold.geometry.n_coordinates
        self.message = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))
        self.attention = ManifoldAttention(config)
        self.to_coordinates = nn.Linear(d, n, bias=False)
        nn.init.zeros_(self.to_coordinates.weight)


class Hop(nn.Module):
    """A hop with layers of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transport_share = config.manifold.transport_share
        self.cell = HopCell(config)
        self.router = HopRouter(config)
        self.norm = nn.LayerNorm(config.d_model)
        self.embedding = nn.Parameter(torch.randn(config.d_model))
        self.mixer = GeodesicMixer(config)
        self.post_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        states: Tensor,
        shared: SharedLayers,
        context: TokenContext,
        entropy: Tensor,
        velocities: Tensor,
        before: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run the hop.

        Args:
            states: [B, S, D].
            shared: layers of all hops.
            context: of the tokens.
            entropy: [B, S, 1], of the prediction from ``states``, as a share of the largest.
            velocities: [B, S, N].
            before: velocities of the hop before; None in the first hop, which transports nothing.

        Returns:
            New states [B, S, D] and velocities [B, S, N].
        """
        if before is not None:
            states = transport(states, before, velocities, self.transport_share)
        modulation = self.cell.modulation(context.coordinates)
        messages = shared.message(self.cell(states, modulation, torch.zeros_like(states)))
        incoming = self.router(states, messages, velocities, entropy, context)
        states = self.norm(self.cell(states, modulation, incoming))
        velocities = context.velocities(unit(context.directions + shared.to_coordinates(states)))
        # The embedding is added to the stream itself, not to what queries and keys are made of.
        states = shared.attention(states + self.embedding, context.directions, velocities)
        return self.post_norm(self.mixer(states, context.coordinates)), velocities
