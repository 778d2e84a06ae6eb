"""The stress tests on embeddings whose answer is known: one that knows the topics, and ones that know nothing."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from properties import examples

from hrs.retrieval.topics import stress
from hrs.retrieval.topics.stress_result import StressResult, Thresholds, pair_rates, purity, random_embed, summary
from hrs.retrieval.topics.stress_texts import PIECE_WORDS, STORIES, TOPICS, text_about

Floats = NDArray[np.float64]

OWNER = {word: i for i, words in enumerate(TOPICS.values()) for word in words}


def oracle(text: str) -> Floats:
    """How often each topic's words occur; for stories the subject, which their words alone do not tell."""
    counts = np.zeros(len(TOPICS) + 2 * len(STORIES))
    for i, story in enumerate(STORIES):
        counts[len(TOPICS) + 2 * i] += text in (*story.plain, story.borrowed)
        counts[len(TOPICS) + 2 * i + 1] += text in story.lender
    if not counts.any():
        for word in text.split():
            if word in OWNER:
                counts[OWNER[word]] += 1
    return counts


def words_alone(text: str) -> Floats:
    """The story's subject and its lender swapped for the borrowed telling: fooled by vocabulary."""
    for i, story in enumerate(STORIES):
        if text == story.borrowed:
            return oracle(STORIES[i].lender[0])
    return oracle(text)


def constant(text: str) -> Floats:
    return np.ones(4)


NAMES = ["drift", "overlap", "adversarial vocabulary", "fork", "threshold sweep", "rapid switching", "scale"]


@pytest.fixture(scope="module")
def suites() -> dict[str, dict[str, StressResult]]:
    embeds = {"oracle": oracle, "constant": constant, "random": random_embed(200)}
    return {
        name: {r.name: r for r in stress.stress_suite(embed, Thresholds.of(0.8), draws=2)}
        for name, embed in embeds.items()
    }


def test_an_embedding_that_knows_the_topics_passes_all_seven(suites: dict[str, dict[str, StressResult]]) -> None:
    """Where two topics are mixed, as in the overlap, even the truth has a limit: there the shared topic wins."""
    found = suites["oracle"]
    assert list(found) == NAMES
    for name in ("drift", "adversarial vocabulary", "threshold sweep", "rapid switching", "scale"):
        assert (found[name].together, found[name].apart, found[name].passed) == (1, 1, True), name
    levels = found["overlap"].details
    assert (levels["together"][0], levels["apart"][0], levels["clusters"][0], levels["purity"][0]) == (1, 1, 2, 1)
    assert levels["apart"][-1] == 0 and levels["clusters"][-1] == 1, "at full overlap there is one topic"
    assert levels["purity_shuffled"][0] < 1
    assert found["fork"].together == 1 and found["fork"].details["unforked_clusters"] == 1


@pytest.mark.parametrize(("blind", "together", "apart"), [("constant", 1, 0), ("random", 0, 1)])
def test_the_controls_expose_embeddings_that_know_nothing(
    suites: dict[str, dict[str, StressResult]], blind: str, together: int, apart: int
) -> None:
    """One is perfect in what belongs together, the other in what does not; neither passes, and both score one half."""
    for name, result in suites[blind].items():
        assert not result.passed
        assert result.low <= result.balanced <= result.high
        if name == "threshold sweep":  # which looks for the best, and finds nothing on other topics
            assert result.balanced == pytest.approx(0.5, abs=0.1)
        else:
            assert (result.together, result.apart) == (together, apart), name
            assert result.balanced == 0.5


def test_lumping_all_topics_fails_every_test_even_with_an_embedding_that_knows_them() -> None:
    """A join threshold near minus one: the trap of a test that asks for what belongs together alone."""
    for result in stress.stress_suite(oracle, Thresholds(join=-0.9, merge=-0.5), draws=1):
        if result.name != "threshold sweep":
            assert (result.together, result.apart, result.passed) == (1, 0, False), result.name


def test_an_embedding_fooled_by_borrowed_words_fails_the_adversarial_test_alone() -> None:
    fooled = stress.adversarial_vocabulary(words_alone, Thresholds.of(0.8))
    assert fooled.together == 0 and fooled.details["nearer_subject"] == 0
    assert fooled.apart == pytest.approx(0.8), "of five things to tell apart one is told wrongly"
    assert stress.adversarial_vocabulary(oracle, Thresholds.of(0.8)).details["nearer_subject"] == 1


def test_drift_tells_topics_that_are_carried_away() -> None:
    """With a low threshold to join the centroid follows to the last topic; with a high one it stays where it began."""
    carried = stress.drift(oracle, Thresholds(join=0.05, merge=0.99), draws=3).details
    stayed = stress.drift(oracle, Thresholds(join=0.9, merge=0.99), draws=3).details
    assert (carried["carried_away"], carried["steps"]) == (1, 1)
    assert stayed["carried_away"] == 0 and stayed["steps"] > 1
    assert carried["cosine_to_start"] < 0.8 < stayed["cosine_to_start"]


