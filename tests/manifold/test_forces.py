"""Forces against dense matrices written straight from the definitions."""

from dataclasses import fields
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from properties import examples
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from hrs.config.manifold import GeometryConfig
from hrs.manifold.forces import Forces, compute_forces
from hrs.manifold.statistics import Counts, count_shard

Dense = NDArray[np.float64]
Definition = Literal["clean", "as_built"]
ERROR = {"springs": 2**-20, "mass": 2**-20}
"""Logarithms are rounded to multiples of 2^-20, hence by 2^-21. Springs are square roots of what lies above 1/2 and
move by less than that; a mass is 1 / (1 + entropy), and so is the largest mass, by which it is divided."""
DEFINITIONS: tuple[Definition, ...] = ("clean", "as_built")


def chain(vocab_size: int, n_tokens: int, seed: int, unseen: int = 0) -> NDArray[np.uint16]:
    """Tokens of a Markov chain with a preference of its own in every state; the last ``unseen`` ids never occur."""
    draw = np.random.default_rng(seed)
    seen = vocab_size - unseen
    cumulative = draw.dirichlet(np.full(seen, 0.15), size=seen).cumsum(axis=1)
    tokens = [0]
    for uniform in draw.random(n_tokens - 1):
        tokens.append(min(int(np.searchsorted(cumulative[tokens[-1]], uniform)), seen - 1))
    return np.array(tokens, dtype=np.uint16)


def shares(counts: Dense) -> Dense:
    sums = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, sums, out=np.zeros_like(counts), where=sums > 0)


def signed(coordinates: Dense) -> Dense:
    for column in coordinates.T:
        column *= np.sign(column[np.argmax(abs(column))]) or 1
    return coordinates


def dense_coordinates(matrix: Dense, k: int) -> Dense:
    u, sigma, _ = np.linalg.svd(matrix)
    return signed(u[:, :k] * sigma[:k])


