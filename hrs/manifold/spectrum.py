"""Coordinates of tokens from how strongly they are coupled where they came to rest.

``clean``: the scalar stiffness of a pair is minus the mean diagonal entry of the d x d block of the energy's Hessian,
clipped at zero::

    k_ab = max(0, 4 w_ab + 0.6 |D_ab| / d - q_ab (1 - 3/d) / r_ab^3)

a graph with non-negative weights. Every pair of coupled tokens is also coupled by mean strength / number of tokens, or
the softest modes would each show a few tokens that hang on a thread (Zhang & Rohe 2018). The soft modes of the
normalised Laplacian, the constant one left out, times 1 - eigenvalue are the coordinates: a diffusion map (Coifman &
Lafon 2006) after one step, in the symmetric form. Tokens without any coupling have zeros there.

``as_built``: K_ab = 2 w_ab + 0.1 m_a m_b + 0.3 d_ab + 1/r_ab^3, eigenvectors of the largest eigenvalues times
sqrt |eigenvalue|.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh

from hrs.config.manifold import GeometryConfig
from hrs.manifold.blocks import largest, map_blocks, single_threaded_blas
from hrs.manifold.energy import DIRECTED, GRAVITY, active_asymmetry, among, charges, linked_tokens
from hrs.manifold.forces import Forces
from hrs.manifold.physics import Report, silent

DIRECTIONAL_SHARE, SYNTACTIC_SHARE = 0.5, 0.3
"""Standard deviation of these coordinates as a share of the spectral ones'."""
AS_BUILT_FLOOR = 1e-8
NEAREST = 64
"""With ``partners > 0`` the original's 1/r^3 is kept for so many nearest tokens of each."""
ROWS, EDGES = 512, 65_536
EIGEN_TOLERANCE = 1e-9
DENSE_MODES = 2048
"""Up to so many tokens all eigenvectors are computed at once: faster than Lanczos for hundreds of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Coordinates before rounding. N = modes + directional + syntactic."""

    coordinates: NDArray[np.float64]
    """[V, N]: spectral | directional | syntactic."""
    eigenvalues: NDArray[np.float64]
    """[modes]: of the normalised Laplacian, ascending (1 where there are fewer modes); or of K, descending."""


@single_threaded_blas()
def spectral_coordinates(
    forces: Forces, positions: NDArray[np.float64], config: GeometryConfig, report: Report = silent
) -> Spectrum:
    """Modes of the coupling at ``positions`` [V, d], and beside them the coordinates that ``forces`` brings along."""
    if config.definition == "as_built":
        values, spectral = _as_built_modes(forces, positions, config, report)
    else:
        tokens = linked_tokens(forces)
        spectral = np.zeros((len(positions), config.modes))
        values, spectral[tokens] = _soft_modes(stiffness(among(forces, tokens), positions[tokens]), config)
    report("spectrum", 1.0, f"eigenvalues {values[0]:.4g} to {values[-1]:.4g}")
    parts = [spectral]
    for part, share in ((forces.directional, DIRECTIONAL_SHARE), (forces.syntactic, SYNTACTIC_SHARE)):
        spread = part.std() if part.size else 0.0
        parts.append(part * (share * spectral.std() / spread) if spread > 0 else np.zeros_like(part))
    return Spectrum(np.concatenate(parts, axis=1), values)


# ---- clean -----------------------------------------------------------------------------------------------------------


def stiffness(forces: Forces, positions: NDArray[np.float64]) -> scipy.sparse.csr_array:
    """k [V, V], symmetric with zero diagonal; only pairs with a spring or directed spring can be above zero.

    ``forces`` of the tokens that took part, at their ``positions`` [V, d].
    """
    dimensions = positions.shape[1]
    attraction = (4 * forces.springs + 2 * DIRECTED / dimensions * abs(forces.directed)).tocoo()
    torsion, mass = active_asymmetry(forces), forces.mass

    def of_edges(part: slice) -> NDArray[np.float64]:
        a, b = attraction.row[part], attraction.col[part]
        apart = positions[a] - positions[b]  # [B, d]
        r2 = np.einsum("nd,nd->n", apart, apart)
        charge = charges(torsion[a], mass[a], torsion[b], mass[b])
        repulsion = charge * (1 - 3 / dimensions) / np.maximum(r2, AS_BUILT_FLOOR) ** 1.5
        return np.maximum(attraction.data[part] - repulsion, 0.0)

    parts = map_blocks(of_edges, attraction.nnz, EDGES)
    values = np.concatenate(parts) if parts else np.zeros(0)
    coupled = scipy.sparse.csr_array((values, (attraction.row, attraction.col)), shape=attraction.shape)
    coupled = (0.5 * (coupled + coupled.T)).tocsr()  # exactly symmetric
    coupled.eliminate_zeros()
    return coupled


