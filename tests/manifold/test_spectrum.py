"""Couplings against Hessians and loops, modes against dense references, neighbours against a full sort."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from drawn_forces import D, N, energy_by_pairs, positions, some_forces
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from scipy import sparse

from hrs.config.manifold import GeometryConfig
from hrs.manifold import spectrum as module
from hrs.manifold.blocks import nearest_by_cosine
from hrs.manifold.energy import among, linked_tokens
from hrs.manifold.spectrum import as_built_coupling, fixed_signs, spectral_coordinates, stiffness

CLEAN = GeometryConfig(partners=8, dimensions=D, modes=6, directional=3, syntactic=2)
AS_BUILT = GeometryConfig(definition="as_built", partners=8, dimensions=D, modes=6, directional=3, syntactic=2)


def test_stiffness_is_the_mean_diagonal_of_the_hessians_blocks() -> None:
    n, d = 7, 4
    forces, x = among(some_forces(n + 1), np.arange(n)), torch.from_numpy(positions(n, d))
    hessian = torch.autograd.functional.hessian(lambda x: energy_by_pairs(x, forces), x)  # [V, d, V, d]
    mean = -torch.einsum("aibi->ab", hessian).numpy() / d
    assert (mean < 0).any() and (mean > 0).any()
    np.fill_diagonal(mean, 0.0)
    coupled = stiffness(forces, positions(n, d))
    np.testing.assert_allclose(coupled.toarray(), np.maximum(mean, 0), atol=1e-10)
    assert (coupled != coupled.T).nnz == 0


def reference_modes(coupling: np.ndarray, modes: int) -> tuple[np.ndarray, np.ndarray]:
    """Of tokens that are all coupled, the mean strength added to each."""
    n = len(coupling)
    coupling = coupling + coupling.sum() / n / n
    degree = coupling.sum(axis=1)
    laplacian = np.eye(n) - coupling / np.sqrt(np.outer(degree, degree))
    values, vectors = np.linalg.eigh(laplacian)
    assert abs(values[0]) < 1e-12
    return values[1 : modes + 1], vectors[:, 1 : modes + 1] * (1 - values[1 : modes + 1]) * np.sqrt(n)


@pytest.mark.parametrize("dense_modes", [2048, 0])
def test_clean_coordinates_are_the_soft_modes_of_the_normalised_laplacian(
    dense_modes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All modes at once, or by Lanczos; the lone last token has zeros."""
    monkeypatch.setattr(module, "DENSE_MODES", dense_modes)
    forces, x = some_forces(60), positions(60)
    spectrum = spectral_coordinates(forces, x, CLEAN)
    tokens = linked_tokens(forces)
    coupling = stiffness(among(forces, tokens), x[tokens]).toarray()
    assert coupling.any(axis=1).all() and tokens.tolist() == list(range(59))
    values, expected = reference_modes(coupling, CLEAN.modes)
    np.testing.assert_allclose(spectrum.eigenvalues, values, atol=1e-9)
    np.testing.assert_allclose(np.abs(spectrum.coordinates[:59, :6]), np.abs(expected), atol=1e-6)
    assert not spectrum.coordinates[59:, :6].any()
    np.testing.assert_allclose((spectrum.coordinates[:59, :6] ** 2).mean(axis=0), (1 - values) ** 2)


def test_no_mode_is_about_two_tokens_that_hang_on_a_thread() -> None:
    """Two rings of 30 and a pair beside them: the softest mode parts the rings, not the pair from the rest."""
    n = 62
    springs = np.zeros((n, n))
    for a in range(30):
        for step in (1, 2, 3):
            springs[a, (a + step) % 30] = springs[30 + a, 30 + (a + step) % 30] = 0.8
    springs[60, 61] = 0.01
    springs = springs + springs.T
    forces = replace(some_forces(n), springs=sparse.csr_array(springs), directed=sparse.csr_array((n, n)))
    softest = spectral_coordinates(forces, 100 * positions(n), CLEAN).coordinates[:, 0]
    assert np.abs(softest[:60]).min() > 10 * np.abs(softest[60:]).max()
    assert len(set(np.sign(softest[:30]))) == len(set(np.sign(softest[30:60]))) == 1 and softest[0] * softest[30] < 0


def test_fewer_coupled_tokens_than_modes_leave_zeros() -> None:
    springs = np.zeros((8, 8))
    for a, b in ((0, 1), (1, 2), (2, 3), (3, 0), (0, 2)):
        springs[a, b] = springs[b, a] = 0.5 + 0.1 * a
    forces = replace(some_forces(8), springs=sparse.csr_array(springs), directed=sparse.csr_array((8, 8)))
    spectrum = spectral_coordinates(forces, 100 * positions(8), CLEAN)
    assert spectrum.coordinates[:4, :3].any(axis=0).all() and not spectrum.coordinates[4:, :6].any()
    assert (spectrum.eigenvalues[3:] == 1).all() and not spectrum.coordinates[:, 3:6].any(), "only three modes exist"


