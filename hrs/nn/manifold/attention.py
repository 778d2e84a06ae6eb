"""Causal attention whose queries and keys also see directions, and whose scores have terms of the geometry alone."""

import math

import torch
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.attention import RotaryEmbedding
from hrs.nn.cache import KeyValueCache
from hrs.nn.kernels import Dot, attend_by_scores
from hrs.nn.manifold.window import TokenWindow
from hrs.nn.products import Linear


class ManifoldAttention(nn.Module):
    """Queries of [state; direction; velocity], keys of [state; direction], values of the state; rotary positions.

    Directions and velocities are multiplied by sqrt(N), so that their entries have the size of a normalised state's:
    as unit vectors beside a state of length sqrt(D) they would be a rounding error.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, n_coordinates = config.d_model, config.manifold.geometry.n_coordinates
        self.n_heads = config.n_heads
        d_head = d // config.n_heads
        self.length = math.sqrt(n_coordinates)
        self.query = Linear(d + 2 * n_coordinates, d, bias=False)
        self.key = Linear(d + n_coordinates, d, bias=False)
        self.value = Linear(d, d, bias=False)
        self.output = Linear(d, d, bias=False)
        self.rotary = RotaryEmbedding(d_head, config.max_seq_len, config.rope_base)
        self.kernel = Dot(d_head)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        hop_embedding: Tensor,
        velocity: Tensor,
        prior: Tensor,
        window: TokenWindow,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[B, n, D], to be added to the residual stream.

        Args:
            x: normalised tokens [B, n, D].
            hop_embedding: [D], added to what queries and keys see, not to the values.
            velocity: [B, n, N].
            prior: [B, n, S], added to the scores of every head.
            cache: keys and values of earlier tokens; those of ``x`` are added.
        """
        own = self.length * window.directions[:, -x.shape[1] :]
        seen = x + hop_embedding
        q = self._heads(self.query(torch.cat((seen, own, self.length * velocity), dim=-1)))
        k = self._heads(self.key(torch.cat((seen, own), dim=-1)))
        v = self._heads(self.value(x))
        q, k = self.rotary(q, window.positions), self.rotary(k, window.positions)
        if cache is not None:
            k, v, _ = cache.append(k, v, window.positions)
        dropout = self.dropout if self.training else 0.0
        attended = attend_by_scores(
            self.kernel, q, k, v, window.visible, bias=prior.unsqueeze(1), dropout=dropout
        )  # [B, H, n, d_head]
        return self.output(attended.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        """[B, n, D] to [B, H, n, d_head]."""
        return projected.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
