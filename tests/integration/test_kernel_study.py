"""The kernel study: two kernels through Ray to a table of losses and one of topic separation, once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hrs.cluster.preflight import ROOT
from hrs.errors import HRSError
from hrs.evaluation.separation import from_dict
from hrs.storage import Storage
from hrs.tracking import Tracker
from jobs import kernel_study


def run(storage: Path, small_corpus: Path) -> subprocess.CompletedProcess[str]:
    job = [sys.executable, str(ROOT / "jobs" / "kernel_study.py"), "--kernels", "dot,soft_rank", "--scale", "micro"]
    job += ["--corpus", f"jsonl:{small_corpus}", "--set", "data.tokenizer=bpe:300", "--set", "training.steps=10"]
    environment = os.environ | {"HRS_STORAGE": str(storage)}
    return subprocess.run(job, env=environment, cwd=storage, capture_output=True, text=True)


@pytest.mark.slow
def test_kernels_are_trained_audited_compared_and_their_engrams_scored(small_corpus: Path, tmp_path: Path) -> None:
    ended = run(tmp_path, small_corpus)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    losses, _, separation = ended.stdout.partition("report: ")
    for table in (losses, separation):
        assert "dense_baseline" in table and "kernel_soft_rank" in table
    assert separation.count("configuration") == 2, "documents, and the topics of this corpus"

    storage = Storage(tmp_path)
    (study,) = Tracker(storage).studies()
    records = Tracker(storage).study_records(study)
    assert [(r.preset, r.status, r.causal) for r in records] == [
        ("dense_baseline", "finished", True),
        ("kernel_soft_rank", "finished", True),
    ]
    text = (storage.report(study) / "separation.txt").read_text()
    assert text in ended.stdout
    by_run = json.loads((storage.report(study) / "separation.json").read_text())
    assert list(by_run) == ["dense_baseline/0", "kernel_soft_rank/0"]
    scores = [from_dict(found)["document"]["trained"].auc for found in by_run.values()]
    assert scores[0] != scores[1] and all(0 < score < 1 for score in scores)
    assert len(list(storage.artifacts.rglob("separation.txt"))) == 1

    measured = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/separation.json")}
    assert len(measured) == 2
    again = run(tmp_path, small_corpus)
    assert again.returncode == 0 and text in again.stdout
    assert {path: path.stat().st_mtime_ns for path in measured} == measured


def test_a_dry_run_plans_one_row_per_kernel(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    corpus = ["--corpus", f"jsonl:{small_corpus}", "--set", "data.tokenizer=bpe:300"]
    assert kernel_study.main(["--kernels", "all", "--scale", "micro", "--dry-run", *corpus]) == 0
    planned = [line.split("/")[0] for line in capsys.readouterr().out.splitlines() if "/0 " in line]
    rows = {"dense_baseline", *(f"kernel_{kernel}" for kernel in kernel_study.KERNELS if kernel != "dot")}
    assert len(planned) == len(rows) and set(planned) == rows


def test_what_cannot_work_is_said_before_anything_trains(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    with pytest.raises(HRSError, match="unknown kernel 'cosine': choose out of dot, exponential"):
        kernel_study.main(["--kernels", "dot,cosine"])
    too_long = ["--corpus", f"jsonl:{small_corpus}", "--set", "data.tokenizer=bpe:300"]
    with pytest.raises(HRSError, match="needs 4 documents with two segments of 512 tokens"):
        kernel_study.main(["--scale", "micro", *too_long, "--set", "model.max_seq_len=1024"])
    assert not list(tmp_path.glob("runs/*"))
