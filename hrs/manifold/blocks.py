"""Work cut into fixed blocks of rows: the same bits come out at any number of threads.

A matrix product may add in another order when more threads share it. So every product here runs in one thread, and
several blocks run side by side; blocks and the order in which their results are joined do not depend on the threads.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import scipy.linalg  # noqa: F401  (its BLAS must be loaded before the controller looks for libraries)
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

T = TypeVar("T")

NEIGHBOUR_ROWS = 512
COSINE_DECIMALS = 9
"""Equal rows have equal cosines only up to rounding: beyond these digits the smaller id comes first."""


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """One thread per matrix product and factorisation of numpy and scipy. Also a decorator."""
    with _controller().limit(limits=1, user_api="blas"):
        yield


def map_blocks(work: Callable[[slice], T], n_rows: int, block: int) -> list[T]:
    """``work`` of each block of rows, in order of rows, by as many threads as torch may use."""
    slices = [slice(i, min(i + block, n_rows)) for i in range(0, n_rows, block)]
    workers = min(torch.get_num_threads(), len(slices))
    if workers < 2:
        return [work(rows) for rows in slices]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, slices))


@single_threaded_blas()
def nearest_by_cosine(
    coordinates: NDArray[Any], k: int, report: Callable[[float], None] = lambda done: None
) -> NDArray[np.int32]:
    """[V, k] ids of the tokens with the largest cosine, nearest first, without the token itself; -1 for none.

    A token whose coordinates are all zero has no neighbours and is nobody's. Equal cosines: the smaller id first.
    Memory: 512 rows of V cosines per thread; float64.
    """
    norms = np.linalg.norm(coordinates.astype(np.float64), axis=1)
    present = np.flatnonzero(norms)
    unit = coordinates[present].astype(np.float64) / norms[present, None]
    n = len(present)
    width = min(k, max(n - 1, 0))
    table = np.full((len(coordinates), k), -1, dtype=np.int32)
    handicap = np.arange(n) * (0.4 * 10.0**-COSINE_DECIMALS / max(n, 1))  # less than the last digit: decides ties only
    if width == 0:
        return table

    def of_rows(rows: slice) -> NDArray[np.int64]:
        cosine = np.round(unit[rows] @ unit.T, COSINE_DECIMALS) - handicap  # [B, n]
        cosine[np.arange(rows.stop - rows.start), np.arange(rows.start, rows.stop)] = -np.inf
        report(rows.stop / n)
        return largest(cosine, width)

    table[present, :width] = present[np.concatenate(map_blocks(of_rows, n, NEIGHBOUR_ROWS))]
    return table


def largest(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """[B, k] columns of the largest of ``scores`` [B, n], largest first."""
    n = scores.shape[1]
    kept = np.argpartition(scores, n - k, axis=1)[:, n - k :]  # [B, k]
    order = np.argsort(-np.take_along_axis(scores, kept, axis=1), axis=1)
    return np.take_along_axis(kept, order, axis=1)
