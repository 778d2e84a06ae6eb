"""Intervals: exact against a slow loop, sharper when paired, and covering what they claim to cover."""

from math import isclose

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from hrs.errors import HRSError
from hrs.report.statistics import Scores, bootstrap, document_counts, resampled_sums, seed_weights


def scores(nats: np.ndarray, units: np.ndarray, seeds: tuple[int, ...] | None = None) -> Scores:
    return Scores(seeds=seeds or tuple(range(len(nats))), numerators=nats, denominators=units)


def test_the_estimate_is_a_ratio_of_sums_and_not_a_mean_of_ratios() -> None:
    # (1 + 30) / (1 + 10) = 31 / 11 for one seed and (3 + 30) / 11 for the other; a mean of ratios would give 2.5.
    estimate = bootstrap([scores(np.array([[1.0, 30.0], [3.0, 30.0]]), np.array([1.0, 10.0]))], baseline=None)[0]
    assert isclose(estimate.score.value, (31 / 11 + 33 / 11) / 2)


def test_two_documents_give_the_bounds_one_can_enumerate() -> None:
    # The resamples are {1,1}, {1,2}, {2,2} with chances 1/4, 1/2, 1/4: both extremes lie inside the 2.5% tails.
    estimate = bootstrap([scores(np.array([[2.0, 30.0]]), np.array([1.0, 10.0]))], baseline=None)[0]
    assert (estimate.score.low, estimate.score.high) == (2.0, 3.0)


def slow_bootstrap(presets: list[Scores], resamples: int, seed: int) -> list[tuple[float, float, float, float]]:
    """The same estimator, draw by draw and document by document."""
    n_documents = len(presets[0].denominators)
    counts = document_counts(np.random.default_rng([seed, 0]), resamples, n_documents)
    values: list[list[float]] = []
    for preset in presets:
        weights = seed_weights(preset.seeds, resamples, seed)
        values.append([])
        for r in range(resamples):
            total = sum(counts[r, d] * preset.denominators[d] for d in range(n_documents))
            ratio = 0.0
            for s in range(len(preset.seeds)):
                nats = sum(counts[r, d] * preset.numerators[s, d] for d in range(n_documents))
                ratio += weights[s, r] * nats / total
            values[-1].append(ratio)
    result = []
    for own in values:
        gaps = [a - b for a, b in zip(own, values[0], strict=True)]
        result.append((*np.quantile(own, [0.025, 0.975]), *np.quantile(gaps, [0.025, 0.975])))
    return result


def test_the_vectorised_bootstrap_equals_a_slow_loop() -> None:
    """Integer nats and sizes make every sum exact, so the two must agree to the last bits of a division."""
    rng = np.random.default_rng(0)
    units = rng.integers(1, 50, 7).astype(float)
    presets = [scores(rng.integers(1, 90, (n, 7)).astype(float), units) for n in (3, 3, 2)]
    fast = bootstrap(presets, resamples=60, seed=5)
    for estimate, (low, high, gap_low, gap_high) in zip(fast, slow_bootstrap(presets, 60, 5), strict=True):
        assert np.allclose((estimate.score.low, estimate.score.high), (low, high), rtol=1e-14, atol=0)
        if estimate.difference is not None:
            assert np.allclose((estimate.difference.low, estimate.difference.high), (gap_low, gap_high), rtol=1e-12)