def _soft_modes(
    coupling: scipy.sparse.csr_array, config: GeometryConfig
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues [modes] of the normalised Laplacian after the constant mode, and coordinates [V, modes].

    Columns have mean square (1 - eigenvalue)^2 over the tokens that are coupled at all, whatever the vocabulary.
    """
    strength = np.asarray(coupling.sum(axis=1)).ravel()
    inside = np.flatnonzero(strength)
    n, modes = len(inside), min(config.modes, len(inside) - 1)
    values = np.ones(config.modes)
    coordinates = np.zeros((coupling.shape[0], config.modes))
    if modes < 1:
        return values, coordinates
    ground = strength[inside].mean()  # of each token with all together
    root = 1 / np.sqrt(strength[inside] + ground)
    linked = (scipy.sparse.diags_array(root) @ coupling[inside][:, inside] @ scipy.sparse.diags_array(root)).tocsr()
    if n <= DENSE_MODES:
        affinity, vectors = _largest_modes(linked.toarray() + ground / n * np.outer(root, root), modes + 1)
    else:
        affinity, vectors = _lanczos(lambda x: linked @ x + ground / n * np.dot(root, x) * root, n, modes + 1)
    affinity, vectors = affinity[1:], vectors[:, 1:]  # [modes], [n, modes]
    values[:modes] = 1 - affinity
    coordinates[inside, :modes] = vectors * (np.sqrt(n) * affinity)
    return values, coordinates


# ---- as built --------------------------------------------------------------------------------------------------------


def as_built_coupling(forces: Forces, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """K [V, V], dense."""
    mass = forces.mass
    coupling = 2 * forces.springs.toarray() + DIRECTED * forces.directed.toarray() + GRAVITY * np.outer(mass, mass)
    squares = np.einsum("vd,vd->v", positions, positions)
    for start in range(0, len(mass), ROWS):
        rows = slice(start, start + ROWS)
        r2 = squares[rows, None] + squares - 2 * (positions[rows] @ positions.T)
        coupling[rows] += np.maximum(r2, AS_BUILT_FLOOR**2) ** -1.5
    np.fill_diagonal(coupling, 0.0)
    return 0.5 * (coupling + coupling.T)


def _as_built_modes(
    forces: Forces, positions: NDArray[np.float64], config: GeometryConfig, report: Report
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues [modes], descending, and coordinates [V, modes]."""
    if config.partners == 0 or len(positions) <= DENSE_MODES:
        values, vectors = _largest_modes(as_built_coupling(forces, positions), config.modes)
    else:
        near = _near_repulsion(positions, report)
        local = (2 * forces.springs + DIRECTED * forces.directed + near).tocsr()
        mass = forces.mass

        def coupled(x: NDArray[np.float64]) -> NDArray[np.float64]:
            gravity = mass * np.dot(mass, x) - mass**2 * x  # without the diagonal
            product: NDArray[np.float64] = local @ x + GRAVITY * gravity
            return product

        values, vectors = _lanczos(coupled, len(mass), config.modes)
    return values, vectors * np.sqrt(np.abs(values))


def _near_repulsion(positions: NDArray[np.float64], report: Report) -> scipy.sparse.csr_array:
    """1/r^3 [V, V] of pairs of which one is among the other's 64 nearest."""
    n = len(positions)
    width = min(NEAREST, n - 1)
    squares = np.einsum("vd,vd->v", positions, positions)

    def of_rows(rows: slice) -> NDArray[np.int64]:
        closeness = 2 * (positions[rows] @ positions.T) - squares  # [B, V], -r^2 up to a constant of the row
        closeness[np.arange(rows.stop - rows.start), np.arange(rows.start, rows.stop)] = -np.inf
        report("spectrum", 0.5 * rows.stop / n, "nearest tokens")
        return largest(closeness, width)

    near = np.concatenate(map_blocks(of_rows, n, ROWS)).ravel()
    tokens = np.repeat(np.arange(n), width)

    def of_edges(part: slice) -> NDArray[np.float64]:
        apart = positions[tokens[part]] - positions[near[part]]
        return np.maximum(np.linalg.norm(apart, axis=1), AS_BUILT_FLOOR) ** -3

    values = np.concatenate(map_blocks(of_edges, len(near), EDGES))
    repulsion = scipy.sparse.csr_array((values, (tokens, near)), shape=(n, n))
    return repulsion.maximum(repulsion.T)


# ---- eigenvectors ----------------------------------------------------------------------------------------------------


def _largest_modes(matrix: NDArray[np.float64], modes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Algebraically largest eigenvalues [modes], descending, and vectors [n, modes] of a dense symmetric matrix."""
    n = len(matrix)
    values, vectors = scipy.linalg.eigh(matrix, subset_by_index=(n - modes, n - 1), overwrite_a=True)
    return values[::-1], fixed_signs(vectors[:, ::-1])


def _lanczos(
    product: Callable[[NDArray[np.float64]], NDArray[np.float64]], n: int, modes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same of a large matrix [n, n] that is known by its product with a vector [n]; ARPACK from a fixed start."""
    matrix = LinearOperator((n, n), matvec=lambda x: product(x.ravel()), dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(n)
    values, vectors = eigsh(matrix, k=modes, which="LA", v0=start, tol=EIGEN_TOLERANCE)
    order = np.argsort(-values, kind="stable")
    return values[order], fixed_signs(vectors[:, order])


def fixed_signs(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns with their largest-magnitude entry positive; the first one where several are equal up to rounding."""
    leading = np.round(np.abs(vectors), 8).argmax(axis=0)
    return vectors * np.where(vectors[leading, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