def dense_forces(counts: Counts, config: GeometryConfig) -> dict[str, Dense]:
    """The definitions word by word, in real weights."""
    v = counts.vocab_size
    forward, successors = counts.forward.toarray() / 2520, counts.successors.toarray().astype(np.float64)
    after = counts.after_10.toarray() / 2520
    sym = after + after.T
    row, column = sym.sum(axis=1, keepdims=True), sym.sum(axis=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(sym * sym.sum() / (row * column) + 1e-8)
        ppmi = np.nan_to_num(np.maximum(0, np.rint(logs * 2**20) / 2**20))  # rounded before it meets the threshold
    np.fill_diagonal(ppmi, 0)
    # From the integers, so that differences equal but for rounding are on the same side of the percentile as ours.
    left, right = shares(counts.forward.toarray().T * 1.0), shares(counts.forward.toarray() * 1.0)
    successor_shares = shares(successors)
    entropy = -np.sum(successor_shares * np.log(np.where(successor_shares > 0, successor_shares, 1)), axis=1)
    often = successors.sum(axis=1) >= 10
    entropy[~often] = entropy[often].max() if often.any() else 0
    mass = 1 / (entropy + 1)
    if config.definition == "clean":
        directed = (forward - forward.T) / (forward + forward.T + 10)
    else:
        delta = abs(right - left)
        delta = (delta + delta.T) / 2
        np.fill_diagonal(delta, 0)
        threshold = np.percentile(delta[delta > 0], 90) if (delta > 0).any() else 0
        directed = np.where(delta > threshold, delta, 0)
    syntactic = np.concatenate([shares(successors.T), successor_shares], axis=1)  # [V, 2V]
    return {
        "springs": np.sqrt(np.where(ppmi > 0.5, ppmi, 0)),
        "asymmetry": np.linalg.norm(left - right, axis=1),
        "directional": dense_coordinates(left - right, min(config.directional, v - 2)),
        "mass": mass / mass.max(),
        "directed": directed,
        "syntactic": dense_coordinates(syntactic, min(config.syntactic, v - 2)),
    }


def arrays(forces: Forces) -> dict[str, Dense]:
    values = {field.name: getattr(forces, field.name) for field in fields(forces)}
    return {name: value if isinstance(value, np.ndarray) else value.toarray() for name, value in values.items()}


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("n_tokens", [300, 20_000])
def test_forces_are_those_of_the_definition(definition: Definition, n_tokens: int) -> None:
    """300 tokens leave some with few successors; three tokens never occur."""
    counts = count_shard(chain(40, n_tokens, seed=1, unseen=3), 40)
    config = GeometryConfig(definition=definition, partners=0, directional=6, syntactic=5)
    forces, expected = arrays(compute_forces(counts, config)), dense_forces(counts, config)
    for name, value in expected.items():
        assert forces[name].dtype == np.float64
        np.testing.assert_allclose(forces[name], value, rtol=1e-8, atol=ERROR.get(name, 1e-10), err_msg=name)
    assert 0 < np.count_nonzero(expected["springs"]) < 40 * 39
    assert np.count_nonzero(expected["directed"]) > 20


@given(st.lists(st.integers(0, 11), max_size=80), st.sampled_from(DEFINITIONS), st.sampled_from([0, 2]))
@examples(60)
def test_any_stream_gives_finite_forces_of_the_right_symmetry(
    stream: list[int], definition: Definition, partners: int
) -> None:
    """Also empty streams, one token for ever, and ranks below the number of coordinates."""
    counts = count_shard(np.array(stream, dtype=np.uint16), 12)
    config = GeometryConfig(definition=definition, partners=partners, directional=4, syntactic=11)
    forces = arrays(compute_forces(counts, config))
    assert all(np.isfinite(value).all() for value in forces.values())
    assert forces["directional"].shape == (12, 4)
    assert forces["syntactic"].shape == (12, 11)
    springs, directed = forces["springs"], forces["directed"]
    assert (springs == springs.T).all() and (springs >= 0).all()
    assert (directed == (-directed.T if definition == "clean" else directed.T)).all()
    assert (np.diagonal(springs) == 0).all() and (np.diagonal(directed) == 0).all()
    assert (abs(directed) <= 1 + 1e-15).all()  # means of two differences of shares
    assert forces["mass"].max() == 1 and forces["mass"].min() > 0
    unseen = ~np.isin(np.arange(12), stream)
    for name in ("springs", "asymmetry", "directed"):
        assert not forces[name][unseen].any(), name
    expected = dense_forces(counts, config)
    for name in ("directional", "syntactic"):  # directions of equal singular values may be mixed; their spread is one
        sigma = np.linalg.norm(expected[name], axis=0)
        # Eigenvalues sigma^2 of a 12 x 12 matrix are off by less than 10 * 12^2 roundings of the largest, each side.
        off = 1e-12 * sigma[0] ** 2
        np.testing.assert_allclose(
            np.linalg.norm(forces[name], axis=0)[: len(sigma)] ** 2, sigma**2, rtol=0, atol=off, err_msg=name
        )
        # An eigenvector is off by that over sigma^2 in a row of zeros, and is multiplied by sigma.
        most = np.minimum(sigma, off / np.maximum(sigma, 1e-300)).sum()
        assert (abs(forces[name][unseen]) <= most + 1e-300).all(), name
    if partners == 0:
        for name in ("springs", "asymmetry", "mass"):
            np.testing.assert_allclose(forces[name], expected[name], rtol=1e-8, atol=ERROR.get(name, 1e-10))


def test_directed_springs_point_to_the_token_that_comes_later() -> None:
    counts = count_shard(np.array([0, 1, 2] * 30), 3, segment_starts=np.arange(0, 90, 3))
    directed = compute_forces(counts, GeometryConfig(partners=0, directional=0, syntactic=0)).directed.toarray()
    np.testing.assert_allclose(directed[0], [0, 30 / 40, 15 / 25])


def strongest(matrix: Dense, partners: int) -> Dense:
    """Entries that are among the largest of their row or of their column; of equal values the lower id first."""
    chosen = np.zeros(matrix.shape, dtype=bool)
    for row, values in enumerate(abs(matrix)):
        order = sorted(np.flatnonzero(values), key=lambda token: (-values[token], token))
        chosen[row, order[:partners]] = True
    return np.where(chosen | chosen.T, matrix, 0)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_partners_keep_the_strongest_of_the_frequent_pairs(definition: Definition) -> None:
    counts = count_shard(chain(30, 4_000, seed=2), 30)
    config = GeometryConfig(definition=definition, partners=3, directional=0, syntactic=0)
    forces = arrays(compute_forces(counts, config))
    everything = dense_forces(counts, config)
    # Ten pairs at a mean offset: 10 * mean of 1/1..1/10, and of 1/1..1/5.
    after, forward = counts.after_10.toarray() / 2520, counts.forward.toarray() / 2520
    often = after + after.T >= np.sum(1 / np.arange(1, 11)) - 1e-9
    springs = strongest(np.where(often, everything["springs"], 0), 3)
    assert 0 < np.count_nonzero(springs) < np.count_nonzero(everything["springs"])
    np.testing.assert_allclose(forces["springs"], springs, atol=ERROR["springs"])
    often = forward + forward.T >= 2 * np.sum(1 / np.arange(1, 6)) - 1e-9
    if definition == "clean":
        directed = np.where(often, everything["directed"], 0)
    else:
        delta = abs(shares(counts.forward.toarray() * 1.0) - shares(counts.forward.toarray().T * 1.0))
        delta = np.where(often & ~np.eye(30, dtype=bool), (delta + delta.T) / 2, 0)
        directed = np.where(delta > np.percentile(delta[delta > 0], 90), delta, 0)
    np.testing.assert_allclose(forces["directed"], strongest(directed, 3), rtol=1e-10)
    assert np.count_nonzero(directed) > np.count_nonzero(forces["directed"]) > 0 or definition == "as_built"


def test_coordinates_of_large_vocabularies_are_near_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """All singular values within 5 %, and the first directions within 2 % of the largest entry.

    Tokens of eight classes that follow one another by class, so that seven directions stand apart from the noise.
    """
    classes = chain(8, 40_000, seed=3)
    tokens = classes * 25 + np.random.default_rng(4).integers(25, size=len(classes))
    counts = count_shard(tokens, 200)
    config = GeometryConfig(directional=16, syntactic=16)
    exact = compute_forces(counts, config)
    monkeypatch.setattr("hrs.manifold.forces.EXACT_TOKENS", 199)
    near = compute_forces(counts, config)
    for name in ("directional", "syntactic"):
        a, b = getattr(exact, name), getattr(near, name)
        assert not np.array_equal(a, b)
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=0), rtol=0.05)
        np.testing.assert_allclose(b[:, :4], a[:, :4], atol=0.02 * abs(a).max())


@pytest.mark.parametrize("exact_tokens", [0, 300])
def test_forces_do_not_depend_on_threads_or_on_the_order_of_shards(
    exact_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hrs.manifold.forces.EXACT_TOKENS", exact_tokens)
    tokens = chain(300, 6_000, seed=4)
    whole = count_shard(tokens, 300)
    parts = [count_shard(tokens[i : i + 1_010], 300, n_first=1_000) for i in range(0, 6_000, 1_000)]
    backwards = parts[-1]
    for part in parts[-2::-1]:
        backwards = backwards + part
    config = GeometryConfig()
    results: list[dict[str, Any]] = []
    for counts, threads in ((whole, 1), (backwards, 2)):
        with threadpool_limits(limits=threads):
            results.append(arrays(compute_forces(counts, config)))
    for name, value in results[0].items():
        np.testing.assert_array_equal(results[1][name], value, err_msg=name)
