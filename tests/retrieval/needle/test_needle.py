"""Needles: planted whole, ranked as a store would rank them, answered as the model would; controls at chance."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest
from sklearn.feature_extraction.text import TfidfVectorizer

from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.models import LanguageModel, build_model
from hrs.models.base import WindowContext
from hrs.presets import experiment
from hrs.retrieval.engrams import engrams, model_fingerprint
from hrs.retrieval.needle.answers import Reading, answer, contains_answer, continuations, log_probs, readings
from hrs.retrieval.needle.plan import (
    TEMPLATES,
    Field,
    Needle,
    NeedlePlan,
    draw_alternatives,
    draw_needle,
)
from hrs.retrieval.needle.ranks import RANKERS, inverse_frequencies, rank_of, rank_trials, word_cosines, words
from hrs.retrieval.needle.report import draw_heat_map, format_tables, page
from hrs.retrieval.needle.result import NeedleResult, mean_interval, measure_needles, measurement_key, wilson
from hrs.retrieval.segments import Cut, read_segments
from hrs.retrieval.store import EngramStore, NewMemory

CONTEXT = 160
PLAN = NeedlePlan(
    cut=Cut(length=70),
    split="train",
    haystack_segments=4,
    depths=(0.0, 0.5, 1.0),
    distractors=(0, 3, 12),
    trials=8,
    new_tokens=6,
)


def make_model(kind: str = "none") -> LanguageModel:
    torch.manual_seed(0)
    overrides = {"data.tokenizer": "bpe:300", "model.max_seq_len": str(CONTEXT), "model.engram.kind": kind}
    model = build_model(experiment("dense_baseline", "micro", 0, overrides).model)
    for parameter in model.parameters():  # gates that begin at nothing would hide memory
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return make_model()


@pytest.fixture(scope="module")
def field(small_store: TokenStore) -> Field:
    return Field(small_store, PLAN)


@pytest.fixture(scope="module")
def result(model: LanguageModel, small_store: TokenStore) -> NeedleResult:
    return finish(model, small_store, PLAN)


def finish(model: LanguageModel, tokens: TokenStore, plan: NeedlePlan) -> NeedleResult:
    steps = measure_needles(model, tokens, plan)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: NeedleResult = end.value
            return found


# ---- needles and haystacks -------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(0, len(TEMPLATES) - 1))
def test_a_needle_tells_its_answer_once_and_its_question_never(seed: int, template: int) -> None:
    needle = draw_needle(np.random.default_rng(seed), template)
    assert words(needle.fact)[needle.answer.lower()] == 1 and needle.fact.startswith(needle.cloze)
    assert needle.answer.lower() not in words(needle.question) and needle.name in needle.question
    answers = draw_alternatives(np.random.default_rng(seed), needle, 10)
    assert answers[0] == needle.answer and len(set(answers)) == 10
    assert all(a.isdigit() == (needle.kind == "number") for a in answers)


@pytest.mark.parametrize("depth", range(3))
def test_the_needle_is_whole_in_one_segment_at_its_depth(field: Field, depth: int) -> None:
    for number in range(PLAN.trials):
        trial = field.trial(depth, number)
        assert [len(s.ids) for s in trial.segments] == [PLAN.cut.length] * PLAN.haystack_segments
        holding = [i for i, s in enumerate(trial.segments) if trial.needle.fact in field.text(s)]
        assert holding == [trial.target]
        assert not any(trial.needle.name in field.text(s) for i, s in enumerate(trial.segments) if i != trial.target)
        if depth != 1:
            assert trial.target == (0 if depth == 0 else PLAN.haystack_segments - 1)
        else:
            assert trial.target in (1, 2)


def test_trials_follow_from_the_plan_alone(field: Field, small_store: TokenStore) -> None:
    again, one = Field(small_store, PLAN).trial(1, 3), field.trial(1, 3)
    assert again.needle == one.needle
    assert [s.ids.tolist() for s in again.segments] == [s.ids.tolist() for s in one.segments]
    needles = {field.trial(d, n).needle for d in range(3) for n in range(PLAN.trials)}
    assert len(needles) == 3 * PLAN.trials


def test_distractors_are_of_other_articles_and_every_second_has_a_needle(field: Field) -> None:
    pool = field.distractors()
    assert [len(s.ids) for s in pool] == [PLAN.cut.length] * 12
    stems = [t[0].split("{}")[0] for t in TEMPLATES]
    texts = [field.text(s) for s in pool]
    assert [any(stem in text for stem in stems) for text in texts] == [True, False] * 6
    grams = {tuple(s.ids[i : i + 25]) for s in pool for i in range(PLAN.cut.length - 24)}
    for depth in range(3):
        for segment in field.trial(depth, 0).segments:
            assert not grams & {tuple(segment.ids[i : i + 25]) for i in range(PLAN.cut.length - 24)}


def test_what_does_not_fit_is_refused(small_store: TokenStore, model: LanguageModel) -> None:
    with pytest.raises(HRSError, match="depths must lie between 0 and 1"):
        NeedlePlan(cut=Cut(length=70), depths=(0.0, 1.5))
    with pytest.raises(HRSError, match="numbers of distractors must rise"):
        NeedlePlan(cut=Cut(length=70), distractors=(16, 4))
    with pytest.raises(HRSError, match="too few for 256 distractors and a haystack of 16 segments"):
        Field(small_store, NeedlePlan(cut=Cut(length=70)))
    short = NeedlePlan(cut=Cut(length=12, fewest=12), split="train", distractors=(0,))
    with pytest.raises(HRSError, match=r"a needle of \d+ tokens does not fit into a segment of 12"):
        Field(small_store, short).trial(0, 0)
    long = NeedlePlan(cut=Cut(length=150), split="train", haystack_segments=2, distractors=(0,), trials=8)
    with pytest.raises(HRSError, match="tokens and the model's context is 160: make segments shorter"):
        finish(model, small_store, long)


# ---- ranking ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_a_rank_counts_what_is_higher_and_draws_among_equals(values: list[int], data: st.DataObject) -> None:
    scores, target = np.array(values, dtype=float), data.draw(st.integers(0, len(values) - 1))
    higher = sum(v > values[target] for v in values)
    ranks = {rank_of(scores, target, np.random.default_rng(seed)) for seed in range(40)}
    assert min(ranks) > higher and max(ranks) <= higher + values.count(values[target])


def test_all_equal_scores_are_worth_chance() -> None:
    rng = np.random.default_rng(0)
    ranks = Counter(rank_of(np.zeros(5), 2, rng) for _ in range(5000))
    assert all(abs(ranks[r] - 1000) < 120 for r in range(1, 6))


def test_word_overlap_is_that_of_scikit_learn() -> None:
    texts = ["The code of the Marlow lighthouse is 4817.", "the sea, the sea", "A lighthouse stands", ""]
    question = "What is the code of the Marlow lighthouse?"
    bags = [words(text) for text in texts]
    vectors = TfidfVectorizer(token_pattern=r"\w+").fit(texts)
    expected = (vectors.transform(texts) @ vectors.transform([question]).T).toarray()[:, 0]
    weights = inverse_frequencies(bags)
    asked = Counter({w: n for w, n in words(question).items() if w in weights})  # scikit-learn forgets the others
    np.testing.assert_allclose(word_cosines(bags, asked, weights), expected, atol=1e-9)
    np.testing.assert_allclose(word_cosines(bags, words(question), weights), expected, atol=1e-9)
    assert word_cosines(bags, words(question))[3] == 0


@pytest.mark.parametrize("normalisation", ["none", "centred", "whitened"])
def test_ranks_are_places_in_a_real_store(
    normalisation: str, model: LanguageModel, field: Field, tmp_path: Path
) -> None:
    trials = [field.trial(1, number) for number in range(4)]
    ranker = "engram" if normalisation == "none" else f"engram, {normalisation}"
    pool = field.distractors()
    for number, (trial, found) in enumerate(zip(trials, rank_trials(model, field, PLAN, trials), strict=True)):
        store = EngramStore.open(
            tmp_path / str(number),
            fingerprint=model_fingerprint(model),
            width=model.d_model,
            normalisation=normalisation,  # type: ignore[arg-type]
        )
        segments = trial.segments + pool
        new = [NewMemory(text=field.text(s), entropy=None, source=str(i), topic=None) for i, s in enumerate(segments)]
        store.add(new, read_segments(model, segments)[0])
        if normalisation != "none":
            store.fit()
        question = engrams(model, [field.ids(trial.needle.question).tolist()])
        hits = store.search(question, len(segments))[0]
        place = next(i for i, hit in enumerate(hits, start=1) if hit.memory.source == str(trial.target))
        assert found.ranks[ranker][-1] == place  # type: ignore[index]
        if normalisation == "none":
            assert field.text(found.retrieved) == hits[0].memory.text
            np.testing.assert_array_equal(found.keys["retrieved"], hits[0].key)


def test_words_find_every_needle_and_an_untrained_model_does_not(result: NeedleResult) -> None:
    assert result.recall("tf-idf", 2, 1).value > 0.9
    assert result.recall("engram", 2, 1).low < 0.3 and result.chance(2, 1) == 1 / 16
    assert result.ranks["engram"].shape == (3, 8, 3)
    for ranker in RANKERS:
        ranks = result.ranks[ranker]
        assert ranks.min() >= 1 and all(ranks[..., level].max() <= result.n_segments(level) for level in range(3))
    # More segments never make a rank better, but for what is fitted to them and for ties that are drawn anew.
    assert (np.diff(result.ranks["engram"], axis=2) >= 0).all()


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_the_echo_of_the_question_counts_nothing() -> None:
    needle = Needle(0, "Marlow", "4817")
    assert contains_answer(" 4817. The code", needle) and contains_answer("it is 4817", needle)
    assert not contains_answer("The code of the Marlow lighthouse", needle)
    assert not contains_answer(" 48171", needle) and not contains_answer("", needle)
    assert not contains_answer("Marlow", Needle(4, "Marlow", "marlow"))


@pytest.mark.parametrize("kind", ["none", "retrieved"])
def test_log_probabilities_are_those_of_a_full_pass(kind: str) -> None:
    model, rng = make_model(kind), np.random.default_rng(0)
    pairs = []
    for n, n_value in ((5, 2), (9, 3), (5, 2), (5, 4)):
        memory = rng.normal(size=(1, model.d_model)).astype(np.float32) if kind == "retrieved" else None
        pairs.append((Reading(ids=rng.integers(300, size=n).tolist(), memory=memory), rng.integers(300, size=n_value)))
    for (read, value), found in zip(pairs, log_probs(model, pairs), strict=True):
        context = None if read.memory is None else WindowContext(memory=torch.from_numpy(read.memory)[None])
        with torch.no_grad():
            log_p = model(torch.tensor([[*read.ids, *value]]), context).logits[0].double().log_softmax(-1)
        expected = sum(log_p[len(read.ids) - 1 + i, t].item() for i, t in enumerate(value))
        assert found == pytest.approx(expected, abs=1e-4)
    if kind == "retrieved":  # the slots are read at all
        without = log_probs(model, [(Reading(ids=r.ids), v) for r, v in pairs])
        assert np.abs(np.array(without) - log_probs(model, pairs)).min() > 1e-4


def test_a_model_that_learnt_the_facts_tells_them(field: Field) -> None:
    """The measure can reach its top: nothing retrieved, the needles are in the weights."""
    trials = [field.trial(0, number) for number in (0, 4)]
    model = make_model().train()
    facts = [field.ids(f"{t.needle.cloze} {t.needle.answer}.").tolist() for t in trials]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        for fact in facts:
            logits = model(torch.tensor([fact[:-1]])).logits[0]
            torch.nn.functional.cross_entropy(logits, torch.tensor(fact[1:])).backward()
        optimizer.step()
    model.eval()
    read = [Reading(ids=field.ids(t.needle.cloze).tolist()) for t in trials]
    answers = answer(model, field, dataclasses.replace(PLAN, new_tokens=16), trials, read)
    assert [(a.rank, a.found) for a in answers] == [(1, True)] * 2


def test_without_knowledge_the_value_is_first_as_often_as_chance(model: LanguageModel, small_store: TokenStore) -> None:
    plan = NeedlePlan(
        cut=PLAN.cut, split="train", haystack_segments=1, depths=(0.5,), distractors=(0,), trials=120, new_tokens=2
    )
    field = Field(small_store, plan)
    trials = [field.trial(0, number) for number in range(plan.trials)]
    answers = answer(model, field, plan, trials, [Reading(ids=field.ids(t.needle.cloze).tolist()) for t in trials])
    assert 0.02 < np.mean([a.rank == 1 for a in answers]) < 0.22
    assert 4.5 < np.mean([a.rank for a in answers]) < 6.5
    assert not any(a.found for a in answers)


def test_shuffled_memory_is_another_needles_of_the_same_kind(model: LanguageModel, field: Field) -> None:
    trials = [field.trial(1, number) for number in range(PLAN.trials)]
    found = list(rank_trials(model, field, PLAN, trials))
    ways = readings(field, trials, found, slots=True)
    assert len(ways) == 7
    for number, trial in enumerate(trials):
        own, other = (field.decode(ways[way][number].ids) for way in ("text, right", "text, shuffled"))
        assert trial.needle.fact in own and own.endswith(f"\n{trial.needle.cloze}")
        assert trial.needle.fact not in other and other.endswith(f"\n{trial.needle.cloze}")
        (source,) = (t.needle for t in trials if t.needle.fact in other)
        assert source.kind == trial.needle.kind
        np.testing.assert_array_equal(ways["slots, right"][number].memory, found[number].keys["right"][None])
    with pytest.raises(HRSError, match="no other needle has a number for a value"):
        readings(field, trials[:1], found[:1], slots=False)


def test_a_model_that_takes_memory_is_asked_with_slots_too(small_store: TokenStore) -> None:
    plan = NeedlePlan(
        cut=PLAN.cut, split="train", haystack_segments=2, depths=(0.5,), distractors=(2,), trials=8, new_tokens=3
    )
    model = make_model("retrieved")
    result = finish(model, small_store, plan)
    assert [way for way in result.answers if way.startswith("slots")] == [
        "slots, right",
        "slots, shuffled",
        "slots, retrieved",
    ]
    assert result.gain("slots, right", "none").value != 0
    assert "slots: the right memory makes the value" in format_tables(result)


def test_continuations_hold_no_part_of_what_was_read(model: LanguageModel, field: Field) -> None:
    ids = field.ids("The wave and the tide").tolist()
    (text,) = continuations(model, field, [Reading(ids=ids)], 5)
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert text == field.decode(ids[-5:])


# ---- results ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.data())
def test_shares_have_wilson_intervals(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    interval = wilson(hits, n)
    assert interval.value == hits / n
    assert (interval.low, interval.high) == pytest.approx(
        (expected.low, expected.high), rel=0, abs=1e-7
    )  # the quantile 1.959964 has seven digits, 1.6e-8 off, and a bound moves by less than the quantile does


def test_means_have_intervals_that_shrink_with_needles() -> None:
    values = np.random.default_rng(0).normal(2, 1, size=400)
    wide, narrow = mean_interval(values[:40]), mean_interval(values)
    assert narrow.low < values.mean() < narrow.high
    assert narrow.half_width == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert wide.half_width > 2 * narrow.half_width


def test_recall_and_reciprocal_rank_are_those_of_the_ranks(result: NeedleResult) -> None:
    ranks = result.ranks["engram"]
    assert result.recall("engram", 2, 5).value == (ranks[:, :, 2] <= 5).mean()
    assert result.recall("engram", 2, 5, depth=1).value == (ranks[1, :, 2] <= 5).mean()
    assert result.reciprocal_rank("engram", 0).value == pytest.approx((1 / ranks[:, :, 0]).mean())
    assert result.chance_reciprocal_rank(0) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert result.chance(0, 5) == 1.0


def test_the_report_shows_everything(result: NeedleResult, tmp_path: Path) -> None:
    tables = format_tables(result)
    assert "24 needles" not in tables and "8 needles at each of the depths 0, 0.5, 1" in tables
    assert tables.count("chance") == 4 and "text, shuffled" in tables and "5.50" in tables
    text = page(result, "Needles", "python jobs/needle.py x")
    assert "![recall](needle.png)" in text and text.count("**needle**") == 3
    draw_heat_map(result, tmp_path / "needle.png")
    with Image.open(tmp_path / "needle.png") as image:
        assert image.size[0] > 1000 and len(image.getcolors(10**7)) > 50
    document = json.loads(result.to_json())
    assert np.array_equal(document["ranks"]["tf-idf"], result.ranks["tf-idf"])
    assert document["metrics"]["recall_1/tf-idf/12"] == result.recall("tf-idf", 2, 1).value


def test_the_same_plan_gives_the_same_result_under_the_same_key(model: LanguageModel, small_store: TokenStore) -> None:
    plan = NeedlePlan(
        cut=PLAN.cut, split="train", haystack_segments=2, depths=(0.5,), distractors=(0, 3), trials=8, new_tokens=2
    )
    assert finish(model, small_store, plan).to_json() == finish(model, small_store, plan).to_json()
    keys = {measurement_key(plan, m, "d") for plan in (PLAN, NeedlePlan(cut=PLAN.cut)) for m in ("a", "b")}
    assert len(keys) == 4 and measurement_key(PLAN, "a", "d") in keys
