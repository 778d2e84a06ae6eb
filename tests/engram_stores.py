"""Engram stores of random keys, and what their searches must give."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrs.retrieval.store import EngramStore, Hit, NewMemory

WIDTH = 4
Keys = NDArray[np.float32]


def opened(folder: Path, width: int = WIDTH, **more: Any) -> EngramStore:
    return EngramStore.open(folder, **{"fingerprint": "0123", "width": width, **more})


def texts(n: int, start: int = 0) -> list[NewMemory]:
    return [NewMemory(f"text {i}", i / 2, f"source {i % 3}", f"topic {i % 2}") for i in range(start, start + n)]


def random_keys(n: int, width: int = WIDTH, seed: int = 0) -> Keys:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def cosines(queries: NDArray[Any], keys: NDArray[Any]) -> NDArray[np.float64]:
    """[Q, n] in float64; NaN where a vector is zero."""
    a, b = queries.astype(np.float64), keys.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


def names(hits: list[Hit]) -> list[str]:
    return [hit.memory.text for hit in hits]


def log_of(folder: Path) -> Path:
    (path,) = folder.glob("log-*.bin")
    return path
