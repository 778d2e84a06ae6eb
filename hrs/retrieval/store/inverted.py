"""An optional index over segments for stores too large to score in full: FAISS's inverted lists, approximate.

Keys are grouped around centroids, and a query looks only into the nearest groups (IVF; Jegou et al. 2011). What it
finds is scored again in float64 like everything else, so a similarity is never approximate: a near key may be missing.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hrs.errors import HRSError
from hrs.retrieval.store.exact import Shortlist
from hrs.retrieval.store.parts import Mask, Rows, Vectors
from hrs.retrieval.store.transform import Transform

_TRAINING_ROWS_PER_LIST = 64
_SHARE_PROBED = 4
"""One list in so many is looked into."""
_GROWTH = 4
"""Lists are made anew for so many times the keys that their centroids were fitted on."""
_SPARE = 16
"""Rows fetched beyond k: float32 ranks them, and float64 may rank them otherwise."""


def import_faiss() -> Any:
    """The module.

    Raises:
        HRSError: if it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise HRSError(
            "faiss_above asks for a FAISS index and the package is not installed: pip install faiss-cpu, or leave "
            "faiss_above out for exact search"
        ) from error
    return faiss


class InvertedLists:
    """Inverted lists over the segments of one store, in memory; made at the first search, then kept up.

    They hold rows by their number, so that segments may be merged. Only new rows are added, until the keys are
    transformed anew, have grown :data:`_GROWTH` times, or half of the rows in the lists are no more.
    """

    def __init__(self) -> None:
        self._faiss = import_faiss()
        self._index: Any = None
        self._transform: Transform | None = None
        self._fitted_on = 0
        self._last = -1
        """Largest number in the lists."""

    def update(self, segments: Sequence[Rows], transform: Transform) -> None:
        """Hold all rows of these segments, at least one."""
        total = sum(map(len, segments))
        outgrown = self._index is None or total > _GROWTH * self._fitted_on or 2 * total < self._index.ntotal
        if outgrown or transform is not self._transform:
            self._fit(segments, total)
            self._transform = transform
        for segment in segments:
            new = int(np.searchsorted(segment.numbers, self._last, side="right"))
            if new < len(segment):
                self._index.add_with_ids(segment.units[new:], segment.numbers[new:])
        self._last = max(self._last, int(segments[-1].numbers[-1]))

    def _fit(self, segments: Sequence[Rows], total: int) -> None:
        width = segments[0].units.shape[1]
        n_lists = max(int(math.sqrt(total)), 1)
        step = max(total // (_TRAINING_ROWS_PER_LIST * n_lists), 1)
        product = self._faiss.METRIC_INNER_PRODUCT
        self._index = self._faiss.IndexIVFFlat(self._faiss.IndexFlatIP(width), width, n_lists, product)
        self._index.cp.min_points_per_centroid = 1
        self._index.train(np.concatenate([segment.units[::step] for segment in segments]))
        self._fitted_on, self._last = total, -1

    def propose(
        self,
        shortlist: Shortlist,
        segments: Sequence[Rows],
        queries: Vectors,
        k: int,
        allowed: Sequence[Mask | None],
    ) -> None:
        """Add the rows found for queries [Q, d] to the shortlist; ``allowed`` has a mask per segment, None for all."""
        parameters = self._faiss.SearchParametersIVF(nprobe=max(self._index.nlist // _SHARE_PROBED, 1))
        if self._index.ntotal != sum(map(len, segments)) or any(mask is not None for mask in allowed):
            wanted = np.zeros(self._last + 1, dtype=np.bool_)
            for segment, mask in zip(segments, allowed, strict=True):
                wanted[segment.numbers if mask is None else segment.numbers[mask]] = True
            bits = np.packbits(wanted, bitorder="little")
            parameters.sel = self._faiss.IDSelectorBitmap(bits)
        scores, found = self._index.search(queries, min(k + _SPARE, self._index.ntotal), params=parameters)
        numbers = found.reshape(-1)
        for index, segment in enumerate(segments):
            rows = np.searchsorted(segment.numbers, numbers).clip(max=len(segment) - 1)
            mine = np.flatnonzero(segment.numbers[rows] == numbers)
            shortlist.add(np.full(len(mine), index), rows[mine], mine // found.shape[1], scores.reshape(-1)[mine])
