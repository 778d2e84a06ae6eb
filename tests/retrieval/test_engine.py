"""The engine against the batch alone, against one forward pass per token, and against the definition of its parts."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_models import CONTEXT, filled_store, small_model
from torch import Tensor

from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.generation import SampledToken, Sampling, window_length
from hrs.generation.batching import ContinuousBatch
from hrs.models import LanguageModel
from hrs.models.base import WindowContext
from hrs.retrieval.calibration import Calibration, calibrate_entropies
from hrs.retrieval.engine import RetrievalEngine
from hrs.retrieval.engrams import engrams, model_fingerprint
from hrs.retrieval.entropy import Gate, GateSettings
from hrs.retrieval.retriever import RetrievalEvent, RetrievalOptions, Retriever
from hrs.retrieval.store import EngramStore, Hit

OFTEN = GateSettings(threshold_bits=3.0, window=3, cooldown=8)
"""Fires every 9 tokens: these untrained models are sure of nothing."""
PROMPTS = [[5, 6, 7], [8], list(range(40, 40 + CONTEXT)), list(range(100, 161))]


@dataclass(frozen=True)
class Setting:
    """A model and memories of the training text of the small corpus."""

    model: LanguageModel
    data: TokenStore
    store: EngramStore

    def engine(self, **more: object) -> RetrievalEngine:
        return RetrievalEngine(self.model, self.data.tokenizer, self.store, **more)  # type: ignore[arg-type]

    def retriever(self, **more: object) -> Retriever:
        return Retriever(self.model, self.data.tokenizer, self.store, **more)  # type: ignore[arg-type]


def setting(kind: str, data: TokenStore, path: Path) -> Setting:
    model = small_model(kind)
    return Setting(model, data, filled_store(model, data, path))


@pytest.fixture(scope="module")
def reads(small_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A model that takes memory."""
    return setting("retrieved", small_store, tmp_path_factory.mktemp("reads"))


