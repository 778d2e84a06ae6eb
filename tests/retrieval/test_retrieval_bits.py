"""The walk over true tokens against generation of the same tokens, its control against the definition, its report."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_models import CONTEXT, filled_store, first_documents, small_model

from hrs.data import TokenStore
from hrs.data.store import TokenSplit
from hrs.errors import HRSError
from hrs.generation import SampledToken, Sampling, window_length
from hrs.retrieval.bits import RetrievalReport, Walked, follow_retrieval, measure_retrieval, retrieval_bits
from hrs.retrieval.engine import RetrievalEngine
from hrs.retrieval.entropy import GateSettings
from hrs.retrieval.retriever import RetrievalEvent, RetrievalOptions, Retriever
from hrs.retrieval.store import Hit
from hrs.retrieval.walk import Walk

OFTEN = GateSettings(threshold_bits=3.0, window=3, cooldown=8)
ANYTHING = RetrievalOptions(gate=OFTEN, min_similarity=-1.0, k=2, hold=5, context_tokens=9)


def retriever_of(kind: str, data: TokenStore, path: Path, split: str = "train", **overrides: object) -> Retriever:
    model = small_model(kind, **overrides)
    return Retriever(model, data.tokenizer, filled_store(model, data, path, split))


@pytest.fixture(scope="module")
def reads(small_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    """A model that takes memory."""
    return retriever_of("retrieved", small_store, tmp_path_factory.mktemp("reads"))


# ---- the walk --------------------------------------------------------------------------------------------------------


def generated_and_walked(
    engine: RetrievalEngine, reads: Retriever, options: RetrievalOptions, n: int
) -> tuple[int, list[tuple[SampledToken, RetrievalEvent | None]], Walk]:
    """A reply of ``n`` tokens, what the engine told of it, and a walk over the same text."""
    number = engine.add([7], Sampling(max_new_tokens=n, seed=3), options)
    told = []
    while engine.n_active:
        told += engine.step()

    def find(own: Sequence[int]) -> tuple[Hit, ...]:
        return reads.find(reads.queries([reads.segment(own)])[0], options)

    walk = Walk(reads, engine.text(number), options, find, None)
    walk.run()
    return number, told, walk


@pytest.mark.parametrize(
    ("mode", "hold"),
    [("observe", 5), ("slots", 5), ("slots", 23), ("text", 5), ("text", 23), ("both", 8), ("both", 23)],
)
def test_a_walk_over_generated_text_has_the_chances_it_was_generated_with(
    reads: Retriever, mode: str, hold: int
) -> None:
    """Same losses, same firings, same share under injection, over three windows and with overlapping retrievals."""
    options = dataclasses.replace(ANYTHING, mode=mode, hold=hold)  # type: ignore[arg-type]
    engine = RetrievalEngine(reads.model, reads.tokenizer, reads.store)
    number, told, walk = generated_and_walked(engine, reads, options, 70)
    assert walk.nats == pytest.approx([-token.log_prob for token, _ in told], abs=1e-9)
    # The token that ends a reply sets off nothing, and a walk knows no end.
    assert [place - 1 for place in walk.fired if place < 70] == [event.step for _, event in told if event is not None]
    assert walk.n_injected == engine.summary(number).n_injected
    assert walk.n_used - (70 in walk.fired) * (mode != "observe") == engine.summary(number).n_used
    assert (walk.n_injected > 0) == (mode != "observe")


def test_history_is_read_where_a_window_begins(small_store: TokenStore, tmp_path: Path) -> None:
    """A model that reads what stands before its window walks with the chances it generates with."""
    windows = {"model.engram.window": 4, "model.engram.per_window": 2}
    retriever = retriever_of("recurrence", small_store, tmp_path, **windows)
    assert retriever.model.history_tokens
    engine = RetrievalEngine(retriever.model, small_store.tokenizer, retriever.store)
    _, told, walk = generated_and_walked(engine, retriever, ANYTHING, 50)
    assert walk.nats == pytest.approx([-token.log_prob for token, _ in told], abs=1e-9)


def test_logits_are_made_a_few_at_a_time(reads: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for the logits of five positions the walk is the same."""
    ids = list(range(7, 60))
    nats = []
    for most in (2**24, 5 * reads.model.vocab_size):
        monkeypatch.setattr("hrs.retrieval.walk._MAX_LOGITS", most)
        walk = Walk(reads, ids, ANYTHING, lambda own: reads.find(reads.queries([own[-9:]])[0], ANYTHING), None)
        walk.run()
        nats.append(walk.nats)
    assert nats[0] == pytest.approx(nats[1], abs=1e-9)


