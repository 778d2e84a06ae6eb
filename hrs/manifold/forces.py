"""What pulls tokens together and apart: from counts of pairs to springs, torsion, masses and directed springs.

The definitions are those of the manifold-guided network (openai/parameter-golf, pull request 663). ``as_built`` and
``clean`` differ in the directed springs alone. All arithmetic is float64. Logarithms are natural and rounded to
multiples of 2^-20, as their last bits depend on the processor.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, eigsh

from hrs.config.manifold import GeometryConfig
from hrs.manifold.blocks import single_threaded_blas
from hrs.manifold.exact import rounded
from hrs.manifold.statistics import NARROW, WEIGHT_UNIT, WIDE, Counts

PPMI_THRESHOLD = 0.5
PPMI_EPSILON = 1e-8
FEW_SUCCESSORS = 10
"""A token followed by fewer tokens than this counts as unpredictable."""
DIRECTED_PERCENTILE = 90
DIRECTED_PRIOR = 10
"""Weight of evidence that a pair has no order, for the clean directed springs."""
LEAST_PAIRS = 10
"""Times a pair must occur, in both orders together and at a mean offset, where only the strongest partners are kept:
rare pairs have the highest PPMI."""
EXACT_TOKENS = 8192
"""Largest vocabulary whose singular vectors are found to machine precision: seconds there, minutes far above."""
OVERSAMPLING, POWER_STEPS = 8, 4
"""Of the randomised decomposition for larger vocabularies."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Forces:
    """V tokens; all float64, nowhere NaN. Matrices are canonical ``csr_array`` [V, V] with a zero diagonal.

    A token that never occurs has empty rows, zero coordinates and the least mass.
    """

    springs: Any
    """Symmetric: sqrt(PPMI) of the pairs that are kept."""
    asymmetry: NDArray[np.float64]
    """[V]: distance of the distributions of a token's left and right neighbours."""
    directional: NDArray[np.float64]
    """[V, directional]: U * Sigma of the left minus the right distributions."""
    mass: NDArray[np.float64]
    """[V], in (0, 1]: 1 / (1 + entropy of the next token), the largest being 1."""
    directed: Any
    """``as_built``: symmetric, by how much the sides of a pair differ. ``clean``: antisymmetric, in (-1, 1), positive
    where the token of the column rather follows that of the row."""
    syntactic: NDArray[np.float64]
    """[V, syntactic]: U * Sigma of the distributions of the previous and of the next token, side by side."""


def compute_forces(counts: Counts, config: GeometryConfig) -> Forces:
    """The forces of ``config.definition``.

    ``config.partners`` = 0 keeps every pair the definition keeps. Above, a pair is kept if it also occurs about
    :data:`LEAST_PAIRS` times and is among the ``partners`` strongest of one of its two tokens. No dense [V, V] array is
    made. Coordinates beyond V - 2 or beyond the rank are zero. ``directional`` and ``syntactic`` are the same for any
    number of threads, but for rounding errors that depend on the processor; all else has the same bits everywhere.
    """
    wide, narrow = (0, 0) if config.partners == 0 else (_least_weight(WIDE), _least_weight(NARROW))
    with single_threaded_blas():
        sides = _shares(counts.forward.T.tocsr()) - _shares(counts.forward)  # left - right
        sides.eliminate_zeros()
        if config.definition == "as_built":
            directed = _directed_as_built(sides, counts.forward, narrow)
        else:
            directed = _directed_clean(counts.forward, narrow)
        bigrams = sparse.hstack([_shares(counts.successors.T.tocsr()), _shares(counts.successors)], format="csr")
        return Forces(
            springs=_strongest(_ppmi(counts.symmetric, wide), config.partners).sqrt(),
            asymmetry=np.sqrt(sides.power(2).sum(axis=1)),
            directional=_coordinates(sides, config.directional),
            mass=_mass(counts.successors),
            directed=_strongest(directed, config.partners),
            syntactic=_coordinates(bigrams, config.syntactic),
        )


def _least_weight(widest: int) -> int:
    """Weight of :data:`LEAST_PAIRS` pairs spread evenly over the offsets up to the widest."""
    return LEAST_PAIRS * sum(WEIGHT_UNIT // offset for offset in range(1, widest + 1)) // widest


def _rows(matrix: Any) -> NDArray[np.int32]:
    """Row of each stored entry of a csr array."""
    return np.repeat(np.arange(matrix.shape[0], dtype=np.int32), np.diff(matrix.indptr))


def _selected(matrix: Any, kept: NDArray[np.bool_], values: NDArray[np.float64]) -> Any:
    """The stored entries that are kept, with other values [number kept]."""
    indptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(kept)])[matrix.indptr]
    return sparse.csr_array((values, matrix.indices[kept], indptr), shape=matrix.shape)


def _shares(matrix: Any) -> Any:
    """Each row divided by its sum; empty rows stay empty."""
    sums = np.asarray(matrix.sum(axis=1), dtype=np.float64)
    return sparse.csr_array((matrix.data / sums[_rows(matrix)], matrix.indices, matrix.indptr), shape=matrix.shape)


