"""Topic separation against slow, obvious references, and on engrams whose answer is known."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from properties import examples

from hrs import strict_json
from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.evaluation import separation
from hrs.evaluation.leaks import CausalMean, SkeletonLM
from hrs.evaluation.separation import (
    Segments,
    embedding_engrams,
    from_dict,
    hidden_engrams,
    measure_separation,
    segments_of,
    separate,
    to_dict,
    token_counts,
)
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment

Floats = NDArray[np.float64]


def segments(n_documents: int, per_document: int = 3, n_topics: int = 2) -> Segments:
    documents = np.repeat(np.arange(n_documents), per_document)
    tokens = np.random.default_rng(0).integers(9, size=(len(documents), 5))
    return Segments(tokens=tokens, documents=documents, topics=documents % n_topics)


def noise(cut: Segments, width: int = 16, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(len(cut.documents), width))


def by_document(cut: Segments, width: int = 16) -> Floats:
    """One random vector per document."""
    return np.random.default_rng(1).normal(size=(cut.documents.max() + 1, width))[cut.documents]


def naive_auc(engrams: Floats, cut: Segments, task: str, drawn: Floats | None = None) -> float:
    """Every pair that belongs together against every one that does not, as often as their documents are drawn."""
    drawn = np.ones(cut.documents.max() + 1) if drawn is None else drawn
    kinds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for i, j in itertools.combinations(range(len(engrams)), 2):
        d, e = cut.documents[i], cut.documents[j]
        if task == "topic" and (d == e or min(cut.topics[i], cut.topics[j]) < 0):
            continue
        cosine = engrams[i] @ engrams[j] / np.linalg.norm(engrams[i]) / np.linalg.norm(engrams[j])
        same = d == e if task == "document" else cut.topics[i] == cut.topics[j]
        kinds[bool(same)].append((round(cosine, 12), drawn[d] if d == e else drawn[d] * drawn[e]))
    won = total = 0.0
    for (near, weight), (far, other) in itertools.product(kinds[True], kinds[False]):
        won += weight * other * ((near > far) + (near == far) / 2)
        total += weight * other
    return won / total


# ---- the score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["document", "topic"])
@pytest.mark.parametrize("coarse", [False, True])
def test_auc_equals_counting_pairs(task: separation.Task, coarse: bool) -> None:
    """Also with many equal cosines, and for a document without topic."""
    cut = segments(6)
    cut.topics[cut.documents == 2] = -1
    engrams = noise(cut, 2).round() if coarse else noise(cut, 4)
    engrams[0] += 0.1  # none is zero
    score = separate(np.where(engrams.any(1, keepdims=True), engrams, 1.0), cut, task)
    assert score is not None
    assert score.auc == pytest.approx(naive_auc(np.where(engrams.any(1, keepdims=True), engrams, 1.0), cut, task))


@examples(60)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 3)), min_size=2, max_size=30),
)
def test_weights_count_pairs_as_often_as_they_say(pairs: list[tuple[int, bool, int]]) -> None:
    """The merged runs of pairs, too, are no approximation."""
    pairs.sort(key=lambda pair: pair[0])
    cosine, same, weights = (np.array(column) for column in zip(*pairs, strict=True))
    near = [c for c, s, w in pairs if s for _ in range(w)]
    far = [c for c, s, w in pairs if not s for _ in range(w)]
    found = separation._auc(same, weights.astype(float), separation._groups(cosine.astype(float), same))
    if not near or not far:
        assert np.isnan(found)
    else:
        won = [(a > b) + (a == b) / 2 for a, b in itertools.product(near, far)]
        # At most 90 votes on both sides: half a pair more or less changes it by 1 / (2 * 45^2) at least.
        assert found == pytest.approx(np.mean(won), rel=0, abs=1e-6)


def test_replicates_are_the_score_of_resampled_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separation, "RESAMPLES", 4)
    cut = segments(6)
    score = separate(noise(cut, 3), cut)
    drawn = np.random.default_rng([0, 6]).multinomial(6, np.full(6, 1 / 6), size=4).astype(float)
    assert score is not None
    assert score.replicates == pytest.approx([naive_auc(noise(cut, 3), cut, "document", d) for d in drawn])


def test_perfect_engrams_score_one_and_equal_ones_one_half() -> None:
    cut = segments(8)
    perfect, equal = separate(by_document(cut, 64), cut), separate(np.ones((24, 4)), cut)
    assert perfect is not None and equal is not None
    assert (perfect.auc, perfect.low, perfect.high) == (1, 1, 1)
    assert perfect.accuracy == 1 > perfect.majority
    assert (equal.auc, equal.low, equal.high) == (0.5, 0.5, 0.5)
    assert equal.accuracy == equal.majority
    assert (perfect.n_documents, perfect.n_same, perfect.n_different) == (8, 24, 252)


def test_the_interval_holds_the_truth_about_noise_and_narrows_with_documents() -> None:
    """95 % intervals around chance hold one half in about 19 of 20 draws."""
    widths = {}
    for n_documents in (10, 40):
        cut = segments(n_documents)
        scores = [separate(noise(cut, 8, seed), cut) for seed in range(12)]
        assert sum(s is not None and s.low <= 0.5 <= s.high for s in scores) >= 9
        widths[n_documents] = np.mean([s.high - s.low for s in scores if s is not None])
    assert widths[40] < 0.7 * widths[10]


def test_accuracy_is_counted_on_documents_that_the_threshold_never_saw() -> None:
    """On noise a fitted threshold beats the majority, on the fitted pairs alone."""
    fitted, held_out = [], []
    for seed in range(10):
        cut = segments(4, per_document=2)
        score = separate(noise(cut, 4, seed), cut)
        assert score is not None
        held_out.append(score.accuracy - score.majority)
        cosine, same = np.sort(np.random.default_rng(seed).normal(size=6)), np.array([1, 0, 0, 0, 0, 1], dtype=bool)
        threshold = separation._best_threshold(cosine, same)
        fitted.append(((cosine > threshold) == same).mean() - 2 / 3)
    assert min(fitted) > 0
    assert np.mean(held_out) < 0


@examples(60)
@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12))
def test_the_best_threshold_is_the_best_of_all(pairs: list[tuple[int, bool]]) -> None:
    pairs.sort()
    cosine, same = np.array([c for c, _ in pairs], dtype=float), np.array([s for _, s in pairs])
    right = ((cosine > separation._best_threshold(cosine, same)) == same).sum()
    assert right == max(((cosine > t) == same).sum() for t in (-1, *cosine))


def test_topics_are_judged_between_documents_alone() -> None:
    cut = segments(12)
    own = by_document(cut, 64)
    alone = separate(own, cut, "topic")
    shared = separate(own + 20 * np.eye(64)[cut.topics], cut, "topic")
    assert alone is not None and shared is not None
    assert alone.auc < 0.7, "segments of one document are equal, which must not count"
    assert shared.auc == 1


def test_a_task_without_both_kinds_of_pairs_has_no_score() -> None:
    cut = segments(6, n_topics=1)
    assert separate(noise(cut), cut, "topic") is None
    cut.topics[:] = -1
    assert separate(noise(cut), cut, "topic") is None


def test_few_pairs_are_enough_for_an_auc_if_not_for_a_threshold() -> None:
    cut = segments(4)
    cut.topics[:] = np.array([0, 0, 1, -1])[cut.documents]
    score = separate(noise(cut), cut, "topic")
    assert score is not None
    assert 0 <= score.auc <= 1
    assert np.isnan(score.accuracy) or 0 <= score.accuracy <= 1
    unknown = dataclasses.replace(score, accuracy=math.nan, replicates=(0.5, math.nan))
    read = from_dict(json.loads(strict_json.dumps(to_dict({"topic": {"trained": unknown}}))))["topic"]["trained"]
    assert math.isnan(read.accuracy) and read.replicates[0] == 0.5 and math.isnan(read.replicates[1])


# ---- segments and engrams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 16, 40])
def test_segments_lie_apart_inside_documents(small_store: TokenStore, length: int) -> None:
    text = small_store.validation
    cut = segments_of(text, length)
    assert cut.tokens.shape == (len(cut.documents), length)
    assert not (cut.tokens == small_store.eot_id).any()
    sizes = np.diff(text.document_starts) - 1
    assert np.array_equal(np.bincount(cut.documents), np.minimum(4, sizes[sizes >= 2 * length] // length))
    for number, document in enumerate(np.flatnonzero(sizes >= 2 * length)):
        start, end = text.document_starts[document], text.document_starts[document + 1] - 1
        rows, position = cut.tokens[cut.documents == number], 0
        for row in rows:  # each is found behind the one before
            places = range(position, end - start - length + 1)
            position = length + next(p for p in places if (text.tokens[start + p : start + p + length] == row).all())
        assert set(cut.topics[cut.documents == number]) == {text.topic_ids[document]}


def test_only_so_many_documents_are_drawn(small_store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separation, "LARGEST_DOCUMENTS", 5)
    cut, other = segments_of(small_store.validation, 8), segments_of(small_store.validation, 8, seed=1)
    assert cut.documents.max() == other.documents.max() == 4
    assert not np.array_equal(cut.tokens, other.tokens)


def test_documents_that_are_too_short_are_one_sentence(small_store: TokenStore) -> None:
    with pytest.raises(HRSError, match="needs 4 documents with two segments of 500 tokens and this split has 0"):
        segments_of(small_store.validation, 500)


def model(store: TokenStore) -> LanguageModel:
    torch.manual_seed(0)
    return SkeletonLM(lambda width: CausalMean(), vocab_size=store.vocab_size, max_seq_len=40).train()


def test_engrams_are_means_over_a_segment_read_alone(small_store: TokenStore) -> None:
    made, cut = model(small_store), segments_of(small_store.validation, 20)
    hidden, embedded = hidden_engrams(made, cut), embedding_engrams(made, cut)
    assert made.training
    counts = token_counts(cut, small_store.vocab_size)
    assert counts.sum(1).tolist() == [20] * len(cut.tokens)
    made.eval()
    for i, row in enumerate(cut.tokens):
        ids = torch.from_numpy(row)
        np.testing.assert_allclose(hidden[i], made.encode(ids[None]).hidden[0].detach().mean(0), atol=1e-6)
        np.testing.assert_allclose(embedded[i], made.input_embedding(ids).detach().mean(0), atol=1e-6)
        assert counts[i, row[0]] == (row == row[0]).sum()


def test_a_run_is_measured_with_its_controls(small_store: TokenStore) -> None:
    """The untrained model is the one that training with this seed starts from, whatever the caller's generator does."""
    overrides = {"data.tokenizer": "bpe:300", "model.n_layers": 1, "model.max_seq_len": 48}
    config = experiment("dense_baseline", "micro", 3, overrides)
    torch.manual_seed(3)
    fresh = build_model(config.model)
    state = torch.random.get_rng_state()
    found = measure_separation(fresh, config, small_store)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(found) == ["document", "topic"]
    for scores in found.values():
        assert list(scores) == ["trained", "untrained", "embeddings", "tokens"]
        assert scores["trained"] == scores["untrained"] != scores["embeddings"]
    assert found["topic"]["tokens"].low > 0.6, "topics of the small corpus have words of their own"
    cut = segments_of(small_store.validation, 24)
    assert found["document"]["embeddings"] == separate(embedding_engrams(fresh, cut), cut)
    assert from_dict(json.loads(strict_json.dumps(to_dict(found)))) == found
