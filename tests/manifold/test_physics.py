"""Energies against naive sums over pairs and autograd, and tokens that come to rest."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_forces import N, energy_by_pairs, positions, some_forces
from numpy.typing import NDArray
from scipy import sparse

from hrs.config.manifold import GeometryConfig
from hrs.manifold import energy as energies
from hrs.manifold.blocks import map_blocks
from hrs.manifold.energy import among, as_built_energy, exact_energy, pairwise, sampled_energy
from hrs.manifold.exact import rounded
from hrs.manifold.forces import Forces
from hrs.manifold.physics import Adam, simulate


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of pairs per step where the original draws hundreds of thousands."""
    for name in ("SPRING_DRAWS", "PAIR_DRAWS", "DIRECTED_DRAWS"):
        monkeypatch.setattr(energies, name, 800)
    monkeypatch.setattr(energies, "SAMPLE", 32)


def test_exact_energy_and_gradient_are_those_of_autograd() -> None:
    """The force per distance is rounded to about 2^-30 of a row's sum."""
    forces, x = some_forces(), torch.from_numpy(rounded(positions())).requires_grad_()
    expected = energy_by_pairs(x, forces)
    (slope,) = torch.autograd.grad(expected, x)
    value, gradient = exact_energy(forces)(rounded(positions()))
    assert value == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, slope.numpy(), rtol=0, atol=2**-29 * slope.abs().max().item() * N)


def test_tokens_at_the_same_place_exert_no_infinite_force() -> None:
    x = positions()
    x[3] = x[7]
    value, gradient = exact_energy(some_forces())(x)
    q = 1 - 0.1 * np.prod(some_forces().mass[[3, 7]])
    assert value >= q / 1e-4 and np.isfinite(gradient).all()
    assert np.abs(gradient).max() < 1e3


def test_what_comes_later_sits_further_along_the_axis() -> None:
    """Two tokens of which the second always follows: at rest it is ahead on the first axis."""
    order = np.array([[0.0, 0.9], [-0.9, 0.0]])
    forces = Forces(
        springs=sparse.csr_array(np.array([[0.0, 1.0], [1.0, 0.0]])),
        asymmetry=np.zeros(2),
        directional=np.zeros((2, 0)),
        mass=np.ones(2),
        directed=sparse.csr_array(order),
        syntactic=np.zeros((2, 0)),
    )
    end = simulate(forces, GeometryConfig(partners=0, dimensions=2, steps=300))
    assert end.converged and end.positions[1, 0] > end.positions[0, 0]


def test_the_sampled_energy_is_right_on_average(few_draws: None) -> None:
    """Over a whole permutation every token is in one block: the mean energy and gradient approach the exact ones."""
    n = 4 * energies.SAMPLE
    forces, x = some_forces(n), positions(n).astype(np.float32)
    expected, slope = exact_energy(forces)(x.astype(np.float64))
    sampled = sampled_energy(forces, np.random.default_rng(0))
    drawn = [sampled(x) for _ in range(4 * 8)]
    assert np.mean([value for value, _ in drawn]) == pytest.approx(expected, rel=5e-3)
    mean = np.mean([gradient for _, gradient in drawn], axis=0)
    assert np.linalg.norm(mean - slope) < 0.05 * np.linalg.norm(slope)
    one = np.linalg.norm(drawn[0][1] - slope)
    assert one > 2 * np.linalg.norm(mean - slope), "the error of one block averages out"


def test_a_block_of_all_tokens_gives_the_exact_energy() -> None:
    forces, x = some_forces(), positions()
    expected, slope = exact_energy(forces)(x)
    value, gradient = sampled_energy(forces, np.random.default_rng(0))(x.astype(np.float32))
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=1e-3)


