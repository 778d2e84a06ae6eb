"""Dropout whose mask costs a third of torch's on the CPU.

torch draws a double for every element there, which takes longer than the matrix products of a small model's attention.
Here an element gets 32 random bits and is dropped if they, read as an integer, are among the ``p * 2**32`` smallest:
its probability is p to within 2**-32, finer than the 24 bits of a uniform float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.nn.eager import on_eager_cpu

_VALUES = 2**32


def keep_mask(shape: tuple[int, ...] | torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """Return ones and zeros, each 0 with probability ``p`` in [0, 1), from torch's global generator of the CPU."""
    n = 1
    for size in shape:
        n *= size
    # random_ fills 64 bits as fast as 32.
    bits = torch.empty((n + 1) // 2, dtype=torch.int64).random_(-(2**63), None).view(torch.int32)[:n]
    smallest_kept = min(round(p * _VALUES), _VALUES - 1) - _VALUES // 2
    # In place, integers are compared twice as fast as into booleans.
    return bits.ge_(smallest_kept).to(dtype).view(shape)


class Dropout(nn.Dropout):
    """``nn.Dropout`` with :func:`keep_mask` where :func:`~hrs.nn.eager.on_eager_cpu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` with elements zeroed at rate ``p`` and the others divided by 1 - p, in training mode."""
        if not self.training or not 0 < self.p < 1 or self.inplace or not on_eager_cpu(input):
            return F.dropout(input, self.p, self.training, self.inplace)
        with torch.no_grad():
            factor = keep_mask(input.shape, self.p, input.dtype).mul_(1 / (1 - self.p))
        return input * factor
