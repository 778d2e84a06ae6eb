"""The spectrally modulated gated hop cell: a residual update whose gains the token's coordinates decide."""

import torch.nn.functional as F
from torch import Tensor, nn

from hrs.nn.manifold.window import TokenWindow, per_token
from hrs.nn.products import Linear


class HopCell(nn.Module):
    """sigma(z) * (a * update([state; incoming]) + b) with [a, b, z] a function of the token's coordinates.

    A hop evaluates it without and with an incoming message. The product with the state is shared by both, and nothing
    is multiplied for a message that is not there.
    """

    def __init__(self, d_model: int, n_coordinates: int) -> None:
        super().__init__()
        self.structure = nn.Sequential(Linear(n_coordinates, d_model), nn.GELU(), Linear(d_model, 3 * d_model))
        self.state = Linear(d_model, 2 * d_model)
        self.incoming = Linear(d_model, 2 * d_model, bias=False)
        self.output = Linear(2 * d_model, d_model)

    def modulation(self, window: TokenWindow) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and sigma(z), each [B, n, D]."""
        a, b, z = per_token(self.structure, window.coordinates, window.tokens).chunk(3, dim=-1)
        return a, b, z.sigmoid()

    def forward(
        self, projected: Tensor, modulation: tuple[Tensor, Tensor, Tensor], incoming: Tensor | None = None
    ) -> Tensor:
        """[B, n, D], to be added to the residual stream.

        Args:
            projected: [B, n, 2 D], ``state`` of the normalised stream.
            incoming: [B, n, D]; None is zero.
        """
        a, b, openness = modulation
        if incoming is not None:
            projected = projected + self.incoming(incoming)
        return openness * (a * self.output(F.gelu(projected)) + b)
