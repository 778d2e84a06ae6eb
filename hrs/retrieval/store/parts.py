"""Rows of an engram store in memory: mapped segments, and the tail that the log adds to."""

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hrs.retrieval.store.layout import StoredFile, row_schema, vectors_of

Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]
Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class NewMemory:
    """A text to be remembered."""

    text: str
    entropy: float | None = None
    """Bits per token under the model; None if unknown."""
    source: str = ""
    """Where it comes from, such as a corpus or a conversation."""
    topic: str | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """A text that a store remembers."""

    id: str
    """Unique in its store for ever; older memories have smaller numbers after the hyphen."""
    text: str
    entropy: float | None
    """Bits per token under the model; None if unknown."""
    source: str
    topic: str | None
    created: float
    """Unix time, seconds."""


class Names:
    """Small numbers for the strings of a column, so that a filter is a look-up."""

    def __init__(self) -> None:
        self._codes: dict[str | None, int] = {None: 0}

    def encode(self, column: pa.Array) -> NDArray[np.int32]:
        """[n] codes of a string column."""
        encoded = column.dictionary_encode()
        table = [self._codes.setdefault(name, len(self._codes)) for name in encoded.dictionary.to_pylist()]
        codes = encoded.indices.fill_null(len(table)).to_numpy(zero_copy_only=False)
        return np.array([*table, 0], dtype=np.int32)[codes]

    def among(self, chosen: Collection[str], *, keep: bool) -> Mask:
        """A table by code: ``keep`` for the chosen names, the contrary for all others."""
        table = np.full(len(self._codes), not keep)
        table[[self._codes[name] for name in chosen if name in self._codes]] = keep
        return table


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Columns of a part at one moment, n rows, without a copy; only ``alive`` may still change."""

    units: Vectors
    """[n, d]"""
    norms: NDArray[np.float64]
    numbers: Integers
    """Ascending."""
    created: NDArray[np.float64]
    topics: NDArray[np.int32]
    sources: NDArray[np.int32]
    alive: Mask
    all_count: bool
    """Whether no row is deleted, and every key has a direction."""
    part: "Part"

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def is_tail(self) -> bool:
        """Whether more rows may come."""
        return isinstance(self.part, Tail)


_OF_MEMORY = [row_schema(1).names.index(name) for name in ("text", "entropy", "source", "topic")]
_COLUMNS = ("units", "norms", "numbers", "created", "topics", "sources", "alive")


class Part:
    """Rows in the order of their numbers."""

    def __init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._keys: list[Vectors] = []
        self._starts: list[int] = []
        self._columns: dict[str, NDArray[Any]] = {}
        self._all_directed = True
        self.n_rows = 0
        self.n_dead = 0

    def rows(self) -> Rows:
        """The columns as they are now."""
        columns = {name: self._columns[name][: self.n_rows] for name in _COLUMNS}
        return Rows(**columns, all_count=self.n_dead == 0 and self._all_directed, part=self)

    @property
    def n_alive(self) -> int:
        return self.n_rows - self.n_dead

    def kill(self, numbers: Integers) -> None:
        """Mark rows as deleted; numbers of other parts are passed over."""
        found = self.find(numbers)
        alive = self._columns["alive"]
        self.n_dead += int(alive[found].sum())
        alive[found] = False

    def find(self, numbers: Integers) -> Integers:
        """Indices of those of the distinct ``numbers`` that stand in this part."""
        if not self.n_rows:
            return np.zeros(0, dtype=np.int64)
        own = self._columns["numbers"][: self.n_rows]
        positions = np.searchsorted(own, numbers).clip(max=self.n_rows - 1)
        return positions[own[positions] == numbers]

    def dead_numbers(self) -> Integers:
        rows = self.rows()
        return rows.numbers[~rows.alive]

    def live_batches(self) -> list[pa.RecordBatch]:
        """All rows that are not deleted."""
        if not self.n_dead:
            return list(self._batches)
        alive = pa.array(self.rows().alive)
        return [
            batch.filter(alive.slice(start, batch.num_rows))
            for start, batch in zip(self._starts, self._batches, strict=True)
        ]

    def memory(self, row: int, tag: str) -> Memory:
        number, created = int(self._columns["numbers"][row]), float(self._columns["created"][row])
        batch, row = self._locate(row)
        columns = self._batches[batch].columns
        text, entropy, source, topic = (columns[index][row].as_py() for index in _OF_MEMORY)
        return Memory(f"{tag}-{number}", text, entropy, source, topic, created)

    def keys(self, rows: Integers) -> Vectors:
        """[m, d], a copy of the keys of some rows as they were given."""
        if len(self._keys) == 1:
            return self._keys[0][rows]
        located = [self._locate(int(row)) for row in rows]
        return np.stack([self._keys[batch][row] for batch, row in located])

    def _locate(self, row: int) -> tuple[int, int]:
        """Number of the batch, and the row in it."""
        batch = bisect_right(self._starts, row) - 1
        return batch, row - self._starts[batch]


class Segment(Part):
    """A file of rows that do not change, mapped into memory."""

    def __init__(self, file: StoredFile, batch: pa.RecordBatch, topics: Names, sources: Names) -> None:
        super().__init__()
        self.file = file
        self._batches, self._starts, self._keys = [batch], [0], [vectors_of(batch, "key")]
        self._columns = _columns_of(batch, topics, sources)
        self._all_directed = bool((self._columns["norms"] > 0).all())
        self.n_rows = batch.num_rows


class Tail(Part):
    """Rows that are still only in the log."""

    def __init__(self, width: int) -> None:
        super().__init__()
        types = (np.float32, np.float64, np.int64, np.float64, np.int32, np.int32, np.bool_)
        shapes = ((0, width), *[(0,)] * 6)
        self._columns = {
            name: np.empty(shape, dtype=dtype) for name, shape, dtype in zip(_COLUMNS, shapes, types, strict=True)
        }

    def extend(self, batch: pa.RecordBatch, topics: Names, sources: Names) -> None:
        """Add rows. Columns double when they are full, so that n rows cost time in proportion to n."""
        start, end = self.n_rows, self.n_rows + batch.num_rows
        for name, values in _columns_of(batch, topics, sources).items():
            column = self._columns[name]
            if end > len(column):
                larger = np.empty((max(end, 2 * len(column)), *column.shape[1:]), dtype=column.dtype)
                larger[:start] = column[:start]
                self._columns[name] = column = larger
            column[start:end] = values
        self._batches.append(batch)
        self._all_directed &= bool((self._columns["norms"][start:end] > 0).all())
        self._keys.append(vectors_of(batch, "key"))
        self._starts.append(start)
        self.n_rows = end


def _columns_of(batch: pa.RecordBatch, topics: Names, sources: Names) -> dict[str, NDArray[Any]]:
    """The columns of :class:`Rows`: those of numbers and vectors are views."""
    return {
        "units": vectors_of(batch, "unit"),
        "norms": batch.column("norm").to_numpy(),
        "numbers": batch.column("number").to_numpy(),
        "created": batch.column("created").to_numpy(),
        "topics": topics.encode(batch.column("topic")),
        "sources": sources.encode(batch.column("source")),
        "alive": np.ones(batch.num_rows, dtype=np.bool_),
    }
