"""The schedule search end to end: TPE proposes, ASHA stops, the best is a plot and a line to paste."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hrs.cluster.preflight import ROOT
from hrs.config import parse_assignments
from hrs.presets import experiment
from hrs.storage import Storage
from hrs.tracking import Tracker

pytestmark = pytest.mark.slow

SAMPLES = 4


def test_a_search_ends_with_the_best_schedule(small_corpus: Path, tmp_path: Path) -> None:
    corpus = ["--corpus", f"jsonl:{small_corpus}", "--set", "data.tokenizer=bpe:300"]
    job = [sys.executable, str(ROOT / "jobs" / "lr_search.py")]
    search = ["--preset", "full_hrs", "--scale", "micro", "--samples", str(SAMPLES), "--set", "training.steps=40"]
    environment = os.environ | {"HRS_STORAGE": str(tmp_path)}
    ended = subprocess.run([*job, *search, *corpus], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "cross late" in ended.stdout

    # The line to paste is a valid experiment, and the very one that was measured best.
    pasted = re.findall(r"--set '([^']*)'", ended.stdout)
    config = experiment("full_hrs", "micro", overrides=parse_assignments(pasted))
    (study,) = Tracker(Storage(tmp_path)).studies()
    records = Tracker(Storage(tmp_path)).study_records(study)
    assert len(records) == SAMPLES
    assert {r.status for r in records} <= {"finished", "stopped"}
    best = min((r for r in records if r.status == "finished"), key=lambda r: r.history["validation_loss"][-1][1])
    assert best.config["training"]["schedule"]["peak_lr"] == config.training.schedule.peak_lr
    assert best.config["training"]["schedule"]["shape"] == config.training.schedule.shape
    assert (tmp_path / "studies" / study / "report" / "best_schedule.png").stat().st_size > 1000

    # The same command finds everything done, and names the same winner.
    again = subprocess.run([*job, *search, *corpus], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{SAMPLES} of {SAMPLES} schedules were tried before" in again.stdout
    assert re.findall(r"^best .*|--set .*", again.stdout, re.M) == re.findall(r"^best .*|--set .*", ended.stdout, re.M)