def test_a_fork_is_no_licence_to_split() -> None:
    """A threshold that splits everything tells the branches apart and fails on the conversation that never forks."""
    split = stress.fork(random_embed(200), Thresholds.of(0.8), draws=2)
    assert (split.together, split.apart) == (0, 1)
    assert split.details["clusters"] == split.details["unforked_clusters"] == 9


def test_the_sweep_chooses_and_counts_on_different_topics_and_shuffled_labels_give_a_half() -> None:
    found = stress.threshold_sweep(random_embed(12), draws=6)
    assert len(found.details["chosen"]) == 6 and set(found.details["chosen"]) <= set(stress.SWEEP)
    assert found.details["balanced_shuffled"] == pytest.approx(0.5, abs=0.06)
    known = stress.threshold_sweep(oracle, draws=2).details
    assert known["balanced_shuffled"] == pytest.approx(0.5, abs=0.12), "labels in random order mean nothing"
    assert known["together"][0] == 1 and known["apart"][0] < 1
    assert len(known["join"]) == len(known["clusters"]) == 20


def test_the_context_of_rapid_switching_is_mostly_of_the_turns_topic(
    suites: dict[str, dict[str, StressResult]],
) -> None:
    """Half of the budget is the most recent topic's by right; recency alone gives less than an even share of five."""
    told, blind = (suites[name]["rapid switching"].details for name in ("oracle", "constant"))
    assert told["context_own"] > 0.45 > 0.25 > told["recent_own"]
    assert blind["context_own"] == pytest.approx(blind["recent_own"]), "one topic for everything is recency"


def test_results_are_the_same_again_and_travel_as_json(suites: dict[str, dict[str, StressResult]]) -> None:
    again = stress.scale(oracle, Thresholds.of(0.8), draws=1)
    assert again == stress.scale(oracle, Thresholds.of(0.8), draws=1)
    for result in suites["oracle"].values():
        told = json.loads(json.dumps(result.to_dict()))
        assert told["balanced"] == result.balanced and told["passed"] is result.passed
        assert StressResult(**{k: v for k, v in told.items() if k not in ("balanced", "passed")}) == result


# ---- the measures ----------------------------------------------------------------------------------------------------


@examples(60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12))
def test_rates_and_purity_equal_counting(pairs: list[tuple[int, int]]) -> None:
    labels, found = zip(*pairs, strict=True)
    kinds: dict[bool, list[bool]] = {True: [], False: []}
    for (a, x), (b, y) in itertools.combinations(pairs, 2):
        kinds[a == b].append((x == y) == (a == b))
    expected = [np.mean(kinds[kind]) if kinds[kind] else np.nan for kind in (True, False)]
    # Shares of at most 66 pairs and 12 texts: unequal ones differ by 1 / 66^2 at least, roundings make 1e-15.
    np.testing.assert_allclose(pair_rates(labels, found), expected, rtol=0, atol=1e-6)
    commonest = [max(sum(p == (a, x) for p in pairs) for a in set(labels)) for x in set(found)]
    assert purity(labels, found) == pytest.approx(sum(commonest) / len(pairs), rel=0, abs=1e-6)


def test_labels_without_meaning_score_one_half_however_many_topics_there_are() -> None:
    rng = np.random.default_rng(0)
    for n_clusters in (1, 2, 5, 40):
        found = rng.integers(n_clusters, size=40)
        rates = [np.mean(pair_rates(rng.permutation(np.repeat(np.arange(5), 8)), found)) for _ in range(300)]
        assert np.mean(rates) == pytest.approx(0.5, abs=0.01)


def test_an_interval_holds_the_mean_and_one_draw_has_none() -> None:
    result = summary("x", [(1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 1.0)], {})
    assert (result.together, result.apart, result.balanced) == (0.75, 0.75, 0.75)
    assert 0.5 <= result.low < 0.75 < result.high <= 1
    alone = summary("x", [(1.0, 0.5)], {})
    assert alone.low == alone.high == alone.balanced


@pytest.mark.parametrize("join", [-0.9, 0.0, 0.5, 0.85, 0.95, 0.99])
def test_the_merge_threshold_is_always_above_the_join_threshold(join: float) -> None:
    made = Thresholds.of(join)
    assert made.join < made.merge < 1
    assert Thresholds.of(0.5) == Thresholds()


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_there_are_fifty_topics_without_a_word_in_common() -> None:
    assert len(TOPICS) == 50 and {len(words) for words in TOPICS.values()} == {10}
    assert len(OWNER) == 500


@examples(40)
@given(st.integers(0, 10**6), st.integers(1, 10), st.integers(0, 10))
def test_a_mixed_text_has_its_topics_in_their_shares(seed: int, n_pieces: int, part: int) -> None:
    rng = np.random.default_rng(seed)
    words = text_about({"sea": part / 10, "wine": 1 - part / 10}, n_pieces * PIECE_WORDS, rng).split()
    assert len(words) == n_pieces * PIECE_WORDS
    pieces = [words[i : i + PIECE_WORDS] for i in range(0, len(words), PIECE_WORDS)]
    owners = [{topic for topic in ("sea", "wine") if set(TOPICS[topic]) & set(piece)} for piece in pieces]
    assert all(len(owner) == 1 for owner in owners)
    assert owners.count({"sea"}) == round(part / 10 * n_pieces)
