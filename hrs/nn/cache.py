"""State of incremental decoding, one small object per kind of memory a layer has."""

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one attention layer with the position each of them is visible from.

    Storage for ``capacity`` keys is allocated with the first ones, so a decoding step copies only what is new.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys = self._values = self._positions = torch.empty(0)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add keys and values [B, H, n, d_head] at ``positions`` [n]; returns all so far, [B, H, S, d_head] and [S]."""
        if self.length == 0:
            batch, heads, _, width = keys.shape
            self._keys = keys.new_empty(batch, heads, self.capacity, width)
            self._values = torch.empty_like(self._keys)
            self._positions = positions.new_empty(self.capacity)
        start, self.length = self.length, self.length + keys.shape[2]
        self._keys[:, :, start : self.length] = keys
        self._values[:, :, start : self.length] = values
        self._positions[start : self.length] = positions
        end = self.length
        return self._keys[:, :, :end], self._values[:, :, :end], self._positions[:end]


class TailCache:
    """The last ``length`` rows of a sequence that arrives in pieces: all that a causal window has to remember."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._rows: Tensor | None = None

    def extend(self, rows: Tensor) -> Tensor:
        """``rows`` [B, n, d] with the remembered ones in front, [B, m + n, d], m <= length."""
        joined = rows if self._rows is None else torch.cat((self._rows, rows), dim=1)
        self._rows = joined[:, max(joined.shape[1] - self.length, 0) :]
        return joined
