"""The dense feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from hrs.nn.dropout import Dropout
from hrs.nn.products import Linear


class FeedForward(nn.Module):
    """d -> d_ff -> d with GELU and no biases."""

    def __init__(self, d_model: int, d_ff: int, *, dropout: float) -> None:
        super().__init__()
        self.hidden = Linear(d_model, d_ff, bias=False)
        self.output = Linear(d_ff, d_model, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised tokens [B, T, d] to [B, T, d], to be added to the residual stream."""
        return self.dropout(self.output(F.gelu(self.hidden(x))))
