"""Which token stands how often how far behind which: sparse, exact and additive counts over a token stream.

A pair (a, b) at offset o weighs 1/o. Everything is kept in integers, multiples of 1/:data:`WEIGHT_UNIT`, so that counts
of shards add up to the counts of the whole, to the last bit, in any order and for any cut.
"""

import math
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from hrs.data import TokenStore
from hrs.errors import HRSError

WIDE, NARROW = 10, 5
"""Largest offset, in tokens, of co-occurrence and of direction."""
WEIGHT_UNIT = math.lcm(*range(1, WIDE + 1))
"""2,520: the integer that stands for a weight of 1, divisible by every offset."""
CHUNK_TOKENS = 2**19
"""Tokens counted at once. Working memory is at most 1.1 kB per token of a chunk, beside the sums of earlier chunks."""

_WEIGHTS = np.array([0, *(WEIGHT_UNIT // offset for offset in range(1, WIDE + 1))])  # [WIDE + 1] by offset


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Counts:
    """Counts of ordered pairs, each a canonical ``csr_array`` [V, V] of int64; row a, column b: b stands after a."""

    after_10: Any
    """Offsets 1..10, weight ``WEIGHT_UNIT / offset``."""
    forward: Any
    """Offsets 1..5, the same weight. Its transpose looks to the left."""
    successors: Any
    """Offset 1, weight 1. Its transpose counts previous tokens."""
    n_tokens: int
    """Tokens that were looked at as the first of a pair."""

    @property
    def vocab_size(self) -> int:
        return int(self.after_10.shape[0])

    @property
    def weight_unit(self) -> int:
        """What a weight of 1 is in :attr:`after_10`, :attr:`forward` and :attr:`symmetric`."""
        return WEIGHT_UNIT

    @property
    def symmetric(self) -> Any:
        """Offsets 1..10 in both orders: :attr:`after_10` plus its transpose, made anew at each call."""
        return self.after_10 + self.after_10.T.tocsr()

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            after_10=self.after_10 + other.after_10,
            forward=self.forward + other.forward,
            successors=self.successors + other.successors,
            n_tokens=self.n_tokens + other.n_tokens,
        )

    def save(self, path: Path) -> None:
        """Write one uncompressed npz file, without pickled objects."""
        arrays = {"n_tokens": np.array(self.n_tokens), "vocab_size": np.array(self.vocab_size)}
        for name in ("after_10", "forward", "successors"):
            matrix = getattr(self, name)
            arrays |= {f"{name}.{part}": getattr(matrix, part) for part in ("data", "indices", "indptr")}
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Counts":
        """What :meth:`save` wrote.

        Raises:
            HRSError: if the file is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                shape = (int(file["vocab_size"]),) * 2
                matrices = {
                    name: sparse.csr_array(
                        tuple(file[f"{name}.{part}"] for part in ("data", "indices", "indptr")), shape=shape
                    )
                    for name in ("after_10", "forward", "successors")
                }
                return cls(n_tokens=int(file["n_tokens"]), **matrices)
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise HRSError(f"counts in {path} cannot be read ({error}): delete the file and count again") from error


def merged(parts: Iterable[Counts]) -> Counts:
    """The sum, added up as a tree: ``log2`` of the number of parts are held at once if ``parts`` is lazy.

    Raises:
        HRSError: if there are no parts or their vocabularies differ.
    """
    sums: list[tuple[int, Counts]] = []  # (number of doublings, sum), fewer at the end, like the bits of a counter
    for part in parts:
        if sums and sums[0][1].vocab_size != part.vocab_size:
            raise HRSError(
                f"counts over {sums[0][1].vocab_size} and {part.vocab_size} tokens cannot be added: "
                "count all shards with one tokenizer"
            )
        doublings = 0
        while sums and sums[-1][0] == doublings:
            part = sums.pop()[1] + part
            doublings += 1
        sums.append((doublings, part))
    if not sums:
        raise HRSError("there are no counts to merge: count at least one shard")
    total = sums.pop()[1]
    while sums:
        total = sums.pop()[1] + total
    return total


def count_shard(
    tokens: NDArray[Any],
    vocab_size: int,
    *,
    segment_starts: NDArray[np.int64] | None = None,
    n_first: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Counts:
    """Counts of all pairs of a stream whose first token is among the first ``n_first`` (None: all).

    ``tokens`` 1-D ids of any integer type, may be memory-mapped; ``segment_starts`` ascending positions where a
    document begins, no pair crosses one (None: pairs cross documents). ``chunk_tokens`` does not change the result.

    Each chunk becomes one array of keys (a, b, offset), sorted as plain integers; runs of equal keys are the counts.

    Raises:
        HRSError: if a token is outside the vocabulary.
    """
    n = len(tokens) if n_first is None else n_first

    def chunks() -> Iterator[Counts]:
        yield _counts(np.empty(0, dtype=np.int64), np.empty((3, 0), dtype=np.int64), vocab_size, 0)
        for start in range(0, n, chunk_tokens):
            stop = min(start + chunk_tokens, n)
            window = np.asarray(tokens[start : stop + WIDE])  # beyond the border: partners of the last tokens
            if window.min() < 0 or window.max() >= vocab_size:
                raise HRSError(
                    f"a token of the stream is outside the vocabulary of {vocab_size}: count with the size of the "
                    "vocabulary that made it"
                )
            segments = None if segment_starts is None else _segments(segment_starts, start, len(window))
            yield _count_chunk(window, stop - start, vocab_size, segments)

    return merged(chunks())


def _segments(segment_starts: NDArray[np.int64], start: int, length: int) -> NDArray[np.int32]:
    """Number of the segment of each of ``length`` positions from ``start``; only differences mean anything."""
    first, last = np.searchsorted(segment_starts, (start, start + length))
    begins = np.zeros(length, dtype=np.int32)
    begins[segment_starts[first:last] - start] = 1
    return begins.cumsum(dtype=np.int32)


def _count_chunk(window: NDArray[Any], n_first: int, vocab_size: int, segments: NDArray[np.int32] | None) -> Counts:
    # The offset takes the lowest four bits of a key. Up to 16,384 tokens a key fits into 32 bits: these sort faster.
    kind: Any = np.uint32 if 16 * vocab_size**2 <= 2**32 else np.uint64
    ids = window.astype(kind) * 16
    firsts = ids[:n_first] * vocab_size
    keys = np.empty(WIDE * n_first, dtype=kind)
    filled = 0
    for offset in range(1, min(WIDE, len(window) - 1) + 1):
        n_pairs = min(n_first, len(window) - offset)
        found = firsts[:n_pairs] + ids[offset : offset + n_pairs]
        found += offset
        if segments is not None:
            found = found[segments[:n_pairs] == segments[offset : offset + n_pairs]]
        keys[filled : filled + len(found)] = found
        filled += len(found)
    keys = keys[:filled]
    keys.sort()
    runs = _run_starts(keys)  # of equal (a, b, offset)
    repeats = np.diff(runs, append=filled)
    offsets, pairs = (keys[runs] & 15).astype(np.int8), keys[runs] >> 4
    del keys
    starts = _run_starts(pairs)  # of equal (a, b)
    weights = np.zeros((3, len(starts)), dtype=np.int64)  # after_10, forward, successors
    if len(starts):
        np.add.reduceat(_WEIGHTS[offsets] * repeats, starts, out=weights[0])
        np.add.reduceat(np.where(offsets <= NARROW, _WEIGHTS[offsets], 0) * repeats, starts, out=weights[1])
        weights[2] = np.where(offsets[starts] == 1, repeats[starts], 0)  # a pair's runs begin with the least offset
    return _counts(pairs[starts].astype(np.int64), weights, vocab_size, n_first)


def _run_starts(values: NDArray[Any]) -> NDArray[np.int64]:
    """Positions of an ascending array where a new value begins."""
    return np.flatnonzero(np.concatenate([np.ones(min(len(values), 1), dtype=bool), values[1:] != values[:-1]]))


def _counts(pairs: NDArray[np.int64], weights: NDArray[np.int64], vocab_size: int, n_tokens: int) -> Counts:
    """From ascending ``a * V + b`` [P] and the weights [3, P] of the three counts."""
    row_starts = np.arange(vocab_size + 1, dtype=np.int64) * vocab_size
    borders = np.searchsorted(pairs, row_starts)
    # 32 bits hold the columns of any vocabulary and the entries of any chunk.
    columns = (pairs - np.repeat(row_starts[:-1], np.diff(borders))).astype(np.int32)

    def matrix(row: int) -> Any:
        kept = weights[row] > 0
        indptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(kept)])[borders].astype(np.int32)
        return sparse.csr_array((weights[row, kept], columns[kept], indptr), shape=(vocab_size, vocab_size))

    return Counts(after_10=matrix(0), forward=matrix(1), successors=matrix(2), n_tokens=n_tokens)


def count_store(store: TokenStore, *, across_documents: bool, shard: tuple[int, int] = (0, 1)) -> Counts:
    """Counts of shard i of n of the training split, ``shard = (i, n)``; all n together are the whole split.

    Shards are cut where documents begin, as near behind equal parts as these allow. The end-of-text token belongs to
    the document it opens. ``across_documents``: pairs cross documents, and a cut, which counts with its first token.

    Raises:
        HRSError: if there is no such shard.
    """
    index, n_shards = shard
    if not 0 <= index < n_shards:
        raise HRSError(f"there is no shard {index} of {n_shards}: choose one from 0 to {n_shards - 1}")
    tokens = store.train.tokens
    starts = store.train.document_starts - 1  # of the end-of-text tokens, the closing one too
    edges = np.append(starts, len(tokens))
    first, last = (int(edges[np.searchsorted(edges, i * len(tokens) // n_shards)]) for i in (index, index + 1))
    if across_documents:
        return count_shard(tokens[first : last + WIDE], store.vocab_size, n_first=last - first)
    inside = starts[np.searchsorted(starts, first) : np.searchsorted(starts, last)]
    return count_shard(tokens[first:last], store.vocab_size, segment_starts=inside - first)
