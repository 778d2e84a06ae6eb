"""The job on gated retrieval: a study and a model that reads slots, through Ray to MLflow and a table, once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hrs.cluster.inline import train_inline
from hrs.cluster.preflight import ROOT
from hrs.cluster.study import Study
from hrs.errors import HRSError
from hrs.retrieval.bank import weights_fingerprint
from hrs.retrieval.gated import GatedResult
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.training import Runtime, load_model
from jobs import gated_retrieval
from jobs.retrieval_study import train_with_memories


def run(storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    job = [sys.executable, str(ROOT / "jobs" / "gated_retrieval.py"), *arguments]
    environment = os.environ | {"HRS_STORAGE": str(storage)}
    ended = subprocess.run(job, env=environment, cwd=storage, capture_output=True, text=True)
    assert "Traceback" not in ended.stdout + ended.stderr, ended.stdout + ended.stderr
    return ended


@pytest.mark.slow
@pytest.mark.timeout(1200)  # trains three models, and starts three private clusters one after the other
def test_models_are_measured_in_both_modes_and_once(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    small = {
        "data.corpus": f"jsonl:{small_corpus}", "data.tokenizer": "bpe:300",
        "model.max_seq_len": 32, "training.steps": 10,
    }  # fmt: skip
    bases = Study(title="bases", presets=("dense_baseline",), scale="micro", seeds=(0, 1), overrides=small)
    train_inline(bases, Runtime())
    storage, base = Storage(tmp_path), bases.runs()[0].key
    reads = small | {
        "training.retrieval.chunk_tokens": 8,
        "training.retrieval.base": base,
        "training.retrieval.fingerprint": weights_fingerprint(load_model(storage.run(base))[0]),
    }
    reading = Study(title="reads", presets=("dense_retrieved",), scale="micro", seeds=(0,), overrides=reads)
    train_inline(reading, Runtime(), train_with_memories)
    directory = str(storage.run(reading.runs()[0].key))

    command = (bases.name, directory, "--mode", "text,slots", "--documents", "5", "--min-similarity", "-1")
    first = run(tmp_path, *command)
    assert first.returncode == 0, first.stdout + first.stderr
    for label in ("dense_baseline/0", "dense_baseline/1"):
        assert f"{label}: mode slots is left out" in first.stdout and f"{label} text: measured in" in first.stdout
    assert "dense_retrieved/0 slots: off: 5 of 5 documents" in first.stdout
    results = {path: path.read_text() for path in tmp_path.glob("gated/*/gated.json")}
    assert len(results) == 4
    reports = [GatedResult.from_json(text).report for text in results.values()]
    assert sorted(report.options["mode"] for report in reports) == ["slots", "text", "text", "text"]
    assert all(report.n_documents == 5 and report.conditions["right"].n_used > 0 for report in reports)
    (slots,) = (report for report in reports if report.options["mode"] == "slots")
    assert slots.right_minus_off.value != 0
    (table,) = tmp_path.glob("gated/tables/*.txt")
    assert table.read_text() in first.stdout
    groups = [line for line in table.read_text().splitlines() if line.startswith("dense_") and ":" not in line]
    assert groups == [
        "dense_baseline, text, causal yes", "dense_retrieved, text, causal yes", "dense_retrieved, slots, causal yes",
    ]  # fmt: skip
    assert "dense_baseline, text: seeds 0, 1;" in table.read_text()
    assert len([path for path in tmp_path.glob("gated/stores/*") if path.is_dir()]) == 3

    tracker = Tracker(storage)
    assert gated_retrieval.STUDY in tracker.studies() and tracker.study_keys(gated_retrieval.STUDY) == []
    for path, text in results.items():
        (record,) = tracker.records([path.parent.name])
        assert record.status == "finished" and record.metrics == pytest.approx(GatedResult.from_json(text).metrics())
    assert len(list(storage.artifacts.rglob("gated.json"))) == 4
    assert len(list(storage.artifacts.rglob(table.name))) == 1

    again = run(tmp_path, *command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert not re.search(r"\d of \d", again.stdout), "nothing is read or walked again"
    assert table.read_text() in again.stdout
    assert {path: path.read_text() for path in tmp_path.glob("gated/*/gated.json")} == results
    assert len(list(storage.artifacts.rglob("gated.json"))) == 4

    refused = run(tmp_path, bases.name, "--mode", "slots")
    assert refused.returncode == 2 and "error: none of these models reads slots" in refused.stderr


def test_a_wrong_command_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    for arguments, said in (
        (["s", "--mode", "text,both"], "--mode must be text or slots, .* got 'both'"),
        (["s", "--quantile", "2"], "quantile of a gate must lie between 0 and 1"),
        (["s", "--documents", "0"], "1 document or more"),
        (["s", "--hold", "0"], "hold must be"),
        (["s", "--quantile", "nan"], "quantile of a gate must lie between 0 and 1"),
        (["s", "--threshold", "nan"], "--threshold: must be a number"),
        (["nothing"], "no path, study or run has the name 'nothing'"),
        ([str(tmp_path / "nothing")], "there is no model at "),
        (["mlflow:hrs@champion"], "there is no registered model 'hrs'"),
    ):
        with pytest.raises(HRSError, match=said):
            gated_retrieval.main(arguments)
    with pytest.raises(HRSError, match="--quantile: not allowed with argument --threshold"):
        gated_retrieval.parse(["s", "--threshold", "4", "--quantile", "0.9"])


def test_models_of_one_preset_must_differ_in_their_seed_alone(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(seed: int, **overrides: object) -> gated_retrieval.Measured:
        study = Study(title="s", presets=("dense_retrieved",), scale="micro", seeds=(seed,), overrides=overrides)
        return gated_retrieval.Measured(
            path=tmp_path, mode="text", key="k", folder=tmp_path, config=study.runs()[0].config, data_fingerprint="d",
            causal=True,
        )  # fmt: skip

    def base(name: str) -> dict[str, str]:
        return {"training.retrieval.base": name, "training.retrieval.fingerprint": name}

    monkeypatch.setattr(gated_retrieval, "reading_of", lambda one: one.config.seed)
    monkeypatch.setattr(gated_retrieval, "gated_table", lambda readings, split: json.dumps([readings, split]))
    data = {"data.corpus": f"jsonl:{small_corpus}", "data.tokenizer": "bpe:300"}
    same = [measured(0, **data, **base("a")), measured(1, **data, **base("b"))]
    assert gated_retrieval.table_of(same, "test") == '[[0, 1], "test"]'
    other = measured(1, **data, **base("b"), **{"training.steps": 7})
    with pytest.raises(HRSError, match="models of dense_retrieved differ in more than their seed"):
        gated_retrieval.table_of([same[0], other], "test")