def as_built_by_pairs(x: NDArray[np.float64], forces: Forces) -> dict[str, float]:
    """Expected values of the original's five sampled sums."""
    springs, directed = forces.springs.toarray(), forces.directed.toarray()
    expected = {"spring": 0.0, "repulsion": 0.0, "gravity": 0.0, "directed": 0.0}
    for a in range(len(x)):
        for b in range(a + 1, len(x)):
            r = float(np.linalg.norm(x[a] - x[b]))
            expected["spring"] += 2 * springs[a, b] * r**2
            expected["directed"] += 0.3 * 2 * directed[a, b] * r**2
            expected["repulsion"] += 1 / r
            expected["gravity"] -= 0.1 * forces.mass[a] * forces.mass[b] / r
    return expected


def test_the_as_built_energy_has_the_originals_expectation(few_draws: None) -> None:
    forces = replace(some_forces(symmetric_directed=True), asymmetry=np.zeros(N))  # torsion is tested below
    config = GeometryConfig(definition="as_built", partners=0)
    energy = as_built_energy(forces, np.random.default_rng(0), config)
    values = [energy(positions())[0] for _ in range(200)]
    assert len(set(values)) == 200, "pairs are drawn anew at each call"
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values) - sum(as_built_by_pairs(positions(), forces).values())) < 5 * error


def test_as_built_torsion_is_a_bare_sum_over_drawn_pairs() -> None:
    """Two tokens above the median make one pair, drawn once: 0.5 tau tau / r exactly, on top of the rest."""
    asymmetry = np.zeros(N)
    asymmetry[[2, 5]] = 0.8, 0.6
    x, config = positions(), GeometryConfig(definition="as_built", partners=0)
    without = replace(some_forces(symmetric_directed=True), asymmetry=np.zeros(N))
    bare, _ = as_built_energy(without, np.random.default_rng(0), config)(x)
    value, _ = as_built_energy(replace(without, asymmetry=asymmetry), np.random.default_rng(0), config)(x)
    assert value - bare == pytest.approx(0.5 * 0.8 * 0.6 / np.linalg.norm(x[2] - x[5]), rel=1e-6)


def test_listed_pairs_densely_one_by_one_and_by_autograd_agree() -> None:
    draw, x = np.random.default_rng(2), rounded(positions())
    a = draw.integers(N, size=500)
    b = (a + draw.integers(1, N, size=500)) % N
    weights = draw.random(500)
    attract, repel = (a[:200], b[:200], weights[:200]), (a[200:], b[200:], weights[200:])
    dense = energies._pairs_densely(x, attract, repel)
    listed = energies._pairs_one_by_one(x, attract, repel)
    moved = torch.from_numpy(x).requires_grad_()
    r2 = ((moved[a] - moved[b]) ** 2).sum(-1)
    w = torch.from_numpy(weights)
    expected = (w[:200] * r2[:200]).sum() + (w[200:] / r2[200:].sqrt()).sum()
    (slope,) = torch.autograd.grad(expected, moved)
    for (value, gradient), error in ((dense, 2**-29 * N * slope.abs().max().item()), (listed, 1e-10)):
        assert value == pytest.approx(expected.item(), rel=1e-12)
        np.testing.assert_allclose(gradient, slope.numpy(), rtol=1e-10, atol=error)


def test_adam_is_the_papers_with_clipped_gradients() -> None:
    """Moments written out as weighted sums of all gradients so far (Kingma & Ba 2015, section 3)."""
    x = positions()
    expected, seen = x.copy(), []
    adam = Adam(x)
    for step in range(1, 6):
        gradient = 3.0**step * np.sin(x + step)  # grows beyond the norm at which it is clipped
        seen.append(gradient * min(1.0, 10.0 / np.linalg.norm(gradient)))
        mean = sum(0.1 * 0.9 ** (step - i) * g for i, g in enumerate(seen, 1)) / (1 - 0.9**step)
        square = sum(0.001 * 0.999 ** (step - i) * g**2 for i, g in enumerate(seen, 1)) / (1 - 0.999**step)
        expected -= 0.05 * mean / (np.sqrt(square) + 1e-8)
        adam.step(x, gradient, 0.05)
        np.testing.assert_allclose(x, expected, rtol=1e-9)


