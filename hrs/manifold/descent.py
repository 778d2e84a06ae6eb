"""L-BFGS without a library of linear algebra: the same steps on every processor, if the energy is the same."""

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hrs.manifold.exact import snapped

Positions = NDArray[np.float64]

MEMORY = 10
"""Steps that are remembered for the curvature."""
DECREASE, SLOPE = 1e-4, 0.9
"""Weak Wolfe conditions: a step keeps this share of the decrease its slope promised and leaves at most that slope."""
TRIALS = 20
"""Energies per line search."""


def descend(
    start: Positions,
    energy: Callable[[Positions], tuple[float, Positions]],
    steps: int,
    tolerance: float,
    after_step: Callable[[float], None],
) -> tuple[Positions, bool]:
    """Where at most ``steps`` steps of L-BFGS (Liu & Nocedal 1989) lead, and whether the energy came to rest there.

    It rests when a step lowers it by less than ``tolerance`` of it, or when no step along the gradient lowers it.

    Args:
        start: [V, d].
        energy: positions -> energy and its gradient [V, d].
        after_step: is told the energy after each step.
    """
    x, _ = snapped(start)
    value, gradient = energy(x)
    memory: deque[tuple[Positions, Positions, float]] = deque(maxlen=MEMORY)
    for _ in range(steps):
        found = _search(x, value, gradient, _direction(gradient, memory), energy, first=not memory)
        if found is None and memory:
            memory.clear()
            found = _search(x, value, gradient, -gradient, energy, first=True)
        if found is None:
            return x, True
        before, (moved, value, changed) = value, found
        step, bend = moved - x, changed - gradient
        curvature = inner(step, bend)
        if curvature > 0:
            memory.append((step, bend, curvature))
        x, gradient = moved, changed
        after_step(value)
        if before - value <= tolerance * max(abs(before), abs(value)):
            return x, True
    return x, False


def inner(a: Positions, b: Positions) -> float:
    """Inner product of two arrays of one shape, added in numpy's own order."""
    return float((a * b).sum())


def _direction(gradient: Positions, memory: deque[tuple[Positions, Positions, float]]) -> Positions:
    """Minus the gradient times the inverse Hessian that the remembered steps suggest, by two loops over them."""
    direction = -gradient
    shares = []
    for step, bend, curvature in reversed(memory):
        shares.append(inner(step, direction) / curvature)
        direction -= shares[-1] * bend
    if memory:
        _, bend, curvature = memory[-1]
        direction *= curvature / inner(bend, bend)
    for (step, bend, curvature), share in zip(memory, reversed(shares), strict=True):
        direction += (share - inner(bend, direction) / curvature) * step
    return direction


def _search(
    x: Positions,
    value: float,
    gradient: Positions,
    direction: Positions,
    energy: Callable[[Positions], tuple[float, Positions]],
    *,
    first: bool,
) -> tuple[Positions, float, Positions] | None:
    """Positions, energy and gradient after a step that meets the weak Wolfe conditions, by bisection.

    None if none lowers the energy. The first step is as long as the positions' grid allows and then doubles.
    """
    slope = inner(gradient, direction)
    if slope >= 0:
        return None
    length = min(1.0, 1.0 / (-slope) ** 0.5) if first else 1.0
    shortest, longest = 0.0, float("inf")
    best = None
    for _ in range(TRIALS):
        moved, _ = snapped(x + length * direction)
        trial, changed = energy(moved)
        if trial > value + DECREASE * length * slope:
            longest = length
        else:
            best = (moved, trial, changed)
            if inner(changed, direction) >= SLOPE * slope:
                return best
            shortest = length
        length = 2 * length if longest == float("inf") else 0.5 * (shortest + longest)
    return best
