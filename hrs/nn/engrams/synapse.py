"""A temperature for each attention head, set by what was read so far."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.nn.products import Linear


class Synapse(nn.Module):
    """The "virtual synapse": two networks d -> hidden -> d without biases read the mean engram, and the cosine of what
    they say to each head is a gain in [-1, 1] for its scores.

    Scores times 1 + gain would need the whole T x T matrix. Queries times sqrt(1 + gain), the original's way out, cost
    nothing and are a milder form of the same: one inverse temperature per head, whatever the tokens.
    """

    LEAST = 1e-4
    """1 + gain is not taken below it: the square root's slope at 0 is infinite."""

    def __init__(self, d_model: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = _network(d_model, hidden)
        self.key = _network(d_model, hidden)

    def forward(self, means: Tensor) -> Tensor:
        """Factors of the queries [B, m, H] for mean engrams [B, m, d]; row 0 stands for none, with factor 1."""
        query, key = (self._directions(network(means[:, 1:])) for network in (self.query, self.key))
        gain = (query * key).sum(dim=-1)  # [B, m - 1, H]
        return F.pad((1 + gain).clamp_min(self.LEAST).sqrt(), (0, 0, 1, 0), value=1.0)

    def _directions(self, projected: Tensor) -> Tensor:
        """[B, m, d] to unit vectors [B, m, H, d_head]."""
        projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return F.normalize(projected.unflatten(-1, (self.n_heads, -1)), dim=-1)


def _network(d_model: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(Linear(d_model, hidden, bias=False), nn.GELU(), Linear(hidden, d_model, bias=False))
