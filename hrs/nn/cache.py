"""State of incremental decoding, one small object per kind of memory a layer has.

Each kind exists twice: for a batch of sequences of equal length, and, as slots, for sequences of unequal length that
all get one token at a time. A sequence begins in the first kind, with a batch of one, and then joins the slots. Slots
0 .. n - 1 are in use, without holes: when a sequence leaves, the last one moves into its slot.
"""

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
        return self.filled()

    def filled(self) -> tuple[Tensor, Tensor, Tensor]:
        """All keys and values so far [B, H, S, d_head] and their positions [S]."""
        end = self.length
        return self._keys[:, :, :end], self._values[:, :, :end], self._positions[:end]

    def slots(self, n: int) -> "KeyValueSlots":
        """Room for ``n`` such caches of unequal length."""
        return KeyValueSlots(n, self.capacity)


class KeyValueSlots(KeyValueCache):
    """Keys and values of one attention layer, a slot for each sequence.

    The key of position p stands at place p of its slot. What another sequence left there is beyond the position that
    the present one has reached, so no query sees it.
    """

    def __init__(self, n_slots: int, capacity: int) -> None:
        super().__init__(capacity)
        self.n_slots = n_slots
        self.lengths: list[int] = []
        """Keys in each slot in use."""
        self._slots = torch.empty(0)

    def join(self, cache: KeyValueCache) -> None:
        """Copy the one sequence of a cache that holds tokens alone into the next slot."""
        keys, values, _ = cache.filled()
        if self._keys.numel() == 0:
            _, heads, _, width = keys.shape
            # Zeros: what no query sees has the weight 0, but 0 times something that is no number is none either.
            self._keys = keys.new_zeros(self.n_slots, heads, self.capacity, width)
            self._values = torch.zeros_like(self._keys)
            self._slots = torch.arange(self.n_slots, device=keys.device)
            self._positions = torch.arange(self.capacity, device=keys.device)
        slot, length = len(self.lengths), cache.length
        for store, new in ((self._keys, keys), (self._values, values)):
            store[slot, :, :length] = new[0]
            store[slot, :, length:] = 0
        self.lengths.append(length)

    def leave(self, slot: int) -> None:
        """Empty a slot; the last one in use moves into it."""
        length = self.lengths.pop()
        if slot < len(self.lengths):
            for store in (self._keys, self._values):
                store[slot] = store[len(self.lengths)]
            self.lengths[slot] = length

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add one key and value [B, H, 1, d_head] at ``positions`` [B, 1] to each slot in use.

        Returns:
            The keys and values of these slots [B, H, S, d_head] up to the longest one's last, and positions [S].
        """
        n = len(self.lengths)
        slots, places = self._slots[:n], positions.squeeze(1)
        self._keys[slots, :, places] = keys.squeeze(2)
        self._values[slots, :, places] = values.squeeze(2)
        self.lengths = [length + 1 for length in self.lengths]
        end = max(self.lengths)
        return self._keys[:n, :, :end], self._values[:n, :, :end], self._positions[:end]

    def visible(self, positions: Tensor) -> Tensor | None:
        """Which keys queries at ``positions`` [B, 1] see, [B, 1, 1, S]; None if that is all of them."""
        end = max(self.lengths)
        if min(self.lengths) == end:
            return None
        return (positions >= self._positions[:end])[:, None, None]


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

    def filled(self) -> Tensor | None:
        """The remembered rows [B, m, d]; None if there never was one."""
        return self._rows

    def slots(self, n: int) -> "TailSlots":
        """Room for ``n`` such caches of unequal length."""
        return TailSlots(n, self.length)


class TailSlots(TailCache):
    """The last ``length`` rows of every sequence, with zeros in front of those that have fewer."""

    def __init__(self, n_slots: int, length: int) -> None:
        super().__init__(length)
        self.n_slots = n_slots
        self.n = 0
        """Slots in use."""

    def join(self, cache: TailCache) -> None:
        """Copy the one sequence of a cache into the next slot."""
        slot, self.n = self.n, self.n + 1
        rows = cache.filled()
        if rows is None:
            return  # the layer has no use for it
        if self._rows is None:
            self._rows = rows.new_zeros(self.n_slots, self.length, rows.shape[2])
        missing = self.length - rows.shape[1]
        self._rows[slot, :missing] = 0
        self._rows[slot, missing:] = rows[0]

    def leave(self, slot: int) -> None:
        """Empty a slot; the last one in use moves into it."""
        self.n -= 1
        if slot < self.n and self._rows is not None:
            self._rows[slot] = self._rows[self.n]

    def extend(self, rows: Tensor) -> Tensor:
        """One row [B, 1, d] for each slot in use, with the remembered ones in front, [B, length + 1, d]."""
        assert self._rows is not None
        joined = torch.cat((self._rows[: self.n], rows), dim=1)
        self._rows[: self.n] = joined[:, 1:]
        return joined


CachePart = KeyValueCache | TailCache
