"""L-BFGS on functions whose minimum is known."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from hrs.manifold.descent import descend

Positions = NDArray[np.float64]
NARROW = np.geomspace(1, 1000, 24).reshape(8, 3)


def bowl(x: Positions) -> tuple[float, Positions]:
    return 1 + float((NARROW * (x - 0.5) ** 2).sum()), 2 * NARROW * (x - 0.5)


def valley(x: Positions) -> tuple[float, Positions]:
    """Rosenbrock's, curved and not convex, with its minimum 1 at (1, 1)."""
    (a, b) = x[0]
    slope = [-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)]
    return 1 + float((1 - a) ** 2 + 100 * (b - a * a) ** 2), np.array([slope])


@pytest.mark.parametrize(
    ("energy", "start", "end"),
    [(bowl, np.zeros((8, 3)), np.full((8, 3), 0.5)), (valley, np.array([[-1.2, 1.0]]), np.ones((1, 2)))],
)
def test_it_comes_to_rest_at_the_minimum_as_fast_as_scipys(energy, start, end) -> None:  # type: ignore[no-untyped-def]
    energies: list[float] = []
    x, converged = descend(start, energy, 500, 1e-9, energies.append)
    assert converged and np.abs(x - end).max() < 1e-3
    assert (np.diff(energies) <= 0).all() and energies[-1] == energy(x)[0]

    def flat(x: Positions) -> tuple[float, Positions]:
        value, gradient = energy(x.reshape(start.shape))
        return value, gradient.ravel()

    theirs = minimize(flat, start.ravel(), jac=True, method="L-BFGS-B", options={"ftol": 1e-9, "gtol": 0.0})
    assert len(energies) < 1.5 * theirs.nit + 5


def test_steps_that_run_out_are_admitted() -> None:
    energies: list[float] = []
    _, converged = descend(np.zeros((8, 3)), bowl, 3, 1e-9, energies.append)
    assert not converged and len(energies) == 3


def test_at_the_minimum_nothing_moves() -> None:
    energies: list[float] = []
    x, converged = descend(np.full((8, 3), 0.5), bowl, 10, 1e-9, energies.append)
    assert converged and energies == [] and np.array_equal(x, np.full((8, 3), 0.5))


def test_a_gradient_that_is_wrong_ends_the_descent() -> None:
    """No step along it lowers the energy: the search gives up instead of climbing."""
    energies: list[float] = []
    x, _ = descend(np.zeros((8, 3)), lambda x: (bowl(x)[0], -bowl(x)[1]), 10, 1e-9, energies.append)
    assert energies == [] and not x.any()
