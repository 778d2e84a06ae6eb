"""Exact nearest keys by cosine: products in float32 find who can be among them, float64 decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrs.retrieval.store.parts import Integers, Mask, Rows, Vectors
from hrs.retrieval.store.transform import Floats, Transform

_SCORES_AT_ONCE = 2**22
_FIRST_ROWS = 4096
"""Rows whose k-th best score is a first bound, cheaper than that of all."""
_RESCORED_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Rows of parts that may be among the nearest of queries, in any order."""

    parts: Integers
    rows: Integers
    queries: Integers


def score_error(width: int) -> float:
    """How far a float32 product of float32 unit vectors [width] may be from their cosine, whatever the order of sums
    (Higham 2002, section 3.1), with the rounding of both vectors."""
    return (width + 4) * float(np.finfo(np.float32).eps) / 2


class Shortlist:
    """Who may be among the k nearest of each query, as parts are scored one after the other.

    A row stays if its score is at least the k-th best so far less twice the error of a score: then no row that is left
    out is nearer than those k.

    Args:
        queries: [Q, d], unit vectors.
        k: how many are wanted.
        floor: least similarity wanted.
    """

    def __init__(self, queries: Vectors, k: int, floor: float) -> None:
        self._queries, self._k = queries, k
        self._error = score_error(queries.shape[1])
        self._bounds = np.full(len(queries), floor - self._error, dtype=np.float32)
        self._scores: list[NDArray[Any]] = []
        self._parts: list[Integers] = []
        self._rows: list[Integers] = []
        self._of: list[Integers] = []
        self._n = 0

    def scan(self, part: int, units: Vectors, allowed: Mask | None) -> None:
        """Score the rows of a part, units [n, d]; ``allowed`` [n] says which of them count, None for all."""
        step = max(_SCORES_AT_ONCE // len(self._queries), _FIRST_ROWS)
        for start in range(0, len(units), step):
            scores = units[start : start + step] @ self._queries.T  # [n, Q]
            if allowed is not None:
                scores[~allowed[start : start + step]] = -np.inf
            passing = scores >= self._bounds
            for known in (scores[:_FIRST_ROWS], scores):
                if np.count_nonzero(passing) <= self._limit:
                    break
                self._raise_bounds(known)
                passing = scores >= self._bounds
            found = np.flatnonzero(passing)
            rows, queries = np.divmod(found, scores.shape[1])
            self.add(np.full(len(rows), part), rows + start, queries, scores.reshape(-1)[found])

    @property
    def _limit(self) -> int:
        """Pairs so many that a pass to have fewer of them pays."""
        return (1024 + self._k) * len(self._queries)

    def add(self, parts: Integers, rows: Integers, queries: Integers, scores: NDArray[Any]) -> None:
        """Take pairs with known scores."""
        self._parts.append(parts)
        self._rows.append(rows)
        self._of.append(queries)
        self._scores.append(scores)
        self._n += len(rows)
        if self._n > 2 * self._limit:
            self._prune()

    def _raise_bounds(self, scores: NDArray[Any]) -> None:
        """The k-th best of some scores [n, Q] is no better than the k-th best of all."""
        n = len(scores)
        if n >= self._k:
            kth = np.partition(scores, n - self._k, axis=0)[n - self._k]
            np.maximum(self._bounds, kth - np.float32(2 * self._error), out=self._bounds)

    def _prune(self) -> None:
        parts, rows, queries, scores = map(np.concatenate, (self._parts, self._rows, self._of, self._scores))
        order = np.lexsort((-scores, queries))
        ranked = queries[order]
        ends = np.searchsorted(ranked, np.arange(len(self._queries)), side="left") + self._k - 1
        enough = (ends < len(ranked)) & (ranked[ends.clip(max=max(len(ranked) - 1, 0))] == np.arange(len(ends)))
        kth = scores[order[ends[enough]]]
        self._bounds[enough] = np.maximum(self._bounds[enough], kth - np.float32(2 * self._error))
        stays = scores >= self._bounds[queries]
        self._parts, self._rows, self._of, self._scores = ([column[stays]] for column in (parts, rows, queries, scores))
        self._n = int(stays.sum())

    def pairs(self) -> Pairs:
        """Who is left."""
        if self._n:
            self._prune()
        columns = (self._parts, self._rows, self._of)
        return Pairs(*(np.concatenate(c) if c else np.zeros(0, dtype=np.int64) for c in columns))


def similarities(pairs: Pairs, parts: Sequence[Rows], directions: Floats, transform: Transform) -> Floats:
    """[m], cosines in float64 of the keys as they were given, transformed, and query directions [Q, d].

    Equal keys have equal cosines: each is summed by itself, in the order of its columns.
    """
    values = np.empty(len(pairs.rows))
    pulled = transform.pull_back(directions)
    at_once = max(_RESCORED_AT_ONCE // directions.shape[1], 1)
    for index, part in enumerate(parts):
        mine = np.flatnonzero(pairs.parts == index)
        for start in range(0, len(mine), at_once):
            chosen = mine[start : start + at_once]
            rows = pairs.rows[chosen]
            keys = transform.centre(part.part.keys(rows)) / part.norms[rows, None]  # [m, d]
            values[chosen] = (keys * pulled[pairs.queries[chosen]]).sum(axis=1)
    return values.clip(-1.0, 1.0)
