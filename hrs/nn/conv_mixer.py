"""A causal convolution in the place of attention."""

import torch.nn.functional as F
from torch import Tensor, nn

from hrs.nn.cache import TailCache
from hrs.nn.dropout import Dropout
from hrs.nn.products import Linear


class CausalConv(nn.Module):
    """Depthwise convolution over the last ``kernel`` tokens, no bias."""

    def __init__(self, d_model: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = nn.Conv1d(d_model, d_model, kernel, groups=d_model, bias=False)

    def new_cache(self) -> TailCache:
        return TailCache(self.kernel - 1)

    def forward(self, x: Tensor, cache: TailCache | None = None) -> Tensor:
        """[B, n, d] to [B, n, d]."""
        joined = x if cache is None else cache.extend(x)
        missing = self.kernel - 1 - (joined.shape[1] - x.shape[1])  # zeros stand in front of the sequence
        return self.conv(F.pad(joined.transpose(1, 2), (missing, 0))).transpose(1, 2)


class ConvMixer(nn.Module):
    """Depthwise convolution, mixing of channels, norm."""

    def __init__(self, d_model: int, kernel: int, *, dropout: float) -> None:
        super().__init__()
        self.conv = CausalConv(d_model, kernel)
        self.output = Linear(d_model, d_model, bias=False)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def new_cache(self) -> TailCache:
        return self.conv.new_cache()

    def forward(self, x: Tensor, cache: TailCache | None = None) -> Tensor:
        """Normalised tokens [B, n, d] to [B, n, d], to be added to the residual stream."""
        return self.dropout(self.norm(self.output(self.conv(x, cache))))