# ---- a split ---------------------------------------------------------------------------------------------------------


def test_off_is_the_loss_of_each_document_alone(reads: Retriever, small_store: TokenStore) -> None:
    """Against one forward pass per token; the end-of-text token behind a document is no part of it."""
    text = first_documents(small_store, 2)
    walked = retrieval_bits(reads, text, ANYTHING, sources=["a", "b"], control="off")
    for row in range(2):
        start, end = text.document_starts[row], text.document_starts[row + 1] - 1
        ids = [small_store.eot_id, *text.tokens[start:end].tolist()]
        assert ids.count(small_store.eot_id) == 1
        bits = 0.0
        for n in range(1, len(ids)):
            with torch.no_grad():
                window = ids[n - window_length(n, CONTEXT, CONTEXT // 2) : n]
                logits = reads.model(torch.tensor([window])).logits
            assert logits is not None
            bits -= float(logits[0, -1].log_softmax(-1)[ids[n]]) / math.log(2)
        assert walked.bits[row] == pytest.approx(bits, abs=1e-7)
        assert walked.n_tokens[row] == len(ids) - 1
        assert walked.n_bytes[row] == len(small_store.tokenizer.decode(ids[1:]).encode())
    assert (walked.n_events, walked.n_used, walked.share_injected, walked.similarity) == (0, 0, 0.0, None)


def test_no_document_is_given_its_own_text(
    small_store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memories are the documents themselves: without their names each would mostly find itself."""
    retriever = retriever_of("none", small_store, tmp_path, "test")
    text, given = first_documents(small_store, 4), list[tuple[str, ...]]()
    find = retriever.find

    def watched(query: np.ndarray, options: RetrievalOptions) -> tuple[Hit, ...]:
        hits = find(query, options)
        given.append((options.exclude_sources[-1], *(hit.memory.source for hit in hits)))
        return hits

    monkeypatch.setattr(retriever, "find", watched)
    names = text.titles
    for control in ("right", "shuffled"):
        given.clear()
        retrieval_bits(retriever, text, ANYTHING, control=control)  # type: ignore[arg-type]
        assert len(given) > 20 and all(own not in found for own, *found in given)
    given.clear()
    retrieval_bits(retriever, text, ANYTHING, sources=[f"another name:{i}" for i in range(4)])
    assert any(hit in names for _, *found in given for hit in found), "they would be found"


def test_the_control_asks_with_another_documents_text(
    reads: Retriever, small_store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every query is the engram of an end of another document, and neither document's own memories are found."""
    text, asked = first_documents(small_store, 2), list[tuple[np.ndarray, tuple[str, ...]]]()
    ends = {}
    for name, start in zip(text.titles, text.document_starts, strict=False):
        ids = text.tokens[start : start + 60].tolist()
        ends[name] = reads.queries([reads.segment(ids[:n]) for n in range(1, 61)])
    find = reads.find

    def watched(query: np.ndarray, options: RetrievalOptions) -> tuple[Hit, ...]:
        asked.append((query, options.exclude_sources))
        return find(query, options)

    monkeypatch.setattr(reads, "find", watched)
    walked = retrieval_bits(reads, text, ANYTHING, control="shuffled")
    assert walked.n_used == walked.n_events == len(asked) > 8
    for query, (own, other) in asked:
        assert own != other
        assert np.abs(ends[other] - query).max(axis=1).min() < 1e-5 < np.abs(ends[own] - query).max(axis=1).min()
    again = retrieval_bits(reads, text, ANYTHING, control="shuffled")
    assert np.array_equal(walked.bits, again.bits), "the draws follow from the seed"
    with pytest.raises(HRSError, match="needs a document of another source"):
        retrieval_bits(reads, text, ANYTHING, sources=["a"] * 2, control="shuffled")


def test_a_gate_that_never_fires_measures_nothing(reads: Retriever, small_store: TokenStore) -> None:
    """Right, shuffled and off are then the same numbers, and every interval of a difference is 0."""
    never = dataclasses.replace(ANYTHING, gate=GateSettings(threshold_bits=99.0))
    text = first_documents(small_store, 3)
    report = measure_retrieval(reads, text, never, sources=["a", "b", "c"])
    assert report.documents["right"] == report.documents["shuffled"] == report.documents["off"]
    assert {(gap.value, gap.low, gap.high) for gap in (report.right_minus_off, report.right_minus_shuffled)} == {
        (0, 0, 0)
    }
    assert {condition.n_events for condition in report.conditions.values()} == {0}


def test_the_report_pairs_documents(reads: Retriever, small_store: TokenStore) -> None:
    text = first_documents(small_store, 4)
    options = dataclasses.replace(ANYTHING, mode="text")
    report = measure_retrieval(reads, text, options, sources=list("abcd"))
    n_bytes = text.n_bytes
    total = {control: sum(bits) / n_bytes.sum() for control, bits in report.documents.items()}
    for control, condition in report.conditions.items():
        assert condition.bits_per_byte.value == pytest.approx(total[control])
        assert condition.bits_per_byte.low <= condition.bits_per_byte.value <= condition.bits_per_byte.high
    for gap, first, second in (
        (report.right_minus_off, "right", "off"),
        (report.shuffled_minus_off, "shuffled", "off"),
        (report.right_minus_shuffled, "right", "shuffled"),
    ):
        assert gap.value == pytest.approx(total[first] - total[second])  # type: ignore[index]
        each = (np.array(report.documents[first]) - np.array(report.documents[second])) / n_bytes  # type: ignore[index]
        assert each.min() - 1e-9 <= gap.low <= gap.value <= gap.high <= each.max() + 1e-9
    held = report.conditions["right"]
    assert held.n_events == held.n_used > 0 and 0.3 < held.share_injected < 5 / 9 + 0.01
    assert held.similarity is not None and held.similarity > (report.conditions["shuffled"].similarity or 0) - 1
    assert (report.n_documents, report.n_bytes) == (4, n_bytes.sum())
    assert report.document_bytes == n_bytes.tolist()
    assert RetrievalReport.from_json(report.to_json()) == report
    assert report.options["gate"]["cooldown"] == 8


def test_the_first_documents_are_walked_one_after_the_other(reads: Retriever, small_store: TokenStore) -> None:
    """Those with text: they count, and the walk tells of each."""
    text = first_documents(small_store, 4)
    n_bytes = text.n_bytes.copy()
    n_bytes[1] = 0
    walking = follow_retrieval(reads, dataclasses.replace(text, n_bytes=n_bytes), ANYTHING, documents=2)
    told = []
    while True:
        try:
            told.append(next(walking))
        except StopIteration as end:
            report = end.value
            break
    assert told == [
        Walked(control=control, done=done, total=2)  # type: ignore[arg-type]
        for control in ("right", "shuffled", "off")
        for done in (1, 2)
    ]
    assert report.document_bytes == text.n_bytes[[0, 2]].tolist()
    off = retrieval_bits(reads, text, ANYTHING, control="off", documents=3)
    assert report.documents["off"] == off.bits[[0, 2]].tolist()
    assert len(retrieval_bits(reads, text, ANYTHING, control="off", documents=99).bits) == 4


@pytest.mark.parametrize("spoilt", ["[]", "{", '{"options": {}}'])
def test_a_file_that_is_no_report_is_refused(spoilt: str) -> None:
    with pytest.raises(HRSError, match="no report of retrieval"):
        RetrievalReport.from_json(spoilt)


def test_what_cannot_be_measured_is_refused(reads: Retriever, small_store: TokenStore) -> None:
    text: TokenSplit = first_documents(small_store, 1)
    refused: Sequence[tuple[str, dict[str, object]]] = (
        ("name the source of every document", {"sources": []}),
        ("unknown control 'none'", {"sources": ["a"], "control": "none"}),
        ("needs a gate", {"sources": ["a"], "options": RetrievalOptions()}),
        ("on 1 document or more, got 0", {"sources": ["a"], "documents": 0}),
        ("no text to measure", {"sources": ["a"], "text": dataclasses.replace(text, n_bytes=np.zeros(1, np.int64))}),
    )
    for said, changes in refused:
        given: dict[str, object] = {"text": text, "options": ANYTHING} | changes
        with pytest.raises(HRSError, match=said):
            retrieval_bits(reads, **given)  # type: ignore[arg-type]
    assert json.loads(json.dumps(dataclasses.asdict(ANYTHING)))["gate"]["window"] == 3
