"""The export job: the best causal run of a study through Ray to a file, its score, and a copy in MLflow."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hrs.cluster.inline import train_inline
from hrs.cluster.preflight import ROOT
from hrs.cluster.study import Study
from hrs.errors import HRSError
from hrs.export import load_artifact
from hrs.report.records import RunRecord
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.training import Runtime
from jobs import export


def run(storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    job = [sys.executable, str(ROOT / "jobs" / "export.py"), *arguments]
    environment = os.environ | {"HRS_STORAGE": str(storage)}
    return subprocess.run(job, env=environment, cwd=storage, capture_output=True, text=True)


@pytest.mark.slow
def test_the_best_run_of_a_study_becomes_a_file_and_is_tracked(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    overrides = {"data.corpus": f"jsonl:{small_corpus}", "data.tokenizer": "bpe:300", "training.steps": 10}
    study = Study(title="one", presets=("dense_baseline",), scale="micro", seeds=(0,), overrides=overrides)
    train_inline(study, Runtime())
    storage = Storage(tmp_path)
    (best,) = Tracker(storage).study_records(study.name, with_history=False)

    ended = run(tmp_path, study.name, "--budget", "45KB")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "best causal run: dense_baseline/0" in ended.stdout and "45,000 allowed" in ended.stdout
    path = storage.run(best.key) / "model.hrs"
    header = load_artifact(path).header
    assert path.stat().st_size <= 45_000 and header["source"]["causal"] is True
    assert header["source"]["bits_per_byte"] == pytest.approx(best.metrics["bits_per_byte"])
    result = json.loads(path.with_name("export.json").read_text())
    assert f"{result['artifact_bits_per_byte']:.4f} (the file, read back)" in ended.stdout
    (tracked,) = storage.artifacts.rglob("model.hrs")
    assert tracked.read_bytes() == path.read_bytes() and tracked.parent.name == "export"
    assert Tracker(storage).finished([best.key]) == {best.key}

    too_small = run(tmp_path, str(storage.run(best.key)), "--budget", "100")
    assert too_small.returncode == 2
    (line,) = [line for line in too_small.stderr.splitlines() if line.startswith("error:")]
    assert "does not fit into 100 bytes: the smallest artifact of it takes" in line


def test_the_best_run_is_finished_causal_and_lowest() -> None:
    run = RunRecord(key="a", preset="p", scale="micro", seed=0, status="finished", causal=True)
    good, better = (replace(run, key=key, metrics={"bits_per_byte": bits}) for key, bits in (("a", 2.0), ("b", 1.5)))
    leaky = replace(better, key="c", causal=False, metrics={"bits_per_byte": 0.4})
    unaudited, cut = replace(leaky, causal=None), replace(better, status="killed", metrics={"bits_per_byte": 1.0})
    assert export.best_run("s", [leaky, good, run, better, unaudited, cut]) is better
    with pytest.raises(HRSError, match="study 's' has no finished run that passed the audit"):
        export.best_run("s", [leaky, run, unaudited, cut])


def test_a_wrong_command_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    with pytest.raises(HRSError, match="budget 'much' is not a size"):
        export.main(["s", "--budget", "much"])
    with pytest.raises(HRSError, match="no path, study or run has the name 'nothing'"):
        export.main(["nothing"])
