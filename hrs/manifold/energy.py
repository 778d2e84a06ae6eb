"""The energy of positions and its gradient, three ways: over all pairs, from random tokens, and as originally sampled.

The energy of positions x [V, d], with r_ab = ||x_a - x_b|| and sums over unordered pairs of tokens::

    E = sum 2 w_ab r_ab^2                                   springs between tokens that keep company
      + sum q_ab / r_ab                                     q = 1 + 0.5 t_a t_b - 0.1 m_a m_b
      + 0.3 sum |D_ab| ((x_b - x_a).g - 0.1 sign D_ab)^2    directed springs: what comes later sits further along g
      + 0.001 sum ||x_a||^2                                 confinement, so that islands of tokens stay

m is the mass, t the asymmetry where it is above its median and 0 elsewhere, g the first axis. Distances under 1/r are
floored at 1e-4, where the force is zero. Tokens without any spring take no part: nothing would hold them, and in a
large vocabulary they are many. The original has no last term, its D is symmetric and pulls like a spring, and all its
tokens take part.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from hrs.config.manifold import GeometryConfig
from hrs.manifold.blocks import map_blocks
from hrs.manifold.exact import exact_product, snapped
from hrs.manifold.forces import Forces

Array = NDArray[Any]
Indices = tuple[NDArray[np.int64], ...]
Energy = Callable[[Array], tuple[float, Array]]
"""Positions [V, d] -> the energy and its gradient [V, d]."""

TORSION, GRAVITY, DIRECTED = 0.5, 0.1, 0.3
STEP_ALONG_AXIS = 0.1
CONFINEMENT = 1e-3
FLOOR = 1e-4

DENSE_ROWS, SAMPLED_ROWS = 256, 512
SAMPLE = 512
"""Tokens whose repulsion all others feel in one step of the sampled energy."""
SPRING_DRAWS, PAIR_DRAWS, TORSION_DRAWS, DIRECTED_DRAWS = 200_000, 80_000, 2_000, 100_000
"""Pairs that the original draws per step."""


def linked_tokens(forces: Forces) -> NDArray[np.int64]:
    """Ids, ascending, of the tokens with a spring or a directed spring."""
    return np.flatnonzero(np.diff(forces.springs.indptr) + np.diff(forces.directed.indptr))


def among(forces: Forces, tokens: NDArray[np.int64]) -> Forces:
    """The forces of and between some tokens, in their order."""
    return Forces(
        springs=forces.springs[tokens][:, tokens],
        asymmetry=forces.asymmetry[tokens],
        directional=forces.directional[tokens],
        mass=forces.mass[tokens],
        directed=forces.directed[tokens][:, tokens],
        syntactic=forces.syntactic[tokens],
    )


def active_asymmetry(forces: Forces) -> NDArray[np.float64]:
    """[V], the asymmetry of tokens above the median and 0 for the others."""
    return np.where(forces.asymmetry > np.median(forces.asymmetry), forces.asymmetry, 0.0)


def charges(torsion: Array, mass: Array, torsion_of_others: Array, mass_of_others: Array) -> Array:
    """q, the coefficients of 1/r, of tokens with others, broadcast; ``torsion`` is the :func:`active_asymmetry`."""
    charge = (TORSION * torsion) * torsion_of_others
    charge -= (GRAVITY * mass) * mass_of_others
    charge += 1
    return np.asarray(charge)


# ---- all pairs -------------------------------------------------------------------------------------------------------


def exact_energy(forces: Forces) -> Energy:
    """The energy over all pairs, the same bits on every processor. Holds two dense V x V matrices."""
    attraction = 2 * forces.springs.toarray()
    torsion, mass = active_asymmetry(forces), forces.mass
    charge = charges(torsion[:, None], mass[:, None], torsion, mass)
    by_token = _directed_and_confined(forces)

    def energy(x: Array) -> tuple[float, Array]:
        pairs, gradient = pairwise(x, attraction, charge)
        tokens, more = by_token(x)
        return pairs + tokens, gradient + more

    return energy


def pairwise(x: Array, attraction: Array, repulsion: Array) -> tuple[float, Array]:
    """Energy and gradient [V, d] of (1/2) sum over ordered pairs of A_ab r_ab^2 + R_ab / r_ab.

    Both the same bits on every processor. So positions are rounded to multiples of 2^-20 and a row of the force per
    distance to 2^-30 of its sum of magnitudes, about.

    Args:
        x: [V, d] positions.
        attraction: A, [V, V] symmetric, zero diagonal.
        repulsion: R, [V, V] symmetric; its diagonal is not looked at.
    """
    x, bits = snapped(x)
    squares = np.einsum("vd,vd->v", x, x)

    def of_rows(rows: slice) -> tuple[float, Array]:
        r2, inverse, floored = _distances(x[rows], x, squares[rows], squares)  # [B, V]
        own = np.arange(rows.stop - rows.start), np.arange(rows.start, rows.stop)
        r2[own] = inverse[own] = 0.0
        repelled = repulsion[rows] * inverse
        r2 *= attraction[rows]
        r2 += repelled
        energy = 0.5 * r2.sum()
        inverse *= inverse
        repelled *= inverse
        repelled[floored] = 0.0
        pull = 2 * attraction[rows] - repelled  # [B, V]
        total, pulled = exact_product(pull, x, bits)
        return float(energy), total * x[rows] - pulled

    parts = map_blocks(of_rows, len(x), DENSE_ROWS)
    return sum(energy for energy, _ in parts), np.concatenate([gradient for _, gradient in parts])


def _distances(x: Array, others: Array, squares: Array, squares_of_others: Array) -> tuple[Array, Array, Indices]:
    """r^2 [A, B], floored, and 1/r [A, B] of snapped positions [A, d] and [B, d], and where the floor was reached."""
    r2 = x @ (-2 * others).T
    r2 += squares[:, None]
    r2 += squares_of_others  # exact up to here
    floored = np.nonzero(r2 <= FLOOR**2)
    r2[floored] = FLOOR**2
    inverse = np.sqrt(r2)
    np.divide(1, inverse, out=inverse)
    return r2, inverse, floored


def _directed_and_confined(forces: Forces) -> Energy:
    """Energy and gradient [V, d] of the directed springs and the confinement.

    With p = x.g, over ordered pairs: 0.15 sum |D| (p_b - p_a)^2 - 2 delta D (p_b - p_a) + delta^2 |D|.
    """
    directed = forces.directed.tocoo()
    strength = abs(directed.data)
    degree, lead = (  # lead: sum_b D_ab, positive for tokens that come first
        np.bincount(directed.row, weights, minlength=len(forces.mass)) for weights in (strength, directed.data)
    )
    constant = 0.5 * STEP_ALONG_AXIS**2 * degree.sum()

    def energy(x: Array) -> tuple[float, Array]:
        p = x[:, 0].astype(np.float64)
        partners = np.bincount(directed.row, strength * p[directed.col], minlength=len(p))
        pulled = degree * p - partners  # [V]
        gradient = 2 * CONFINEMENT * x
        gradient[:, 0] += 2 * DIRECTED * (pulled + STEP_ALONG_AXIS * lead)
        ordered = (p * pulled).sum() + 2 * STEP_ALONG_AXIS * (p * lead).sum() + constant
        return float(DIRECTED * ordered + CONFINEMENT * (x * x).sum(dtype=np.float64)), gradient

    return energy


# ---- random tokens: the same energy for large vocabularies -----------------------------------------------------------


def sampled_energy(forces: Forces, draw: np.random.Generator) -> Energy:
    """An estimate of :func:`exact_energy` and of its gradient, both unbiased, in time V * 512 * d.

    Positions and gradients are float32, but pairs are looked at in float64 and rounded as in :func:`pairwise`.

    All tokens feel the same block of random tokens, scaled up. Only the force on each token is estimated so, not its
    reaction on the block, which would be rare and huge. Blocks are cut from one permutation after another: every token
    repels equally often.
    """
    n_tokens = len(forces.mass)
    springs = forces.springs.astype(np.float32)
    stiffness = np.asarray(springs.sum(axis=1), dtype=np.float32).reshape(-1, 1)  # [V, 1]
    torsion, mass = active_asymmetry(forces), forces.mass
    by_token = _directed_and_confined(forces)
    waiting = np.zeros(0, dtype=np.int64)

    def energy(x: Array) -> tuple[float, Array]:
        nonlocal waiting
        size = min(SAMPLE, n_tokens)
        if len(waiting) < size:
            waiting = draw.permutation(n_tokens)
        block, waiting = np.sort(waiting[:size]), waiting[size:]
        places, bits = snapped(x)
        squares = np.einsum("vd,vd->v", places, places)
        others = places[block]

        def of_rows(rows: slice) -> tuple[float, float, Array]:
            _, inverse, floored = _distances(places[rows], others, squares[rows], squares[block])  # [B, m]
            scale = np.full((len(inverse), 1), (n_tokens - 1) / size)
            column = np.flatnonzero((block >= rows.start) & (block < rows.stop))
            scale[block[column] - rows.start] = (n_tokens - 1) / max(size - 1, 1)
            inverse[block[column] - rows.start, column] = 0.0
            repelled = charges(torsion[rows, None], mass[rows, None], torsion[block], mass[block])
            repelled *= inverse
            by_pairs = 0.5 * float((repelled.sum(axis=1, keepdims=True) * scale).sum())
            inverse *= inverse
            repelled *= inverse
            repelled[floored] = 0.0
            total, pushed = exact_product(repelled, others, bits)
            pushed -= total * places[rows]
            pushed *= scale
            stretched = stiffness[rows] * x[rows] - springs[rows] @ x  # [B, d]
            by_springs = 2 * float((x[rows] * stretched).sum(dtype=np.float64))
            return by_pairs, by_springs, 4 * stretched + pushed.astype(np.float32)

        parts = map_blocks(of_rows, n_tokens, SAMPLED_ROWS)
        tokens, gradient = by_token(x)
        gradient += np.concatenate([part for _, _, part in parts])
        return tokens + sum(a + b for a, b, _ in parts), gradient

    return energy


# ---- as originally sampled -------------------------------------------------------------------------------------------


def as_built_energy(forces: Forces, draw: np.random.Generator, config: GeometryConfig) -> Energy:
    """The original's energy: every call draws its pairs anew, with replacement, as many as the original.

    Expected values: 2 sum w r^2, sum 1/r, -0.1 sum m m / r and 0.6 sum d r^2 over unordered pairs. Torsion is drawn
    from pairs of tokens above the median and, as there, not scaled up.
    """
    n_tokens = len(forces.mass)
    springs, directed = forces.springs.tocoo(), forces.directed.tocoo()  # both directions are listed
    active = np.flatnonzero(active_asymmetry(forces))
    scale = n_tokens * (n_tokens - 1) / 2 / PAIR_DRAWS
    of_pairs = _pairs_densely if config.partners == 0 else _pairs_one_by_one

    def edges(graph: scipy.sparse.coo_array, n_draws: int, factor: float) -> tuple[Array, Array, Array]:
        n = min(n_draws, graph.nnz)
        chosen = draw.integers(graph.nnz, size=n) if n else np.zeros(0, dtype=np.int64)
        return graph.row[chosen], graph.col[chosen], factor * graph.nnz / max(n, 1) * graph.data[chosen]

    def pairs(among: Array, n_draws: int) -> tuple[Array, Array]:
        a = draw.integers(len(among), size=n_draws)
        b = (a + draw.integers(1, len(among), size=n_draws)) % len(among)  # another token
        return among[a], among[b]

    def energy(x: Array) -> tuple[float, Array]:
        attract = [edges(springs, SPRING_DRAWS, 1.0), edges(directed, DIRECTED_DRAWS, DIRECTED)]
        everyone = np.arange(n_tokens)
        a, b = pairs(everyone, PAIR_DRAWS)
        repel = [(a, b, np.full(PAIR_DRAWS, scale))]
        a, b = pairs(everyone, PAIR_DRAWS)
        repel.append((a, b, -GRAVITY * scale * forces.mass[a] * forces.mass[b]))
        if len(active) > 1:
            a, b = pairs(active, min(TORSION_DRAWS, len(active) * (len(active) - 1) // 2))
            repel.append((a, b, TORSION * forces.asymmetry[a] * forces.asymmetry[b]))
        return of_pairs(x, _joined(attract), _joined(repel))

    return energy


Weighted = tuple[Array, Array, Array]
"""(first tokens [n], second tokens [n], weights [n])."""


def _joined(lists: list[Weighted]) -> Weighted:
    a, b, weights = (np.concatenate(column) for column in zip(*lists, strict=True))
    return a, b, weights


def _pairs_densely(x: Array, attract: Weighted, repel: Weighted) -> tuple[float, Array]:
    """sum A r^2 + sum R / r over listed pairs, by two V x V matrices: faster when most pairs are drawn anyway."""
    n = len(x)

    def symmetric(listed: Weighted) -> Array:
        a, b, weights = listed
        matrix = np.bincount(a.astype(np.int64) * n + b, weights=weights, minlength=n * n).reshape(n, n)
        return matrix + matrix.T

    return pairwise(x, symmetric(attract), symmetric(repel))


def _pairs_one_by_one(x: Array, attract: Weighted, repel: Weighted) -> tuple[float, Array]:
    """The same without V x V matrices."""
    x, _ = snapped(x)

    def r2_of(listed: Weighted) -> Array:
        a, b, _ = listed
        parts = map_blocks(lambda part: np.einsum("nd,nd->n", *[x[a[part]] - x[b[part]]] * 2), len(a), SAMPLED_ROWS)
        return np.concatenate(parts) if parts else np.zeros(0)

    stretched, (_, _, stiffness) = r2_of(attract), attract
    apart, (_, _, charge) = r2_of(repel), repel
    inverse = 1 / np.sqrt(np.maximum(apart, FLOOR**2))
    energy = (stiffness * np.maximum(stretched, FLOOR**2)).sum() + (charge * inverse).sum()
    pushed = np.where(apart <= FLOOR**2, 0.0, charge * (inverse * inverse * inverse))
    a, b, pull = _joined([(*attract[:2], 2 * stiffness), (*repel[:2], -pushed)])
    matrix = scipy.sparse.coo_array((pull, (a, b)), shape=(len(x), len(x))).tocsr()
    matrix = matrix + matrix.T
    return float(energy), np.asarray(matrix.sum(axis=1)).reshape(-1, 1) * x - matrix @ x