def test_the_as_built_coupling_is_the_originals_sum() -> None:
    forces, x = some_forces(symmetric_directed=True), positions()
    springs, directed = forces.springs.toarray(), forces.directed.toarray()
    expected = np.zeros((N, N))
    for a in range(N):
        for b in range(N):
            if a != b:
                r = max(float(np.linalg.norm(x[a] - x[b])), 1e-8)
                expected[a, b] = 2 * springs[a, b] + 0.1 * forces.mass[a] * forces.mass[b] + 0.3 * directed[a, b]
                expected[a, b] += 1 / r**3
    np.testing.assert_allclose(as_built_coupling(forces, x), expected, rtol=1e-10)


@pytest.mark.parametrize("dense_modes", [2048, 0])
def test_as_built_coordinates_are_the_largest_modes_times_roots(
    dense_modes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Lanczos 1/r^3 is kept for the 64 nearest; with fewer than 65 tokens that is all of it."""
    monkeypatch.setattr(module, "DENSE_MODES", dense_modes)
    forces, x = some_forces(60, symmetric_directed=True), positions(60)
    spectrum = spectral_coordinates(forces, x, AS_BUILT)
    values, vectors = scipy.linalg.eigh(as_built_coupling(forces, x))
    values, vectors = values[:-7:-1], vectors[:, :-7:-1]
    np.testing.assert_allclose(spectrum.eigenvalues, values, rtol=1e-9)
    np.testing.assert_allclose(np.abs(spectrum.coordinates[:, :6]), np.abs(vectors) * np.sqrt(abs(values)), atol=1e-6)


def test_far_pairs_are_left_out_of_the_sparse_as_built_coupling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEAREST", 3)
    x = positions()
    near = module._near_repulsion(x, lambda *told: None).toarray()
    r = np.linalg.norm(x[:, None] - x, axis=-1)
    np.fill_diagonal(r, np.inf)
    closest = r <= np.sort(r, axis=1)[:, 2:3]
    np.testing.assert_allclose(near, np.where(closest | closest.T, r**-3.0, 0.0), rtol=1e-9)


@pytest.mark.parametrize("config", [CLEAN, AS_BUILT])
def test_other_coordinates_are_scaled_to_the_spectral_ones(config: GeometryConfig) -> None:
    forces = some_forces(symmetric_directed=config == AS_BUILT)
    made = spectral_coordinates(forces, positions(), config).coordinates
    spectral, directional, syntactic = np.split(made, [6, 9], axis=1)
    assert directional.std() == pytest.approx(0.5 * spectral.std())
    assert syntactic.std() == pytest.approx(0.3 * spectral.std())
    np.testing.assert_allclose(directional / forces.directional, directional[0, 0] / forces.directional[0, 0])


def test_missing_directions_are_zeros_not_nan() -> None:
    forces = replace(some_forces(), directional=np.zeros((N, 3)), syntactic=np.zeros((N, 0)))
    made = spectral_coordinates(forces, positions(), CLEAN).coordinates
    assert made.shape == (N, 9) and np.isfinite(made).all() and not made[:, 6:].any()


def test_signs_are_fixed_by_the_largest_entry_and_by_the_first_of_equals() -> None:
    vectors = np.array([[0.1, -0.7, 0.5 - 1e-12], [-0.9, 0.7 + 1e-12, -0.5], [0.2, 0.1, 0.0]])
    fixed = fixed_signs(vectors)
    np.testing.assert_allclose(fixed, vectors * [-1, -1, 1])
    np.testing.assert_array_equal(fixed_signs(-vectors), fixed)


# ---- neighbours ------------------------------------------------------------------------------------------------------


def neighbours_one_by_one(coordinates: np.ndarray, k: int, of: list[int] | None = None) -> np.ndarray:
    table = np.full((len(coordinates), k), -1)
    present = [i for i in range(len(coordinates)) if coordinates[i].any()]
    unit = {i: coordinates[i] / np.linalg.norm(coordinates[i]) for i in present}
    for i in present if of is None else set(of) & set(present):
        others = sorted((j for j in present if j != i), key=lambda j: (-round(float(unit[i] @ unit[j]), 9), j))[:k]
        table[i, : len(others)] = others
    return table


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 12))
@examples(60)
def test_neighbours_are_those_of_a_full_sort(seed: int, n: int, k: int) -> None:
    """Small whole numbers: many zero rows and many equal cosines.

    Cosines are quotients of 0 to 3 by sqrt(1) to sqrt(9): none lies within 1e-12 of where rounding to 9 digits turns.
    """
    coordinates = np.random.default_rng(seed).integers(-1, 2, (n, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        nearest_by_cosine(coordinates, k), neighbours_one_by_one(coordinates.astype(float), k)
    )


def test_neighbours_across_blocks() -> None:
    coordinates = np.random.default_rng(0).standard_normal((1100, 6)).astype(np.float32)
    coordinates[::7] = 0
    found = nearest_by_cosine(coordinates, 4)
    sample = [1, 511, 512, 513, 1030, 1099, 7]
    np.testing.assert_array_equal(found[sample], neighbours_one_by_one(coordinates.astype(float), 4, sample)[sample])
    assert (
        found.dtype == np.int32 and (found[::7] == -1).all() and not np.isin(found[1::7], np.arange(0, 1100, 7)).any()
    )