@pytest.mark.parametrize("partners", [0, 4])
def test_the_clean_energy_falls_to_rest(partners: int) -> None:
    """The last token has no spring: it stays where it starts and pushes nobody."""
    forces = some_forces(80)
    config = GeometryConfig(dimensions=6, partners=partners, steps=2000)
    end = simulate(forces, config)
    assert end.converged and len(end.energies) < 2000
    assert end.energies[-1] < 0.9 * end.energies[0]
    start = rounded(0.1 * np.random.default_rng(config.seed).standard_normal((80, 6)))
    assert np.array_equal(end.positions[-1], start[-1])
    energy = exact_energy(among(forces, np.arange(79)))
    _, slope = energy(end.positions[:79])
    _, first = energy(start[:79])
    assert np.linalg.norm(slope) < (1e-3 if partners == 0 else 5e-2) * np.linalg.norm(first)
    if partners == 0:
        assert all(np.diff(end.energies) <= 0)


def test_both_ways_of_descending_come_to_the_same_energy() -> None:
    forces = some_forces(80)
    exact, sampled = (simulate(forces, GeometryConfig(dimensions=6, partners=p, steps=2000)) for p in (0, 4))
    value, _ = exact_energy(among(forces, np.arange(79)))(sampled.positions[:79])
    assert value == pytest.approx(exact.energies[-1], rel=1e-2)


def test_tokens_without_springs_stay() -> None:
    nothing = sparse.csr_array((N, N))
    end = simulate(replace(some_forces(), springs=nothing, directed=nothing), GeometryConfig(dimensions=6))
    assert end.converged and end.energies == [] and np.abs(end.positions).max() < 1


@pytest.mark.parametrize("partners", [0, 4])
def test_the_as_built_energy_falls_along_its_cosine(partners: int, few_draws: None) -> None:
    forces = some_forces(80, symmetric_directed=True)
    config = GeometryConfig(definition="as_built", dimensions=6, partners=partners, steps=60)
    end = simulate(forces, config)
    assert len(end.energies) == 60 and np.mean(end.energies[-5:]) < 0.7 * end.energies[0]


def test_steps_that_run_out_are_admitted() -> None:
    end = simulate(some_forces(), GeometryConfig(partners=0, dimensions=6, steps=2))
    assert not end.converged and len(end.energies) == 2


def test_progress_is_told_step_by_step() -> None:
    heard: list[tuple[str, float, str]] = []
    simulate(some_forces(), GeometryConfig(partners=0, dimensions=6, steps=5), lambda *told: heard.append(told))
    assert [done for _, done, _ in heard] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(stage == "physics" and "energy" in note for stage, _, note in heard)


@pytest.mark.parametrize("partners", [0, 4])
@pytest.mark.parametrize("definition", ["clean", "as_built"])
def test_the_same_bits_at_any_number_of_threads(
    definition: str, partners: int, set_threads: None, few_draws: None
) -> None:
    forces = some_forces(600, symmetric_directed=definition == "as_built")
    config = GeometryConfig(definition=definition, dimensions=8, partners=partners, steps=4)  # type: ignore[arg-type]
    ends = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        ends.append(simulate(forces, config).positions)
    assert np.array_equal(*ends)


@pytest.fixture
def set_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_blocks_are_joined_in_order(set_threads: None) -> None:
    torch.set_num_threads(4)
    assert map_blocks(lambda rows: (rows.start, rows.stop), 10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert map_blocks(lambda rows: rows, 0, 4) == []


def test_pairwise_ignores_the_diagonal() -> None:
    x, attraction = positions(), np.zeros((N, N))
    charge = np.ones((N, N))
    plain = pairwise(x, attraction, charge)
    np.fill_diagonal(charge, 1e9)
    loaded = pairwise(x, attraction, charge)
    assert plain[0] == loaded[0] and np.array_equal(plain[1], loaded[1])
