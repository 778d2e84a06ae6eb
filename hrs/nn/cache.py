"""State of incremental decoding, one small object per kind of memory a layer has.

Each kind exists twice: for a batch of sequences of equal length, and, as slots, for sequences of unequal length that
all get one token at a time. Sequences begin in the first kind and then join the slots. Slots 0 .. n - 1 are in use,
without holes: when a sequence leaves, the last one moves into its slot. One :class:`SlotTable`, shared by all parts of
a model's slots, says how many there are and how long each sequence is.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_STEPS_BEFORE_COPIES = 16
"""Steps that take about as long as copying the matrices: short texts do not pay for what only long ones gain."""
_ROWS_OF_COPIES = 3
"""Rows that are multiplied by a matrix stored as [in, out] in half to nine tenths of the time of [out, in]. From four
rows on it takes up to a half longer (``python -m benchmarks.matrix_layout``)."""


class SlotTable:
    """The sequences in the slots of a model, and the decoding step that they make together.

    A step has static shapes if it is given ``n_rows`` and ``end``: rows beyond the slots in use are computed and
    thrown away, and keys beyond a sequence's length are masked. Nothing in a step waits for the device.

    Args:
        n_slots: sequences there is room for.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.lengths: list[int] = []
        """Tokens read by the sequence in each slot in use, on the host."""
        self.positions = torch.empty(0)
        """[n, 1] int64, of the present step's tokens."""
        self.places = self.rows = torch.empty(0)
        """[n], the same without the dimension of tokens; and 0 to n - 1."""
        self.end = 0
        """Positions below it are attended to in the present step."""
        self.equal = True
        """True if all rows of the present step are at position ``end - 1``."""
        self.constants: dict[Hashable, object] = {}
        """What :meth:`constant` keeps; tables of one model may share it."""
        self._of_step: dict[Hashable, object] = {}

    def begin(self, positions: Tensor, *, end: int | None = None) -> None:
        """Start a step whose tokens stand at ``positions`` [n, 1], on the device.

        Args:
            end: number of positions to attend to; None for those up to the longest sequence's new token.
        """
        self.positions, self.places = positions, positions.squeeze(1)
        every = self.constant(("rows", self.n_slots), lambda: torch.arange(self.n_slots, device=positions.device))
        self.rows = every[: len(positions)]
        longest = max(self.lengths) + 1
        self.end = longest if end is None else end
        # A step of static shapes is repeated for other lengths.
        self.equal = end is None and longest == min(self.lengths) + 1
        self._of_step.clear()

    def advance(self) -> None:
        """Note that every sequence has read one more token."""
        self.lengths = [length + 1 for length in self.lengths]
        self.constants["steps"] = self.n_steps + 1

    @property
    def n_steps(self) -> int:
        """Steps made so far."""
        return int(self.constants.get("steps", 0))  # type: ignore[call-overload]

    @property
    def copies_matrices(self) -> bool:
        """True if :meth:`matrix` gives copies in the present step on the CPU."""
        return len(self.rows) <= _ROWS_OF_COPIES and self.n_steps >= _STEPS_BEFORE_COPIES

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a layer's ``weight`` [out, in] as this step multiplies by it; it must not change afterwards.

        On the CPU this is, after some steps of few rows, a copy that lies in memory as [in, out].
        """
        if weight.device.type != "cpu" or not self.copies_matrices:
            return weight
        return self.constant(("matrix", id(weight)), lambda: weight.detach().t().contiguous().t())

    def join(self, n: int, length: int) -> None:
        """Put ``n`` sequences of ``length`` tokens into the next slots."""
        self.lengths += [length] * n

    def leave(self, slot: int) -> None:
        """Empty a slot; the last one in use moves into it."""
        last = self.lengths.pop()
        if slot < len(self.lengths):
            self.lengths[slot] = last

    def completing(self, size: int) -> list[int]:
        """Slots in use whose present token is the last one of a piece of ``size`` tokens."""
        return [slot for slot, length in enumerate(self.lengths) if (length + 1) % size == 0]

    def in_step(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` returned in this step for ``key``: computed once, used by every layer."""
        if key not in self._of_step:
            self._of_step[key] = make()
        return self._of_step[key]  # type: ignore[return-value]

    def constant(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` returned for ``key``, the same in all steps and for every layer."""
        if key not in self.constants:
            self.constants[key] = make()
        return self.constants[key]  # type: ignore[return-value]


class KeyValueCache:
    """Keys and values of one attention layer with the position each of them is visible from.

    Storage for ``capacity`` keys is allocated with the first ones, so a decoding step copies only what is new.

    Args:
        capacity: keys there is room for.
        memory_positions: [E], the position from which each key that is not a token's is visible, in the order in which
            they are added; only needed by :meth:`slots`.
    """

    def __init__(self, capacity: int, memory_positions: Tensor | None = None) -> None:
        self.capacity = capacity
        self.memory_positions = memory_positions
        self.length = 0
        self._keys = self._values = self._positions = torch.empty(0)
        self._memories: list[tuple[int, int]] = []

    def append(
        self, keys: Tensor, values: Tensor, positions: Tensor, n_memory: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add keys and values [B, H, n, d_head] at ``positions`` [n], of which the first ``n_memory`` are no tokens'.

        Returns:
            All keys and values so far, [B, H, S, d_head], and their positions [S].
        """
        if self.length == 0:
            batch, heads, _, width = keys.shape
            self._keys = keys.new_empty(batch, heads, self.capacity, width)
            self._values = torch.empty_like(self._keys)
            self._positions = positions.new_empty(self.capacity)
        start, self.length = self.length, self.length + keys.shape[2]
        self._keys[:, :, start : self.length] = keys
        self._values[:, :, start : self.length] = values
        self._positions[start : self.length] = positions
        if n_memory:
            self._memories.append((start, start + n_memory))
        return self.filled()

    def filled(self) -> tuple[Tensor, Tensor, Tensor]:
        """All keys and values so far [B, H, S, d_head] and their positions [S]."""
        end = self.length
        return self._keys[:, :, :end], self._values[:, :, :end], self._positions[:end]

    def pieces(self) -> list[tuple[bool, int, int]]:
        """Runs of keys in order: whether they are tokens', the first one, and the one after the last."""
        runs, at = [], 0
        for start, stop in self._memories:
            runs += [(True, at, start), (False, start, stop)]
            at = stop
        return [run for run in [*runs, (True, at, self.length)] if run[1] < run[2]]

    def slots(self, table: SlotTable) -> "KeyValueSlots":
        """Room for such caches of unequal length."""
        return KeyValueSlots(table, self.capacity, self.memory_positions)


class KeyValueSlots:
    """Keys and values of one attention layer, a slot for each sequence.

    Of E places in front for keys that are no tokens', the next one takes the next such key; the key of position p
    stands at place E + p. What another sequence left at a place is masked until the present one writes there.

    Args:
        table: the sequences.
        capacity: keys there is room for in a slot.
        memory_positions: [E], see :class:`KeyValueCache`.
    """

    def __init__(self, table: SlotTable, capacity: int, memory_positions: Tensor | None = None) -> None:
        self.table = table
        self.n_memory = 0 if memory_positions is None else len(memory_positions)
        self._capacity = capacity
        self._memory_positions = memory_positions
        self._store = torch.empty(0)  # [2, n_slots, H, capacity, d_head], keys and values

    def join(self, cache: KeyValueCache, slot: int) -> None:
        """Copy the sequences of a cache into ``slot`` and those after it."""
        keys, values, _ = cache.filled()
        if self._store.numel() == 0:
            _, heads, _, width = keys.shape
            self._store = keys.new_empty(2, self.table.n_slots, heads, self._capacity, width)
            # Zeros: what no query sees has the weight 0, but 0 times something that is no number is none either.
            self._store.zero_()
        store, places = self._store[:, slot : slot + len(keys)], [self.n_memory, 0]
        store.zero_()
        for is_token, start, stop in cache.pieces():
            place = places[not is_token]
            places[not is_token] = place + stop - start
            for own, new in zip(store, (keys, values), strict=True):
                own[:, :, place : place + stop - start] = new[:, :, start:stop]

    def leave(self, slot: int, last: int) -> None:
        """Move what is in slot ``last`` into ``slot``."""
        self._store[:, slot] = self._store[:, last]

    def write(self, pairs: Tensor) -> None:
        """Set key and value [n, 2, H, d_head] of each row's present token."""
        table, n = self.table, self.n_memory
        if table.equal:
            self._store[:, : len(pairs), :, n + table.end - 1] = pairs.transpose(0, 1)
            return
        places = table.in_step(("places", n), lambda: table.places + n) if n else table.places
        self._store[:, table.rows, :, places] = pairs

    def write_memory(self, pairs: Tensor, rows: Tensor, places: Tensor) -> None:
        """Set keys and values [M, 2, H, d_head] that are no tokens' at ``places`` [M] of ``rows`` [M]."""
        self._store[:, rows, :, places] = pairs

    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values [n, H, S, d_head] up to the end of the present step."""
        k, v = self._store[:, : len(self.table.positions), :, : self.n_memory + self.table.end].unbind()
        return k, v

    def positions(self) -> Tensor:
        """[S], the position from which each key of :meth:`filled` is visible."""
        return self._visible_from()[: self.n_memory + self.table.end]

    def visible(self) -> Tensor:
        """[n, 1, 1, S] bool, the keys that each row's query sees."""
        return self.table.in_step(
            ("visible", self.n_memory), lambda: (self.table.positions >= self.positions())[:, None, None]
        )

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """[n, 1, 1, S], 0 for keys that each row's query sees and -inf for others; None if it sees all of them."""
        table = self.table
        if table.equal and self.n_memory == 0:
            return None

        def of_all_positions() -> Tensor:
            every = self._visible_from()  # [capacity]
            hidden = every[self.n_memory :].unsqueeze(1) < every
            return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, -torch.inf)

        def of_this_step() -> Tensor:
            rows = table.constant(("masks", self._capacity, self.n_memory, dtype), of_all_positions)
            return rows.index_select(0, table.places)[:, None, None, : self.n_memory + table.end]

        return table.in_step(("mask", self.n_memory, dtype), of_this_step)

    def _visible_from(self) -> Tensor:
        """[capacity], the first position that sees each place."""

        def make() -> Tensor:
            tokens = torch.arange(self._capacity - self.n_memory, device=self._store.device)
            if self._memory_positions is None:
                return tokens
            return torch.cat((self._memory_positions.to(tokens.device), tokens))

        return self.table.constant(("visible from", self._capacity, self.n_memory), make)


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

    def slots(self, table: SlotTable) -> "TailSlots":
        """Room for such caches of unequal length."""
        return TailSlots(table, self.length)


class TailSlots(TailCache):
    """The last ``length`` rows of every sequence, with zeros in front of those that have fewer."""

    def __init__(self, table: SlotTable, length: int) -> None:
        super().__init__(length)
        self.table = table

    def join(self, cache: TailCache, slot: int) -> None:
        """Copy the sequences of a cache into ``slot`` and those after it."""
        rows = cache.filled()
        if rows is None:
            return  # the layer has no use for it
        if self._rows is None:
            self._rows = rows.new_zeros(self.table.n_slots, self.length, rows.shape[2])
        missing, own = self.length - rows.shape[1], self._rows[slot : slot + len(rows)]
        own[:, :missing] = 0
        own[:, missing:] = rows

    def leave(self, slot: int, last: int) -> None:
        """Move what is in slot ``last`` into ``slot``."""
        if self._rows is not None:
            self._rows[slot] = self._rows[last]

    def tensors(self) -> list[Tensor]:
        """Return all that a step changes."""
        return [] if self._rows is None else [self._rows]

    def extend(self, rows: Tensor) -> Tensor:
        """One row [n, 1, d] for each row of the step, with the remembered ones in front, [n, length + 1, d]."""
        assert self._rows is not None
        own = self._rows[: len(rows)]
        joined = torch.cat((own, rows), dim=1)
        own.copy_(joined[:, 1:])
        return joined


class SlotTensor:
    """One tensor for each slot, allocated with the first sequence that joins.

    Args:
        table: the sequences.
        length: size of the first dimension of each tensor: shorter ones are followed by zeros. None for any size.
    """

    def __init__(self, table: SlotTable, length: int | None = None) -> None:
        self._table = table
        self._length = length
        self._store = torch.empty(0)

    def join(self, tensors: Tensor, slot: int) -> None:
        """Copy tensors [B, ...], or [B, m, ...] with m <= length, into ``slot`` and those after it."""
        shape = list(tensors.shape[1:])
        if self._length is not None:
            shape[0] = self._length
        if self._store.numel() == 0:
            self._store = tensors.new_zeros(self._table.n_slots, *shape)
        own = self._store[slot : slot + len(tensors)]
        if self._length is None:
            own.copy_(tensors)
        else:
            own.zero_()
            own[:, : tensors.shape[1]] = tensors

    def leave(self, slot: int, last: int) -> None:
        """Move what is in slot ``last`` into ``slot``."""
        self._store[slot] = self._store[last]

    def tensors(self) -> list[Tensor]:
        """Return all that a step changes."""
        return [self._store]

    @property
    def rows(self) -> Tensor:
        """[n, ...], those of the rows of the present step; may be changed in place."""
        return self._store[: len(self._table.positions)]

    def set_at(self, places: Tensor, values: Tensor) -> None:
        """Set element ``places`` [n] of each row's tensor to its value [n, ...]."""
        self._store[self._table.rows, places] = values


CachePart = KeyValueCache | TailCache
SlotPart = KeyValueSlots | TailSlots
