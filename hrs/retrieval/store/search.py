"""Which rows of a snapshot are asked for, and which of them lie nearest to a query."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrs.errors import HRSError
from hrs.retrieval.store.exact import Shortlist, similarities
from hrs.retrieval.store.parts import Mask, Memory, Rows, Vectors
from hrs.retrieval.store.view import Snapshot

Propose = Callable[[Sequence[Rows], Shortlist, Vectors, Sequence[Mask | None]], int]
"""Fills a shortlist for queries [Q, d] from the first parts, given which rows count; returns how many parts it did."""


@dataclass(frozen=True, slots=True, eq=False)
class Hit:
    """A memory that a query found."""

    memory: Memory
    similarity: float
    """Cosine of the transformed keys, -1 to 1, in float64."""
    key: NDArray[np.float32]
    """[d], as it was given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Which memories are asked for; None asks for all.

    Raises:
        HRSError: if a string is given for a collection of strings.
    """

    topics: Collection[str] | None = None
    """Only these. Memories without a topic are in none."""
    sources: Collection[str] | None = None
    exclude_topics: Collection[str] | None = None
    exclude_sources: Collection[str] | None = None
    since: float | None = None
    """Only those created at this Unix time in seconds or later."""
    until: float | None = None
    """Only those created before this time."""

    def __post_init__(self) -> None:
        for name in ("topics", "sources", "exclude_topics", "exclude_sources"):
            if isinstance(given := getattr(self, name), str):
                raise HRSError(f"{name} takes a collection of names and '{given}' is a name: put it into a list")

    def mask(self, rows: Rows, snapshot: Snapshot) -> Mask:
        """[n], which rows are asked for and not deleted."""
        chosen = rows.alive.copy()
        for names, codes, given, keep in (
            (snapshot.topics, rows.topics, self.topics, True),
            (snapshot.topics, rows.topics, self.exclude_topics, False),
            (snapshot.sources, rows.sources, self.sources, True),
            (snapshot.sources, rows.sources, self.exclude_sources, False),
        ):
            if given is not None:
                chosen &= names.among(given, keep=keep)[codes]
        if self.since is not None:
            chosen &= rows.created >= self.since
        if self.until is not None:
            chosen &= rows.created < self.until
        return chosen


def nearest(
    snapshot: Snapshot, queries: Vectors, k: int, chosen: Filter, min_similarity: float, propose: Propose
) -> list[list[Hit]]:
    """The k nearest of the chosen memories for each of the queries [Q, d], best first, the older first of equals."""
    hits: list[list[Hit]] = [[] for _ in queries]
    directions, norms = snapshot.transform.directions(queries)
    directed = np.flatnonzero(norms > 0)
    if not len(directed):
        return hits
    directions = directions[directed]
    units = directions.astype(np.float32)
    masks: list[Mask | None] = []
    for rows in snapshot.parts:
        everything = rows.all_count and chosen == Filter()
        masks.append(None if everything else chosen.mask(rows, snapshot) & (rows.norms > 0))
    shortlist = Shortlist(units, k, max(min_similarity, -1.0))
    done = propose(snapshot.parts, shortlist, units, masks)
    for index in range(done, len(snapshot.parts)):
        if (mask_or_none := masks[index]) is None or mask_or_none.any():
            shortlist.scan(index, snapshot.parts[index].units, mask_or_none)
    pairs = shortlist.pairs()
    values = similarities(pairs, snapshot.parts, directions, snapshot.transform)
    order = np.lexsort((pairs.rows, pairs.parts, -values, pairs.queries))
    order = order[values[order] >= min_similarity]
    queries_of = pairs.queries[order]
    rank = np.arange(len(order)) - np.searchsorted(queries_of, queries_of)
    order = order[rank < k]
    parts_of, rows_of = pairs.parts[order], pairs.rows[order]
    keys = np.empty((len(order), units.shape[1]), dtype=np.float32)
    for index, rows in enumerate(snapshot.parts):
        mine = np.flatnonzero(parts_of == index)
        if len(mine):
            keys[mine] = rows.part.keys(rows_of[mine])
    for key, index in zip(keys, order, strict=True):
        memory = snapshot.parts[pairs.parts[index]].part.memory(int(pairs.rows[index]), snapshot.tag)
        hits[directed[pairs.queries[index]]].append(Hit(memory, float(values[index]), key))
    return hits