def _ppmi(symmetric: Any, least_weight: int) -> Any:
    """Positive pointwise mutual information above the threshold, from [V, V] weights."""
    sums = np.asarray(symmetric.sum(axis=1), dtype=np.float64)
    rows = _rows(symmetric)
    kept = (rows != symmetric.indices) & (symmetric.data >= least_weight)
    weights, pairs = symmetric.data[kept], (rows[kept], symmetric.indices[kept])
    values = rounded(np.log(weights * sums.sum() / (sums[pairs[0]] * sums[pairs[1]]) + PPMI_EPSILON))
    strong = values > PPMI_THRESHOLD
    kept[kept] = strong
    return _selected(symmetric, kept, values[strong])


def _both_orders(forward: Any) -> Any:
    """Weights of pairs whatever their order, without the diagonal."""
    both = forward + forward.T.tocsr()
    kept = _rows(both) != both.indices
    return _selected(both, kept, both.data[kept])


def _directed_as_built(sides: Any, forward: Any, least_weight: int) -> Any:
    """|left - right|, made symmetric by the mean of both orders, where it is above its percentile."""
    difference = abs(sides)
    difference = (difference + difference.T.tocsr()) * 0.5
    if least_weight:
        both = _both_orders(forward)
        often = both.data >= least_weight
        difference = difference.multiply(_selected(both, often, np.ones(int(often.sum())))).tocsr()
    off_diagonal = _rows(difference) != difference.indices
    values = difference.data[off_diagonal]
    threshold = np.percentile(values, DIRECTED_PERCENTILE) if len(values) else 0.0
    kept = off_diagonal & (difference.data > threshold)
    return _selected(difference, kept, difference.data[kept])


def _directed_clean(forward: Any, least_weight: int) -> Any:
    """(F_ab - F_ba) / (F_ab + F_ba + prior): which of two tokens rather comes first, for the pairs that occur."""
    both = _both_orders(forward)
    kept = both.data >= least_weight
    scale = _selected(both, kept, 1 / (both.data[kept] + float(DIRECTED_PRIOR * WEIGHT_UNIT)))
    return (forward - forward.T.tocsr()).multiply(scale).tocsr()


def _strongest(matrix: Any, partners: int) -> Any:
    """The entries that are among the largest ``partners`` absolute values of their row or their column; 0: all."""
    if partners == 0:
        return matrix
    rows = _rows(matrix)
    order = np.lexsort((matrix.indices, -abs(matrix.data), rows))  # of equal values the lower id first
    place = np.arange(matrix.nnz) - matrix.indptr[rows]  # within the row, as the order keeps rows where they are
    kept = np.zeros(matrix.nnz, dtype=bool)
    kept[order[place < partners]] = True
    chosen = _selected(matrix, kept, np.ones(int(kept.sum())))
    either = chosen + chosen.T.tocsr()
    either.data[:] = 1
    return matrix.multiply(either).tocsr()


def _mass(successors: Any) -> NDArray[np.float64]:
    shares = _shares(successors)
    shares.data *= -rounded(np.log(shares.data))
    often = successors.sum(axis=1) >= FEW_SUCCESSORS
    entropy = np.asarray(shares.sum(axis=1))
    mass = 1 / (1 + np.where(often, entropy, entropy[often].max(initial=0.0)))
    return np.asarray(mass / mass.max())


def _coordinates(matrix: Any, n_columns: int) -> NDArray[np.float64]:
    """U * Sigma of the largest ``n_columns`` singular values; the largest absolute entry of each column is positive.

    Lanczos iteration from a fixed start; for large vocabularies subspace iteration from a fixed Gaussian block (Halko,
    Martinsson and Tropp 2011), which is near where singular values fall and a mixture of neighbours where they do not.
    """
    n_rows = matrix.shape[0]
    rank = min(n_columns, n_rows - 2)
    coordinates = np.zeros((n_rows, n_columns))
    if rank < 1 or matrix.nnz == 0:
        return coordinates
    transpose, draw = matrix.T, np.random.default_rng(0)
    if n_rows <= EXACT_TOKENS:
        gram = LinearOperator((n_rows, n_rows), matvec=lambda x: matrix @ (transpose @ x), dtype=np.float64)
        # Where the rank is lower the iteration breaks down and draws new directions.
        _, vectors = eigsh(gram, k=rank, v0=draw.standard_normal(n_rows), rng=draw)
        basis = np.linalg.qr(vectors).Q
    else:
        block = draw.standard_normal((matrix.shape[1], min(n_columns + OVERSAMPLING, n_rows)))
        basis = np.linalg.qr(matrix @ block).Q
        for _ in range(POWER_STEPS):
            basis = np.linalg.qr(matrix @ (transpose @ basis)).Q
    _, sigma, mixture = np.linalg.svd(transpose @ basis, full_matrices=False)
    sigma[sigma <= sigma[0] * n_rows * np.finfo(np.float64).eps] = 0.0
    coordinates[:, :rank] = ((basis @ mixture.T) * sigma)[:, :rank]
    size = abs(coordinates) / np.maximum(abs(coordinates).max(axis=0), np.finfo(np.float64).tiny)
    leading = np.round(size, 8).argmax(axis=0)[None, :]  # the first where several are equal up to rounding
    return np.where(np.take_along_axis(coordinates, leading, axis=0) < 0, -coordinates, coordinates)
