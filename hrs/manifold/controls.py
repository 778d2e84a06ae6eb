"""Geometries that a manifold must beat: another token's coordinates, Gaussian ones of equal spectrum, none at all."""

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from hrs.errors import HRSError
from hrs.manifold.blocks import nearest_by_cosine, single_threaded_blas
from hrs.models.geometry import TokenGeometry

Source = Literal["corpus", "permuted", "random", "none"]


def controlled(geometry: TokenGeometry, source: Source, seed: int) -> TokenGeometry:
    """The geometry itself (``corpus``) or a control of the same shapes, drawn from ``seed``.

    ``permuted``: token a has the coordinates of token pi(a), and the neighbours that go with them. ``random``: Gaussian
    directions with the corpus's singular values and column covariance; which token is where says nothing. ``none``:
    zeros and -1.

    Raises:
        HRSError: if the source is unknown.
    """
    draw = np.random.default_rng(seed)
    coordinates, neighbours = geometry.coordinates, geometry.neighbours
    if source == "corpus":
        return geometry
    if source == "none":
        return TokenGeometry(torch.zeros_like(coordinates), torch.full_like(neighbours, -1))
    if source == "permuted":
        permutation = torch.from_numpy(draw.permutation(len(coordinates)))  # pi
        holder = torch.argsort(permutation)  # who has the coordinates of each token now
        theirs = neighbours[permutation]
        return TokenGeometry(coordinates[permutation], torch.where(theirs < 0, theirs, holder[theirs.clamp_min(0)]))
    if source == "random":
        drawn = gaussian_with_spectrum(coordinates.numpy(), draw)
        nearest = nearest_by_cosine(drawn, neighbours.shape[1])
        return TokenGeometry(torch.from_numpy(drawn), torch.from_numpy(nearest.astype(np.int64)))
    raise HRSError(f"unknown source '{source}': choose one of {', '.join(get_args(Source))}")


@single_threaded_blas()
def gaussian_with_spectrum(matrix: NDArray[np.float32], draw: np.random.Generator) -> NDArray[np.float32]:
    """[V, N] with the singular values and the right singular vectors of ``matrix``, the left ones drawn anew.

    So matrix^T matrix stays: the norms of columns, their correlations, the sum of squares.
    """
    _, singular, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)  # [r], [r, N]
    left, triangle = np.linalg.qr(draw.standard_normal((len(matrix), len(singular))))  # [V, r]
    left *= np.sign(np.diag(triangle))  # uniform over orthonormal frames (Mezzadri 2007)
    return np.asarray((left * singular) @ right, dtype=np.float32)