@examples(40)
@given(n_documents=st.integers(1, 30), resamples=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_every_resample_draws_as_many_documents_as_there_are(n_documents: int, resamples: int, seed: int) -> None:
    counts = document_counts(np.random.default_rng(seed), resamples, n_documents)
    assert counts.shape == (resamples, n_documents)
    assert (counts.sum(axis=1) == n_documents).all() and (counts >= 0).all()


def test_drawing_in_chunks_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(1).integers(0, 9, (3, 11)).astype(float)
    whole = resampled_sums(rows, 50, seed=3)
    monkeypatch.setattr("hrs.report.statistics._DRAWS_IN_MEMORY", 77)
    assert (resampled_sums(rows, 50, seed=3) == whole).all()


def test_a_preset_that_equals_the_baseline_differs_by_exactly_zero() -> None:
    """Only if documents and seeds are both shared does every replicate of the difference vanish."""
    rng = np.random.default_rng(2)
    one = scores(rng.random((3, 40)), rng.random(40) + 1)
    difference = bootstrap([one, one])[1].difference
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert not difference.excludes_zero


def test_seeds_are_not_paired_when_the_seed_sets_differ() -> None:
    """The same scores under other seeds: the seeds' spread then stays in the difference."""
    rng = np.random.default_rng(2)
    nats, units = rng.random((1, 40)) + np.array([[0.0], [1.0], [2.0]]), np.ones(40)
    same, other = scores(nats, units, (0, 1, 2)), scores(nats, units, (3, 4, 5))
    difference = bootstrap([same, other])[1].difference
    assert difference is not None and difference.half_width > 0.5


def test_the_paired_interval_is_narrower_than_the_unpaired_when_documents_are_correlated() -> None:
    rng = np.random.default_rng(3)
    units = rng.integers(100, 1000, 200).astype(float)
    difficulty = rng.normal(1.0, 0.3, 200)
    baseline = scores((difficulty + rng.normal(0, 0.02, (1, 200))) * units, units)
    better = scores((difficulty - 0.02 + rng.normal(0, 0.02, (1, 200))) * units, units)
    first, second = bootstrap([baseline, better])
    assert second.difference is not None
    unpaired = np.hypot(first.score.half_width, second.score.half_width)
    assert second.difference.half_width < unpaired / 5
    assert second.difference.high < 0, "a gain of 0.02 must be seen although the scores' own intervals overlap"
    assert first.score.low < second.score.high


def test_another_preset_does_not_move_the_intervals_of_the_rest() -> None:
    rng = np.random.default_rng(4)
    presets = [scores(rng.random((2, 20)), np.ones(20)) for _ in range(3)]
    assert bootstrap(presets)[:2] == bootstrap(presets[:2])


def test_seeds_that_disagree_widen_the_interval() -> None:
    nats = np.random.default_rng(5).random((1, 100))
    agreeing = bootstrap([scores(np.repeat(nats, 4, axis=0), np.ones(100))])[0].score
    disagreeing = bootstrap([scores(nats + np.array([[-0.3], [-0.1], [0.1], [0.3]]), np.ones(100))])[0].score
    assert isclose(agreeing.value, disagreeing.value)
    assert disagreeing.half_width > 2 * agreeing.half_width


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Three hundred studies of documents and seeds whose true ratio is known; half of them would be a coin."""
    rng = np.random.default_rng(6)
    n_studies, truth, covered, covered_gap = 300, 1.0, 0, 0
    for study in range(n_studies):
        units = rng.integers(50, 500, 60).astype(float)
        difficulty = rng.normal(truth, 0.2, 60)
        presets = []
        for effect in (0.0, 0.03):
            seeds = rng.normal(effect, 0.02, (30, 1))
            presets.append(scores((difficulty + seeds + rng.normal(0, 0.02, (30, 60))) * units, units))
        first, second = bootstrap(presets, resamples=400, seed=study)
        assert second.difference is not None
        covered += first.score.low <= truth <= first.score.high
        covered_gap += second.difference.low <= 0.03 <= second.difference.high
    # Three standard errors of a share of 0.95 are 0.038, and percentile intervals of 30 draws run a little narrow.
    assert 0.89 <= covered / n_studies <= 0.99
    assert 0.89 <= covered_gap / n_studies <= 0.99


def test_three_seeds_cover_three_times_in_four() -> None:
    """The limit the notes state: without document noise the interval is worst seed to best seed."""
    rng, n_studies, covered = np.random.default_rng(7), 400, 0
    for study in range(n_studies):
        seeds = rng.normal(1.0, 0.1, (3, 1))
        score = bootstrap([scores(np.repeat(seeds, 5, axis=1), np.ones(5))], resamples=1000, seed=study)[0].score
        assert seeds.min() <= score.low + 1e-12 and score.high - 1e-12 <= seeds.max()
        covered += score.low <= 1.0 <= score.high
    assert 0.68 <= covered / n_studies <= 0.82


def test_bad_scores_are_refused() -> None:
    with pytest.raises(HRSError, match="2 seeds and 3 documents"):
        Scores(seeds=(0, 1), numerators=np.ones((2, 4)), denominators=np.ones(3))
    with pytest.raises(HRSError, match="no text"):
        Scores(seeds=(0,), numerators=np.ones((1, 2)), denominators=np.zeros(2))
    with pytest.raises(HRSError, match="different documents"):
        bootstrap([scores(np.ones((1, 3)), np.ones(3)), scores(np.ones((1, 4)), np.ones(4))])
    assert bootstrap([]) == []
