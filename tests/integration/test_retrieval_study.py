"""The retrieval study: a baseline, its memories, three models that learn on from it, and their table, once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hrs.cluster.preflight import ROOT
from hrs.errors import HRSError
from hrs.storage import Storage
from hrs.tracking import Tracker
from jobs import retrieval_study

SMALL = [
    "--scale", "micro", "--set", "data.tokenizer=bpe:300", "--set", "model.max_seq_len=32",
    "--set", "training.retrieval.chunk_tokens=8",
]  # fmt: skip


def run(storage: Path, small_corpus: Path, *more: str) -> subprocess.CompletedProcess[str]:
    job = [sys.executable, str(ROOT / "jobs" / "retrieval_study.py"), *SMALL, "--corpus", f"jsonl:{small_corpus}"]
    job += ["--set", "training.steps=10", "--steps", "12", *more]
    environment = os.environ | {"HRS_STORAGE": str(storage)}
    return subprocess.run(job, env=environment, cwd=storage, capture_output=True, text=True)


@pytest.mark.slow
def test_memories_are_made_read_shuffled_and_compared(small_corpus: Path, tmp_path: Path) -> None:
    ended = run(tmp_path, small_corpus)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    storage = Storage(tmp_path)
    tracker = Tracker(storage)
    _, study = tracker.studies()
    records = {r.preset: r for r in tracker.study_records(study)}
    assert list(records) == list(retrieval_study.VARIANTS)
    assert {(r.status, r.causal) for r in records.values()} == {("finished", True)}
    assert all(r.config["training"]["steps"] == 12 for r in records.values())
    text = (storage.report(study) / "retrieval.txt").read_text()
    assert text in ended.stdout
    table = [line.split() for line in text.splitlines() if line.startswith("dense_")]
    shown = ["right", "shuffled", "none"]
    expected = [("dense_baseline", "-"), ("dense_retrieved_none", "none")]
    expected += [(preset, part) for preset in ("dense_retrieved_shuffled", "dense_retrieved") for part in shown]
    assert [(row[0], row[2]) for row in table[: len(expected)]] == expected
    assert all(row[-1] == "yes" for row in table[: len(expected)])

    (bank,) = (path for path in (tmp_path / "memories").iterdir() if path.is_dir())
    assert json.loads((bank / "bank.json").read_text())["files"]
    measured = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/memory_*/evaluation.json")}
    assert len(measured) == 6
    assert len(list(storage.artifacts.rglob("memory_right/evaluation.json"))) == 3

    unseen = run(tmp_path, small_corpus, "--split", "test")
    assert unseen.returncode == 0, unseen.stdout + unseen.stderr
    assert "documents of the test split" in unseen.stdout and "3 of 3 finished before" in unseen.stdout
    assert {path: path.stat().st_mtime_ns for path in measured} == measured
    scored = [len(list(folder.glob("test_memory_*/evaluation.json"))) for folder in tmp_path.glob("runs/*/")]
    assert sorted(scored) == [1, 3, 3, 3]  # the baseline reads no memories
    after = {r.preset: r.metrics for r in tracker.study_records(study)}
    for preset in retrieval_study.VARIANTS:
        for split, shown in (("test", "none"), ("test", "right"), ("validation", "right")):
            folder = f"memory_{shown}" if split == "validation" else f"{split}_memory_{shown}"
            (path,) = storage.run(records[preset].key).glob(f"{folder}/evaluation.json")
            assert after[preset][f"{folder}/bits_per_byte"] == json.loads(path.read_text())["bits_per_byte"]


def test_a_dry_run_plans_the_baseline_and_names_what_follows(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    assert retrieval_study.main([*SMALL, "--seeds", "2", "--dry-run", "--corpus", f"jsonl:{small_corpus}"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if "/0 " in line or "/1 " in line] == [
        "dense_baseline/0", "dense_baseline/1",
    ]  # fmt: skip
    assert "then 3 runs of dense_retrieved, dense_retrieved_shuffled, dense_retrieved_none for each seed" in said
    assert not list(tmp_path.glob("runs/*"))


def test_how_memories_are_made_is_nothing_to_a_baseline() -> None:
    arguments = ["--corpus", "bbc", "--steps", "7"]
    for change in ("training.steps=5", "training.retrieval.keys=words", "model.engram.slots=8", "model.n_layers=3"):
        arguments += ["--set", change]
    shared, own = retrieval_study.overrides_of(retrieval_study.parse(arguments))
    assert shared == {"training.steps": "5", "model.n_layers": "3"}
    assert own == {
        "training.steps": 7, "training.retrieval.keys": "words", "model.engram.slots": "8", "model.n_layers": "3",
        "data.corpus": "bbc",
    }  # fmt: skip


def test_what_cannot_work_is_said_before_anything_trains(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    with pytest.raises(HRSError, match="unknown field training"):
        retrieval_study.main([*SMALL, "--corpus", f"jsonl:{small_corpus}", "--set", "training.retrieval.chunks=1"])
    assert not list(tmp_path.glob("runs/*"))