@pytest.fixture(scope="module")
def plain(small_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """One that takes none."""
    return setting("none", small_store, tmp_path_factory.mktemp("plain"))


def run(engine: RetrievalEngine) -> dict[int, list[tuple[SampledToken, RetrievalEvent | None]]]:
    told: dict[int, list[tuple[SampledToken, RetrievalEvent | None]]] = {}
    while engine.n_active:
        for token, event in engine.step():
            told.setdefault(token.row, []).append((token, event))
    return told


def alone(model: LanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[SampledToken]]:
    batch = ContinuousBatch(model, n_slots=8)
    numbers = [batch.add(prompt, sampling) for prompt in prompts]
    told: dict[int, list[SampledToken]] = {number: [] for number in numbers}
    while batch.n_active:
        for token in batch.step():
            told[token.row].append(token)
    return list(told.values())


# ---- without retrieval -----------------------------------------------------------------------------------------------


def test_without_retrieval_the_engine_is_the_batch(reads: Setting) -> None:
    """The same tokens, chances and entropies, to the bit and past the context; also for one that only observes."""
    sampling = Sampling(max_new_tokens=50, seed=3, repetition_penalty=1.1)
    expected = alone(reads.model, PROMPTS, sampling)
    engine = reads.engine()
    asked = [None, RetrievalOptions(enabled=False), RetrievalOptions(mode="observe", gate=OFTEN), None]
    numbers = [engine.add(p, sampling, options) for p, options in zip(PROMPTS, asked, strict=True)]
    told = run(engine)
    assert [[token for token, _ in told[number]] for number in numbers] == expected
    summaries = [engine.summary(number) for number in numbers]
    assert [s.n_tokens for s in summaries] == [50] * 4
    assert [s.share_injected for s in summaries] == [0.0] * 4
    assert [s.n_events > 0 for s in summaries] == [False, False, True, False]
    assert summaries[2].n_used == 0
    assert [engine.text(n) for n in numbers] == [
        p + [token.id for token in row] for p, row in zip(PROMPTS, expected, strict=True)
    ]


def test_a_neighbour_that_retrieves_changes_nothing(reads: Setting) -> None:
    sampling = Sampling(max_new_tokens=40, seed=1)
    expected = alone(reads.model, [PROMPTS[1]], sampling)[0]
    engine = reads.engine(n_slots=2)
    for options in (None, RetrievalOptions(mode="both", gate=OFTEN), RetrievalOptions(mode="text", gate=OFTEN)):
        engine.add(PROMPTS[1], sampling, options)
    told = run(engine)
    assert [(t.id, t.finish) for t, _ in told[0]] == [(t.id, t.finish) for t in expected]
    assert [t.log_prob for t, _ in told[0]] == pytest.approx([t.log_prob for t in expected], abs=1e-9)
    ids = [[t.id for t, _ in told[n]] for n in (0, 1, 2)]
    assert ids[0] != ids[1] != ids[2] != ids[0], "and retrieval does change what it is asked to change"


# ---- what a token was sampled from -----------------------------------------------------------------------------------


def expected_reply(
    setting: Setting,
    prompt: list[int],
    told: list[tuple[SampledToken, RetrievalEvent | None]],
    options: RetrievalOptions,
) -> list[float]:
    """Log probability of each token told, by a forward pass of its own over what the requirements say is read.

    Slots are the memory of all positions here, so it stands for text modes, and for the first token after a prefill.
    """
    text, held, prefix, expected = list(prompt), 0, list[int](), []
    for token, event in told:
        if held:
            room = CONTEXT - len(prefix)
            read = prefix + text[-window_length(len(text), room, room // 2) :]
        else:
            read = text[-window_length(len(text), CONTEXT, CONTEXT // 2) :]
        with torch.no_grad():
            logits = setting.model(torch.tensor([read])).logits
        assert logits is not None
        expected.append(float(logits[0, -1].log_softmax(-1)[token.id]))
        text.append(token.id)
        held = max(held - 1, 0)
        if event is not None and event.hits:
            newline = setting.data.tokenizer.encode("\n", add_special_tokens=False).ids
            prefix, held = [], options.hold
            for hit in event.hits:  # the best is next to the text; one that does not fit is cut
                most = min(options.context_tokens, CONTEXT // 2) - len(prefix) - len(newline)
                if most > 0:
                    ids = setting.data.tokenizer.encode(hit.memory.text, add_special_tokens=False).ids
                    prefix = ids[:most] + newline + prefix
    return expected


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize(("hold", "context_tokens"), [(5, 9), (8, 128), (40, 16)])
def test_spliced_text_is_what_the_model_reads(
    plain: Setting, prompt: list[int], hold: int, context_tokens: int
) -> None:
    """Every token of the reply, before, within and after injection, past the context, and with one upon another."""
    options = RetrievalOptions(
        mode="text", gate=OFTEN, hold=hold, context_tokens=context_tokens, k=2, min_similarity=-1.0
    )
    engine = plain.engine()
    number = engine.add(prompt, Sampling(max_new_tokens=70, seed=2), options)
    told = run(engine)[number]
    events = [event for _, event in told if event is not None]
    assert [event.step for event in events] == list(range(2, 69, 9)), "the gate of three hard tokens and cooldown 8"
    assert [token.log_prob for token, _ in told] == pytest.approx(
        expected_reply(plain, prompt, told, options), abs=1e-9
    )
    assert engine.text(number) == prompt + [token.id for token, _ in told], "the request's own text has no other"
    assert all(0 < event.n_tokens <= min(context_tokens, CONTEXT // 2) and not event.n_slots for event in events)
    held = {event.step + i for event in events for i in range(1, hold + 1)} & set(range(70))
    summary = engine.summary(number)
    assert summary.n_injected == len(held) and summary.share_injected == len(held) / 70
    assert (summary.n_tokens, summary.n_events, summary.n_used) == (70, len(events), len(events))


def test_slots_are_what_the_model_reads(reads: Setting) -> None:
    """Against decoding each token with the slots it should read: those of the last firing, for five tokens."""
    options = RetrievalOptions(mode="slots", gate=OFTEN, hold=5, k=3, min_similarity=-1.0)
    engine, prompt = reads.engine(), [5, 6, 7]
    number = engine.add(prompt, Sampling(max_new_tokens=CONTEXT - len(prompt), seed=2), options)
    told = run(engine)[number]
    cache, read, memory, held = reads.model.new_cache(1), torch.tensor([prompt]), None, 0
    for token, event in told:
        cache.memory = memory
        logits = reads.model.decode(read, cache).logits
        assert logits is not None
        assert token.log_prob == pytest.approx(float(logits[0, -1].log_softmax(-1)[token.id]), abs=1e-9)
        read, held = torch.tensor([[token.id]]), max(held - 1, 0)
        memory = memory if held else None
        if event is not None:
            assert event.n_slots == 3 and event.n_tokens == 0
            memory, held = torch.from_numpy(np.stack([hit.key for hit in event.hits])).double()[None], options.hold
    assert engine.summary(number).n_used == 3


def test_the_modes_are_separate(reads: Setting) -> None:
    """Each reads its own part, and none of them is another: the chances after the first firing differ pairwise."""
    after = {}
    for mode in ("observe", "slots", "text", "both"):
        engine = reads.engine()
        options = RetrievalOptions(mode=mode, gate=OFTEN, min_similarity=-1.0)  # type: ignore[arg-type]
        engine.add(PROMPTS[0], Sampling(max_new_tokens=4), options)
        told = run(engine)[0]
        event = told[2][1]
        assert event is not None and event.mode == mode and len(event.hits) == 4
        assert (event.n_slots > 0) == (mode in ("slots", "both")) and (event.n_tokens > 0) == (mode in ("text", "both"))
        after[mode] = told[3][0].entropy
        assert told[2][0].entropy == pytest.approx(after.get("before", told[2][0].entropy), abs=1e-9)
        after["before"] = told[2][0].entropy
    del after["before"]
    assert len({round(entropy, 6) for entropy in after.values()}) == 4, after


# ---- events ----------------------------------------------------------------------------------------------------------


def test_an_event_tells_what_was_sought_and_found(plain: Setting) -> None:
    """The query is the engram of the last segment of the own text, the hits are the store's own."""
    engine = plain.engine(segment_tokens=7)
    options = RetrievalOptions(mode="text", gate=OFTEN, k=3, min_similarity=0.1)
    number = engine.add(PROMPTS[0], Sampling(max_new_tokens=30, seed=5), options)
    text, gate, n_events = list(PROMPTS[0]), Gate.of(OFTEN), 0
    for step, (token, event) in enumerate(run(engine)[number]):
        text.append(token.id)
        fires = gate.push(token.entropy) and token.finish is None
        assert fires == (event is not None)
        if event is None:
            continue
        n_events += 1
        assert event.step == step and event.entropy == gate.rolling.mean and event.query == tuple(text[-7:])
        expected = plain.store.search(engrams(plain.model, [text[-7:]]), 3, min_similarity=0.1)[0]
        assert [hit.memory.id for hit in event.hits] == [hit.memory.id for hit in expected]
        assert [hit.similarity for hit in event.hits] == pytest.approx([hit.similarity for hit in expected], abs=1e-6)
        told = json.loads(json.dumps(event.to_dict()))
        assert told["similarity"] == event.similarity == max(hit["similarity"] for hit in told["hits"])
        assert [hit["id"] for hit in told["hits"]] == [hit.memory.id for hit in expected]
    assert n_events == 3


def test_filters_are_the_requests_own(plain: Setting) -> None:
    engine = plain.engine()
    everything = RetrievalOptions(gate=OFTEN, k=30, min_similarity=-1.0, mode="observe")
    asked = [
        everything,
        dataclasses.replace(everything, topics=("sea",)),
        dataclasses.replace(everything, exclude_sources=("train:0", "train:4")),
        dataclasses.replace(everything, min_similarity=0.999999),
        dataclasses.replace(everything, k=2),
    ]
    numbers = [engine.add([9], Sampling(max_new_tokens=4), options) for options in asked]
    told = run(engine)
    events = [told[number][2][1] for number in numbers]
    assert all(event is not None for event in events)
    hits = [event.hits for event in events if event is not None]
    assert [len(found) for found in hits] == [30, 10, 28, 0, 2]
    assert {hit.memory.topic for hit in hits[1]} == {"sea"}
    assert {hit.memory.source for hit in hits[0]} - {hit.memory.source for hit in hits[2]} == {"train:0", "train:4"}
    assert hits[0][:2] == hits[4] or [h.memory.id for h in hits[0][:2]] == [h.memory.id for h in hits[4]]
    assert events[3] is not None and events[3].similarity is None and events[3].n_tokens == 0


def test_nothing_found_leaves_the_reply_alone(plain: Setting) -> None:
    sampling = Sampling(max_new_tokens=20, seed=4)
    options = RetrievalOptions(mode="text", gate=OFTEN, topics=("of which there are none",))
    engine = plain.engine()
    engine.add(PROMPTS[0], sampling, options)
    told = run(engine)[0]
    assert [t.id for t, _ in told] == [t.id for t in alone(plain.model, PROMPTS[:1], sampling)[0]]
    assert engine.summary(0).n_events == 2 and engine.summary(0).n_used == engine.summary(0).n_injected == 0


def test_one_pass_serves_all_that_fire_at_once(plain: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none runs while no gate fires: the model encodes as often as the engine says."""
    encoded: list[int] = []
    encode = plain.model.encode

    def counted(tokens: Tensor, context: WindowContext | None = None) -> object:
        encoded.append(len(tokens))
        return encode(tokens, context)

    monkeypatch.setattr(plain.model, "encode", counted)
    engine = plain.engine()
    for _ in range(3):
        engine.add([9, 10, 11], Sampling(max_new_tokens=14, seed=1), RetrievalOptions(gate=OFTEN))
    run(engine)
    assert encoded == [3, 3], "at tokens 2 and 11, of three requests"


def test_slots_may_be_made_of_memories(reads: Setting) -> None:
    """What a model learned to read need not be the key: another maker of slots is asked for them."""

    def made(hits: Sequence[Hit]) -> Tensor:
        return torch.full((2 * len(hits), reads.model.d_model), 0.5)

    options = RetrievalOptions(mode="slots", gate=OFTEN, k=3, min_similarity=-1.0)
    engines = reads.engine(), reads.engine(slots=made)
    told = []
    for engine in engines:
        engine.add([5], Sampling(max_new_tokens=4), options)
        told.append(run(engine)[0])
    events = [row[2][1] for row in told]
    assert [event.n_slots for event in events if event is not None] == [3, 6]
    assert told[0][3][0].entropy != told[1][3][0].entropy


# ---- context ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_context", [6, CONTEXT])
def test_a_context_stands_in_front_for_as_long_as_the_reply_lasts(plain: Setting, n_context: int) -> None:
    """It is no part of the text, and of a long one the end is read; against one forward pass per token."""
    context = list(range(200, 200 + n_context))
    engine, prompt = plain.engine(), PROMPTS[3]
    number = engine.add(prompt, Sampling(max_new_tokens=40, seed=2), context=context)
    text, prefix = list(prompt), context[-CONTEXT // 2 :]
    for token, _ in run(engine)[number]:
        room = CONTEXT - len(prefix)
        read = prefix + text[-window_length(len(text), room, room // 2) :]
        with torch.no_grad():
            logits = plain.model(torch.tensor([read])).logits
        assert logits is not None
        assert token.log_prob == pytest.approx(float(logits[0, -1].log_softmax(-1)[token.id]), abs=1e-9)
        text.append(token.id)
    assert engine.text(number) == text
    assert engine.summary(number).share_injected == 0


# ---- ending ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_slot_and_keeps_its_summary(plain: Setting) -> None:
    engine = plain.engine(n_slots=1)
    options = RetrievalOptions(gate=OFTEN, min_similarity=-1.0)
    first, second = (engine.add(PROMPTS[0], Sampling(max_new_tokens=5, seed=s), options) for s in (1, 2))
    assert (engine.n_active, engine.n_waiting) == (1, 1)
    for _ in range(4):
        engine.step()
    engine.cancel(first)
    engine.cancel(first)
    assert engine.summary(first).n_tokens == 4 and engine.summary(first).n_injected == 1
    assert (engine.n_active, engine.n_waiting) == (1, 0)
    assert [len(row) for row in run(engine).values()] == [5]
    assert engine.summary(second).n_events == 1
    for unknown in (-1, 2):
        with pytest.raises(HRSError, match=f"no request {unknown}"):
            engine.summary(unknown)


def test_a_request_ends_at_the_end_of_text_whatever_the_gate_says(plain: Setting) -> None:
    """The token that ends a reply sets off nothing, even where the gate fires on it."""
    engine = plain.engine()
    probe = engine.add([9], Sampling(max_new_tokens=3, seed=1), RetrievalOptions(gate=OFTEN))
    third = run(engine)[probe][2][0]
    assert third.finish == "length"
    engine = plain.engine(end_id=third.id)
    number = engine.add([9], Sampling(max_new_tokens=9, seed=1), RetrievalOptions(gate=OFTEN))
    told = run(engine)[number]
    assert [(token.finish, event) for token, event in told] == [(None, None), (None, None), ("end_of_text", None)]


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_at_once(plain: Setting, reads: Setting, tmp_path: Path) -> None:
    sampling, data = Sampling(max_new_tokens=2), plain.data
    engine = plain.engine()
    for mode in ("slots", "both"):
        with pytest.raises(HRSError, match="needs a model that reads memories"):
            engine.add([9], sampling, RetrievalOptions(mode=mode, gate=OFTEN))  # type: ignore[arg-type]
    with pytest.raises(HRSError, match="needs a gate"):
        engine.add([9], sampling, RetrievalOptions())
    with pytest.raises(HRSError, match="needs an engram store"):
        RetrievalEngine(plain.model, data.tokenizer, None).add([9], sampling, RetrievalOptions(gate=OFTEN))
    with pytest.raises(HRSError, match="outside the model's vocabulary"):
        engine.add([9], sampling, context=[300])
    assert (engine.n_active, engine.n_waiting) == (0, 0), "a refused request takes no slot"
    with pytest.raises(HRSError, match="engram store belongs to model"):
        RetrievalEngine(reads.model, data.tokenizer, plain.store)
    with pytest.raises(HRSError, match="engrams of block None and block -2 is asked for"):
        plain.engine(block=-2)
    plain.model.train()
    try:
        with pytest.raises(HRSError, match="training mode"):
            plain.retriever()
    finally:
        plain.model.eval()
    calibration = calibrate_entropies(np.arange(50.0), np.array([1, 50]), model_fingerprint(reads.model))
    with pytest.raises(HRSError, match="entropies of two models do not compare"):
        plain.engine(calibration=calibration)
    with pytest.raises(HRSError, match="segment_tokens must lie between"):
        plain.engine(segment_tokens=CONTEXT + 1)


def test_the_calibrated_gate_is_used_unless_the_request_brings_one(plain: Setting) -> None:
    calibration: Calibration = calibrate_entropies(
        np.full(50, 3.0), np.array([1, 50]), model_fingerprint(plain.model), window=4, cooldown=1
    )
    engine = plain.engine(calibration=calibration)
    engine.add([9], Sampling(max_new_tokens=8), RetrievalOptions(mode="observe"))
    engine.add([9], Sampling(max_new_tokens=8), RetrievalOptions(mode="observe", gate=OFTEN))
    told = run(engine)
    assert [[t for t, (_, event) in enumerate(told[n]) if event is not None] for n in (0, 1)] == [[3], [2]]
