"""Making keys comparable: mean hidden states share a large common part, and cosines of them are all alike.

``centred`` subtracts the mean key. ``whitened`` also divides by the square root of the keys' covariance, so that no
direction counts more than another (Su et al. 2021, arXiv 2103.15316). The covariance is shrunk towards a multiple of
the identity (Ledoit & Wolf 2004), which makes it invertible with fewer keys than dimensions.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Normalisation = Literal["none", "centred", "whitened"]
Floats = NDArray[np.float64]
Keys = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """An affine map of keys, x -> (x - mean) matrix."""

    version: int = 0
    """0 for keys as they are; one more with every fit."""
    mean: Floats | None = None
    """[d]"""
    matrix: Floats | None = None
    """[d, d]; None for the identity."""

    def apply(self, keys: Keys) -> Floats:
        """[n, d] transformed keys [n, d]."""
        centred = keys.astype(np.float64) if self.mean is None else keys - self.mean
        return centred if self.matrix is None else centred @ self.matrix

    def directions(self, keys: Keys) -> tuple[Floats, Floats]:
        """Unit vectors [n, d] of the transformed keys, and the norms [n] they had; both zero for a zero key."""
        moved = self.apply(keys)
        largest = np.abs(moved).max(axis=1, initial=0.0)  # squares of very small or large numbers leave the range
        scaled = moved / np.where(largest > 0, largest, 1.0)[:, None]
        norms = np.sqrt((scaled * scaled).sum(axis=1))
        return scaled / np.where(norms > 0, norms, 1.0)[:, None], norms * largest

    def pull_back(self, directions: Floats) -> Floats:
        """[n, d], r with r . (key - mean) = direction . transformed key."""
        return directions if self.matrix is None else directions @ self.matrix.T

    def centre(self, keys: Keys) -> Floats:
        """[n, d] keys less the mean."""
        return keys.astype(np.float64) if self.mean is None else keys - self.mean


def fit_transform(batches: Callable[[], Iterable[Keys]], normalisation: Normalisation, version: int) -> Transform:
    """The transform that centres or whitens the keys that ``batches()`` yields in pieces [n, d]; read twice.

    Needs one key at least.
    """
    count, total = 0, np.zeros(())
    for keys in batches():
        count += len(keys)
        total = total + keys.sum(axis=0, dtype=np.float64)
    mean = total / count
    if normalisation == "centred":
        return Transform(version, mean)
    covariance = shrunk_covariance((keys - mean for keys in batches()), len(mean))
    values, vectors = np.linalg.eigh(covariance)
    # Equal keys have no covariance at all, and every direction is as good.
    scale = np.ones_like(values) if values[-1] <= 0 else values.clip(values[-1] * np.finfo(np.float64).eps)
    return Transform(version, mean, vectors / np.sqrt(scale))


def shrunk_covariance(centred: Iterable[Floats], width: int) -> Floats:
    """[d, d], (1 - s) S + s m I of centred rows in pieces [n, d], with the shrinkage s of Ledoit & Wolf (2004).

    S is the covariance, m its mean eigenvalue.
    """
    count, fourth, products = 0, 0.0, np.zeros((width, width))
    for rows in centred:
        count += len(rows)
        fourth += float(((rows * rows).sum(axis=1) ** 2).sum())
        products += rows.T @ rows
    covariance = products / count
    target = np.trace(covariance) / width * np.eye(width)
    distance = float(((covariance - target) ** 2).sum())
    error = (fourth / count - float((covariance**2).sum())) / count
    shrinkage = min(max(error / distance, 0.0), 1.0) if distance > 0 else 0.0
    return (1 - shrinkage) * covariance + shrinkage * target
