"""Random forces of few tokens and their energy, one pair after another: what fast code is compared with."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from hrs.manifold.forces import Forces

N, D = 24, 7


def some_forces(n: int = N, seed: int = 0, symmetric_directed: bool = False) -> Forces:
    """Random forces of n tokens; the last token has neither spring nor directed spring."""
    draw = np.random.default_rng(seed)

    def graph(density: float, sign: int) -> sparse.csr_array:
        upper = np.triu(draw.uniform(0.2, 0.9, (n, n)) * (draw.random((n, n)) < density), 1)
        upper *= np.where(draw.random((n, n)) < 0.5, -1, 1) if sign < 0 else 1
        upper[:, -1] = 0.0
        return sparse.csr_array(upper + sign * upper.T)

    return Forces(
        springs=graph(0.3, 1),
        asymmetry=draw.random(n),
        directional=draw.standard_normal((n, 3)),
        mass=draw.uniform(0.1, 1.0, n),
        directed=graph(0.4, 1 if symmetric_directed else -1),
        syntactic=draw.standard_normal((n, 2)),
    )


def positions(n: int = N, d: int = D) -> NDArray[np.float64]:
    return np.random.default_rng(1).standard_normal((n, d))


def energy_by_pairs(x: torch.Tensor, forces: Forces) -> torch.Tensor:
    """The formula of the module, one pair after another."""
    springs, directed = forces.springs.toarray(), forces.directed.toarray()
    tau = np.where(forces.asymmetry > np.median(forces.asymmetry), forces.asymmetry, 0.0)
    total = 1e-3 * (x**2).sum()
    for a in range(len(x)):
        for b in range(a + 1, len(x)):
            r = (x[a] - x[b]).norm().clamp_min(1e-4)
            total = total + 2 * springs[a, b] * r**2 + 1 / r + 0.5 * tau[a] * tau[b] / r
            total = total - 0.1 * forces.mass[a] * forces.mass[b] / r
            order = directed[a, b]
            total = total + 0.3 * abs(order) * (x[b, 0] - x[a, 0] - 0.1 * math.copysign(1.0, order)) ** 2
    return total
