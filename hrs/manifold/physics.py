"""Tokens as charged particles on springs: they move until the energy of :mod:`hrs.manifold.energy` is least.

With all pairs (``partners=0``) the gradient is exact and L-BFGS descends. With sampled energies Adam does: at a rate
that falls when the energy rests, or, for the original's definition, along the original's cosine.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrs.config.manifold import GeometryConfig
from hrs.manifold.blocks import single_threaded_blas
from hrs.manifold.descent import descend, inner
from hrs.manifold.energy import (
    Array,
    Energy,
    among,
    as_built_energy,
    exact_energy,
    linked_tokens,
    sampled_energy,
)
from hrs.manifold.exact import rounded, snapped
from hrs.manifold.forces import Forces

Report = Callable[[str, float, str], None]
"""(stage, share of it that is done, note)."""

START_SCALE = 0.1
EXACT_TOLERANCE = 1e-8
"""L-BFGS ends when a step lowers the energy by less than this share of it."""
WINDOW = 20
"""Steps over which sampled energies are averaged."""
SAMPLED_TOLERANCE = 2e-3
"""Energies rest when the mean of a window is lower than that of the window before by less than this share."""
PEAK_RATE, LAST_RATE, RATE_FACTOR = 0.05, 0.002, 0.3
AS_BUILT_LAST_RATE = 5e-4
CLIP_NORM = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """Where the tokens came to rest."""

    positions: NDArray[np.float64]
    """[V, dimensions]; of tokens that took no part, where they started."""
    energies: list[float]
    """Of every step."""
    converged: bool
    """Whether the energy rested when the simulation ended; False if its steps ran out before."""


def silent(stage: str, done: float, note: str) -> None:
    """Report nothing."""


@single_threaded_blas()
def simulate(forces: Forces, config: GeometryConfig, report: Report = silent) -> Simulation:
    """Let tokens move from 0.1 N(0, 1), drawn from ``config.seed``, until the energy rests or the steps run out.

    Tokens without any spring stay where they start, unless the definition is the original's.
    On the CPU in float64; positions are float32 where energies are sampled for the clean ``partners > 0``. The same
    bits on x86-64 processors, for any kernel of the linear algebra library and any number of threads.
    """
    draw = np.random.default_rng(config.seed)  # torch's normal numbers depend on the instruction set
    start = rounded(START_SCALE * draw.standard_normal((len(forces.mass), config.dimensions)))
    if config.definition == "as_built":
        return _anneal(start, as_built_energy(forces, draw, config), config.steps, report)
    tokens = linked_tokens(forces)
    if len(tokens) == 0:
        return Simulation(start, [], converged=True)
    linked = among(forces, tokens)
    if config.partners == 0:
        end = _descend(start[tokens], exact_energy(linked), config.steps, report)
    else:
        end = _settle(start[tokens].astype(np.float32), sampled_energy(linked, draw), config.steps, report)
    start[tokens] = end.positions
    return Simulation(start, end.energies, end.converged)


def _descend(start: Array, energy: Energy, steps: int, report: Report) -> Simulation:
    energies: list[float] = []

    def after_step(value: float) -> None:
        energies.append(value)
        report("physics", len(energies) / steps, f"energy {value:.6g}")

    end, converged = descend(start, energy, steps, EXACT_TOLERANCE, after_step)
    return Simulation(end, energies, converged)


def _settle(start: Array, energy: Energy, steps: int, report: Report) -> Simulation:
    """Adam whose rate falls each time the energy rests; ends when it rests at the last rate."""
    x, adam, rate = start, Adam(start), PEAK_RATE
    energies: list[float] = []
    fresh = 0  # steps at this rate
    for step in range(steps):
        value, gradient = energy(x)
        energies.append(value)
        adam.step(x, gradient, rate)
        report("physics", (step + 1) / steps, f"energy {value:.6g}")
        fresh += 1
        if fresh >= 2 * WINDOW and fresh % WINDOW == 0 and _rests(energies):
            if rate <= LAST_RATE:
                return Simulation(x.astype(np.float64), energies, converged=True)
            rate, fresh = max(rate * RATE_FACTOR, LAST_RATE), 0
    return Simulation(x.astype(np.float64), energies, converged=False)


def _anneal(start: Array, energy: Energy, steps: int, report: Report) -> Simulation:
    """Adam along a cosine from 0.05 to 0.0005, all steps, as the original did with 5,000."""
    x, adam = start, Adam(start)
    energies: list[float] = []
    for step in range(steps):
        value, gradient = energy(x)
        energies.append(value)
        swing = round(0.5 * (1 + math.cos(math.pi * step / steps)), 9)  # last bits depend on the processor
        adam.step(x, gradient, AS_BUILT_LAST_RATE + (PEAK_RATE - AS_BUILT_LAST_RATE) * swing)
        report("physics", (step + 1) / steps, f"energy {value:.6g}")
    return Simulation(snapped(x)[0], energies, converged=len(energies) >= 2 * WINDOW and _rests(energies))


def _rests(energies: list[float]) -> bool:
    before, now = np.mean(energies[-2 * WINDOW : -WINDOW]), np.mean(energies[-WINDOW:])
    return bool(before - now < SAMPLED_TOLERANCE * abs(before))


class Adam:
    """Adam (Kingma & Ba 2015) with its default betas, in place, the norm of the gradient clipped at 10."""

    def __init__(self, x: NDArray[Any]) -> None:
        self.mean, self.square = np.zeros_like(x), np.zeros_like(x)
        self.old_mean, self.old_square = 1.0, 1.0  # shares of the moments that are still their start

    def step(self, x: Array, gradient: Array, rate: float) -> None:
        norm = math.sqrt(inner(gradient, gradient))
        gradient = gradient * min(1.0, CLIP_NORM / max(norm, 1e-12))
        self.mean += 0.1 * (gradient - self.mean)
        self.square += 0.001 * (gradient * gradient - self.square)
        self.old_mean *= 0.9  # not a power: its last bits depend on the processor
        self.old_square *= 0.999
        scale = np.sqrt(self.square / (1 - self.old_square))
        x -= rate / (1 - self.old_mean) * self.mean / (scale + 1e-8)
