"""Scores of pairs against slow, obvious references, and on engrams whose answer is known."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from properties import examples

from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.evaluation import topic_pairs, topic_pieces
from hrs.evaluation.leaks import CausalMean, SkeletonLM
from hrs.evaluation.separation import Segments, hidden_engrams, segments_of, separate, token_counts
from hrs.evaluation.topic_pairs import (
    Engrams,
    PairScores,
    fit_classifier,
    fit_threshold,
    pair_features,
    pair_network,
    score_pairs,
)
from hrs.evaluation.topic_pieces import (
    Pieces,
    article_pieces,
    piece_engrams,
    sentence_pieces,
    sentences_of,
    sources_and_chance,
)
from hrs.models import build_model
from hrs.presets import experiment

Floats = NDArray[np.float64]


def engrams(n_documents: int, closeness: float, seed: int = 0, width: int = 8, per_document: int = 3) -> Engrams:
    """Each document's vector times ``closeness`` plus noise."""
    rng = np.random.default_rng(seed)
    documents = np.repeat(np.arange(n_documents), per_document)
    centres = rng.normal(size=(n_documents, width))
    return Engrams(
        vectors=closeness * centres[documents] + rng.normal(size=(len(documents), width)), documents=documents
    )


@pytest.fixture(scope="module")
def scored() -> dict[str, PairScores]:
    names = {"trained": 2.0, "weak": 0.5, "random": 0.0}
    fitted = {name: engrams(20, closeness, seed=1) for name, closeness in names.items()}
    held_out = {name: engrams(16, closeness, seed=2) for name, closeness in names.items()}
    return score_pairs(fitted, held_out, (0, 1))


# ---- the score -------------------------------------------------------------------------------------------------------


def test_scores_of_known_engrams_are_in_their_order_and_random_ones_are_chance(scored: dict[str, PairScores]) -> None:
    trained, weak, random = scored.values()
    assert trained.auc.low > 0.9 > weak.auc.value > 0.55
    assert trained.accuracy.low > 0.8 and trained.accuracy_classifier.low > 0.8
    assert random.auc.low < 0.5 < random.auc.high
    for chance in (random.accuracy, random.accuracy_classifier, random.auc_classifier):
        assert abs(chance.value - 0.5) < 0.12
    assert trained.above_trained is None
    assert weak.above_trained is not None and weak.above_trained.high < 0
    assert weak.above_trained.value == pytest.approx(weak.auc.value - trained.auc.value)
    for score in scored.values():
        assert score.majority == 0.5
        assert len(score.by_seed) == 2 and np.mean(score.by_seed) == pytest.approx(score.accuracy_classifier.value)
        assert score.difference.value == pytest.approx(score.accuracy_classifier.value - score.accuracy.value)
        assert (score.n_fitted_documents, score.n_documents) == (20, 16)
        assert (score.n_same, score.n_different) == (16 * 3, 16 * 15 // 2 * 9)
        json.dumps(score.to_dict())


def test_the_auc_of_the_cosine_is_that_of_the_separation_score(scored: dict[str, PairScores]) -> None:
    """Two programs for one number, intervals included: the draws are the same."""
    held_out = engrams(16, 0.5, seed=2)
    cut = Segments(tokens=np.zeros((48, 1), dtype=np.int64), documents=held_out.documents, topics=held_out.documents)
    reference = separate(held_out.vectors, cut)
    assert reference is not None
    assert scored["weak"].auc.value == pytest.approx(reference.auc)
    assert scored["weak"].auc.low == pytest.approx(reference.low, abs=0.01)
    assert scored["weak"].auc.high == pytest.approx(reference.high, abs=0.01)


def test_counts_of_a_resample_equal_counting_every_pair_as_often_as_drawn() -> None:
    rng = np.random.default_rng(0)
    documents = np.array([2, 0, 1, 0, 2, 3, 1, 3, 0])
    drawn = np.array([[1, 1, 1, 1], [2, 0, 1, 1], [0, 3, 1, 0], [4, 0, 0, 0]], dtype=float)
    pairs = list(itertools.combinations(range(9), 2))
    score = rng.normal(size=len(pairs)).round(1)  # with ties
    right = rng.random(len(pairs)) < 0.5
    found = topic_pairs._count(documents, [score], [right], drawn)
    assert found.auc.shape == found.accuracy.shape == (5, 1)
    for row, c in enumerate(np.vstack((np.ones(4), drawn))):
        weighed: dict[bool, list[tuple[float, bool, float]]] = {True: [], False: []}
        for (i, j), s, r in zip(pairs, score, right, strict=True):
            a, b = documents[i], documents[j]
            weighed[a == b].append((s, r, c[a] if a == b else c[a] * c[b]))
        if sum(w for *_, w in weighed[False]) == 0:
            assert np.isnan(found.auc[row, 0]) and np.isnan(found.accuracy[row, 0])
            continue
        accuracy = np.mean([np.average([r for _, r, _ in k], weights=[w for *_, w in k]) for k in weighed.values()])
        won = sum(
            v * w * ((x > y) + (x == y) / 2) for x, _, v in weighed[True] for y, _, w in weighed[False]
        ) / np.prod([sum(w for *_, w in kind) for kind in weighed.values()])
        assert found.accuracy[row, 0] == pytest.approx(accuracy)
        assert found.auc[row, 0] == pytest.approx(won)


def test_what_is_fitted_never_sees_the_held_out_articles() -> None:
    """On noise a threshold and a classifier look better on their own articles than on new ones."""
    gains = []
    for seed in range(3):
        fitted, held_out = ({"trained": engrams(6, 0.0, seed=100 * part + seed)} for part in (1, 2))
        (score,) = score_pairs(fitted, held_out, (0,)).values()
        gains.append(
            (score.accuracy_fitted - score.accuracy.value, score.accuracy_classifier_fitted - score.by_seed[0])
        )
    assert np.mean(gains, axis=0).min() > 0.03
    fitted, held_out = {"trained": engrams(6, 1.0)}, {"trained": engrams(6, 1.0, seed=1)}
    (one,) = score_pairs(fitted, held_out, (0,)).values()
    (other,) = score_pairs(fitted, {"trained": engrams(6, 1.0, seed=2)}, (0,)).values()
    assert one.threshold == other.threshold and one.accuracy_fitted == other.accuracy_fitted


# ---- threshold and classifier ----------------------------------------------------------------------------------------


@examples(80)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=14))
def test_the_threshold_is_the_best_of_all_for_kinds_of_equal_weight(pairs: list[tuple[int, bool]]) -> None:
    cosine, same = np.array([c for c, _ in pairs], dtype=float), np.array([s for _, s in pairs])
    if same.all() or not same.any():
        return
    best = max(topic_pairs._balanced((cosine > t) == same, same) for t in (-1, *cosine))
    assert topic_pairs._balanced((cosine > fit_threshold(cosine, same)) == same, same) == pytest.approx(
        best, rel=0, abs=1e-6
    )  # means of two shares of at most 13: unequal ones differ by 1 / (2 * 13^2) at least


