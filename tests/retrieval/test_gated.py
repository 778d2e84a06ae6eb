"""Gated retrieval of one model: its gate from validation text, its memories once, its result as a file."""

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_models import small_model

from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.models import LanguageModel
from hrs.retrieval.calibration import calibrate
from hrs.retrieval.gated import GatedPlan, GatedResult, SetGate, measure_gated, set_gate, training_memories
from hrs.retrieval.retriever import RetrievalOptions, Retriever
from hrs.retrieval.segments import cut_split, default_cut

PLAN = GatedPlan(options=RetrievalOptions(min_similarity=-1.0, context_tokens=9), documents=2, quantile=0.5)


def ended(steps: Generator[str, None, Any]) -> tuple[list[str], Any]:
    """All lines, and what is returned."""
    lines = []
    while True:
        try:
            lines.append(next(steps))
        except StopIteration as end:
            return lines, end.value


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return small_model("none")


def test_the_gate_is_the_calibrated_one_or_fires_above_fixed_bits(
    model: LanguageModel, small_store: TokenStore
) -> None:
    calibration = calibrate(model, small_store.validation, quantile=0.5, release_quantile=0.5)
    assert set_gate(model, small_store, PLAN) == SetGate(
        settings=calibration.settings, share_fired=calibration.share_fired
    )
    low, high = (set_gate(model, small_store, dataclasses.replace(PLAN, threshold_bits=bits)) for bits in (0.0, 99.0))
    assert (low.settings.threshold_bits, low.settings.release_bits) == (0.0, None)
    # Open all the time, it fires at the first full window of a document and then as its cooldown lets it.
    lengths = np.diff(small_store.validation.document_starts)
    period, window = low.settings.cooldown + 1, low.settings.window
    expected = sum(len(range(window, length + 1, period)) for length in lengths)
    assert low.share_fired == pytest.approx(expected / lengths.sum())
    assert high.share_fired == 0


def test_memories_are_the_training_text_and_filled_once(
    model: LanguageModel, small_store: TokenStore, tmp_path: Path
) -> None:
    lines, memories = ended(training_memories(model, small_store, tmp_path))
    segments = cut_split(small_store, "train", default_cut(model, "isolated"))
    assert [memory.source for memory in memories.list()] == [segment.source for segment in segments]
    assert lines[0].startswith("reading") and f"adding {len(segments):,} of {len(segments):,} segments" in lines
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert memories.path == folder and not (folder / "readings").exists()
    again, same = ended(training_memories(model, small_store, tmp_path))
    assert again == [] and same.path == folder and len(same) == len(segments)
    (folder / "whole.json").unlink()
    lines, _ = ended(training_memories(model, small_store, tmp_path))
    assert lines, "a store that was not finished is filled on"
    assert len(same) == len(segments), "and none of its memories is added twice"


def test_a_result_is_a_file_that_names_its_gate(model: LanguageModel, small_store: TokenStore, tmp_path: Path) -> None:
    _, memories = ended(training_memories(model, small_store, tmp_path))
    gate = set_gate(model, small_store, PLAN)
    retriever = Retriever(model, small_store.tokenizer, memories)
    lines, result = ended(measure_gated(retriever, small_store, PLAN, gate, len(memories)))
    assert [line for line in lines if "2 of 2" in line] == [
        f"{control}: 2 of 2 documents" for control in ("right", "shuffled", "off")
    ]
    report = result.report
    assert report.n_documents == 2 and report.document_bytes == small_store.test.n_bytes[:2].tolist()
    assert report.options["gate"] == json.loads(json.dumps(dataclasses.asdict(gate.settings)))
    assert report.conditions["right"].n_used > 0
    metrics = result.metrics()
    assert metrics["bits_per_byte/off"] == pytest.approx(sum(report.documents["off"]) / report.n_bytes)
    assert metrics["fired_per_1000/right"] == 1000 * report.conditions["right"].n_events / report.n_tokens
    assert "similarity/off" not in metrics and "similarity/right" in metrics
    assert GatedResult.from_json(result.to_json()) == result
    for spoilt in ("[]", "{", '{"gate": {}}'):
        with pytest.raises(HRSError, match="no result of gated retrieval"):
            GatedResult.from_json(spoilt)


def test_a_key_names_all_that_a_result_follows_from() -> None:
    plans = [PLAN, *(dataclasses.replace(PLAN, **c) for c in ({"split": "train"}, {"documents": 3}, {"quantile": 0.6}))]
    plans += [dataclasses.replace(PLAN, threshold_bits=4.0), dataclasses.replace(PLAN, options=RetrievalOptions(k=9))]
    keys = [plan.key("m", "d", "") for plan in plans]
    keys += [PLAN.key(*names) for names in (("n", "d", ""), ("m", "e", ""), ("m", "d", "s"))]
    assert len(set(keys)) == len(keys) == 9
    assert PLAN.key("m", "d", "") == keys[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"split": "all"}, "unknown split"), ({"quantile": 1.5}, "between 0 and 1"), ({"documents": 0}, "1 document")],
)
def test_a_plan_that_cannot_be_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(HRSError, match=said):
        dataclasses.replace(PLAN, **wrong)
