"""The mixer: a feed-forward layer whose hidden units the token's coordinates open and close."""

import torch.nn.functional as F
from torch import Tensor, nn

from hrs.nn.manifold.window import TokenWindow, per_token
from hrs.nn.products import Linear


class SpectralMixer(nn.Module):
    """output(GELU(hidden(x)) * sigma(gate(c))): D -> 2 D -> D without biases, the gate linear in coordinates."""

    def __init__(self, d_model: int, n_coordinates: int) -> None:
        super().__init__()
        self.hidden = Linear(d_model, 2 * d_model, bias=False)
        self.gate = Linear(n_coordinates, 2 * d_model)
        self.output = Linear(2 * d_model, d_model, bias=False)

    def forward(self, x: Tensor, window: TokenWindow) -> Tensor:
        """Normalised tokens [B, n, D] to [B, n, D], to be added to the residual stream."""
        gate = per_token(self.gate, window.coordinates, window.tokens).sigmoid()
        return self.output(F.gelu(self.hidden(x)) * gate)