def test_the_eight_features_are_what_they_say_and_have_no_order() -> None:
    vectors = np.random.default_rng(0).normal(size=(4, 6)) * np.array([[1], [2], [3], [0.1]])
    for row, (i, j) in zip(pair_features(vectors), itertools.combinations(range(4), 2), strict=True):
        a, b = vectors[i], vectors[j]
        norms = sorted((np.linalg.norm(a), np.linalg.norm(b)))
        product, difference = a * b, np.abs(a - b)
        expected = [a @ b / norms[0] / norms[1], np.linalg.norm(a - b), product.mean(), product.std()]
        np.testing.assert_allclose(row, [*expected, difference.mean(), difference.std(), *norms], atol=1e-9)
    swapped = pair_features(vectors[::-1])
    np.testing.assert_allclose(sorted(map(tuple, swapped)), sorted(map(tuple, pair_features(vectors))), atol=1e-9)
    equal = pair_features(np.ones((2, 3)))
    assert np.isfinite(equal).all() and equal[0, 0] == 1


def test_the_classifier_learns_what_no_threshold_of_the_cosine_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that differ in length of their engrams alone."""
    assert sum(p.numel() for p in pair_network().parameters()) == 1377

    def by_length(seed: int) -> Engrams:
        rng = np.random.default_rng(seed)
        documents = np.repeat(np.arange(12), 3)
        units = rng.normal(size=(36, 8))
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        return Engrams(vectors=units * (1 + documents[:, None]), documents=documents)

    state = torch.random.get_rng_state()
    (score,) = score_pairs({"trained": by_length(0)}, {"trained": by_length(1)}, (0, 1)).values()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert score.accuracy.value < 0.65
    assert score.accuracy_classifier.value > 0.85
    assert score.difference.low > 0.1


def test_a_classifier_is_its_seed() -> None:
    known = engrams(8, 1.0)
    features, same = pair_features(known.vectors), known.same()
    one, again, other = (fit_classifier(features, same, seed)(features) for seed in (0, 0, 1))
    assert (one == again).all() and (one != other).any()


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_sentences_end_at_full_stops_and_have_eight_to_forty_words() -> None:
    eight = "One two three four five six seven eight"
    first = f'{eight}. Too short. {eight}? "{eight}!" {eight} 3.5 and e.g. more.'
    text = f"{first}\n\nA heading of eight words or so it is\n{eight}"
    assert sentences_of(text) == [
        f"{eight}.",
        f"{eight}?",
        f'"{eight}!"',
        f"{eight} 3.5 and e.g. more.",
        "A heading of eight words or so it is",
        eight,
    ]
    assert sentences_of("word " * 40) == [("word " * 40).strip()]
    assert sentences_of("word " * 41) == [] == sentences_of("word " * 7)


def test_article_pieces_are_the_segments_of_the_separation_score(small_store: TokenStore) -> None:
    found, cut = article_pieces(small_store.validation, 32), segments_of(small_store.validation, 16)
    assert np.array_equal(np.stack(found.tokens), cut.tokens) and np.array_equal(found.documents, cut.documents)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    from hrs.config import DataConfig
    from hrs.data import open_tokens

    path = tmp_path_factory.mktemp("prose") / "prose.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(120):
            name = chr(97 + i % 26) * 3
            sentences = [f"Sentence {n} of {name} has quite a few {name} words here." for n in range(1 + i % 9)]
            split = "validation" if i % 4 == 0 else "train"
            file.write(json.dumps({"title": f"{i}", "text": " ".join(sentences), "split": split}) + "\n")
    return open_tokens(DataConfig(corpus=f"jsonl:{path}", tokenizer="bpe:280"), tmp_path_factory.mktemp("tokens"))


def test_sentence_pieces_are_whole_sentences_of_documents_with_two(prose: TokenStore) -> None:
    text, tokenizer = prose.validation, prose.tokenizer
    found = sentence_pieces(text, tokenizer, 1000)
    counts = np.bincount(found.documents)
    per_document = [1 + int(title) % 9 for title in text.titles]
    assert sorted(counts) == sorted(min(5, n) for n in per_document if n > 1)
    spoken = [tokenizer.decode(tokens.tolist()) for tokens in found.tokens]
    for number in range(len(counts)):
        own = [s for s, document in zip(spoken, found.documents, strict=True) if document == number]
        assert len(set(own)) == len(own) and len({s.split()[3] for s in own}) == 1, "of one document"
        assert own[0].startswith("Sentence 0 "), "spread evenly, from the first"
    cut = sentence_pieces(text, tokenizer, 6)
    assert [list(t) for t in cut.tokens] == [list(t[:6]) for t in found.tokens]
    other = sentence_pieces(text, tokenizer, 1000, seed=1)
    assert {tuple(t) for t in other.tokens} == {tuple(t) for t in found.tokens}, "all are taken, in another order"


def test_only_so_many_documents_are_drawn_and_too_few_are_one_sentence(
    prose: TokenStore, small_store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topic_pieces, "LARGEST_DOCUMENTS", 5)
    assert sentence_pieces(prose.validation, prose.tokenizer, 100).documents.max() == 4
    with pytest.raises(HRSError, match="need 4 documents with two sentences of 8 to 40 words and this split has 0"):
        sentence_pieces(small_store.validation, small_store.tokenizer, 100)


def test_every_piece_is_read_alone_whatever_the_others_lengths() -> None:
    torch.manual_seed(0)
    model = SkeletonLM(lambda width: CausalMean(), vocab_size=30, max_seq_len=12).double().eval()
    rng = np.random.default_rng(0)
    tokens = [rng.integers(30, size=length) for length in (5, 12, 1, 5, 7)]
    found = piece_engrams(lambda cut: hidden_engrams(model, cut), Pieces(tokens=tokens, documents=np.arange(5)))
    for engram, ids in zip(found, tokens, strict=True):
        alone = model.encode(torch.from_numpy(ids)[None]).hidden[0, :, : model.d_model].detach().mean(0)
        np.testing.assert_allclose(engram, alone, atol=1e-12)


def test_the_sources_are_the_model_and_what_it_has_to_beat() -> None:
    config = experiment("dense_baseline", "micro", 3, {"data.tokenizer": "bpe:300", "model.n_layers": 1})
    torch.manual_seed(3)
    fresh = build_model(config.model).eval()
    with torch.no_grad():
        trained = build_model(config.model).eval()
    sources = sources_and_chance(trained, config)
    assert list(sources) == ["trained", "untrained", "embeddings", "tokens", "random"]
    cut = Segments(
        tokens=np.random.default_rng(0).integers(300, size=(3, 9)), documents=np.arange(3), topics=np.arange(3)
    )
    assert np.array_equal(sources["untrained"](cut), hidden_engrams(fresh, cut))
    assert np.array_equal(sources["trained"](cut), hidden_engrams(trained, cut))
    assert not np.array_equal(sources["trained"](cut), sources["untrained"](cut))
    assert np.array_equal(sources["tokens"](cut), token_counts(cut, trained.vocab_size))
    assert not np.array_equal(sources["random"](cut), sources["random"](cut))
