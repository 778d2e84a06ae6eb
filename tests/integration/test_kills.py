"""A sweep that loses a worker, its driver or its whole cluster ends with the same table as one left alone."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from waiting import wait_until

from hrs.cluster.head import LocalHead
from hrs.cluster.preflight import ROOT
from hrs.storage import Storage
from hrs.tracking import Tracker

pytestmark = pytest.mark.slow

N_RUNS = 3
Sweep = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def arguments(small_corpus: Path) -> list[str]:
    """Three runs of a few seconds each, checkpointing often."""
    return [
        "--presets=dense_baseline,full_hrs,full_hrs_legacy",
        "--scale=micro",
        f"--corpus=jsonl:{small_corpus}",
        "--set=data.tokenizer=bpe:300",
        "--set=training.steps=120",
        "--checkpoint-every=10",
        "--name=kill",
    ]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Fingerprints of every run's results after a sweep that nothing happened to."""
    root = tmp_path_factory.mktemp("undisturbed")
    finish(start(arguments, root))
    return fingerprints(root)


def start(arguments: list[str], root: Path) -> subprocess.Popen[bytes]:
    """The sweep as a process of its own, on a Ray of its own."""
    command = [sys.executable, str(ROOT / "jobs" / "ablation_sweep.py"), *arguments]
    return subprocess.Popen(command, env=os.environ | {"HRS_STORAGE": str(root)}, cwd=root)


def finish(sweep: subprocess.Popen[bytes]) -> None:
    assert sweep.wait() == 0


def fingerprints(root: Path) -> dict[str, str]:
    """A hash of each finished run's final weights, per-document losses and metrics, by run key."""
    found = {}
    for run in sorted((root / "runs").iterdir()):
        checkpoint = sorted((run / "checkpoints").iterdir())[-1]
        results = [run / name for name in ("evaluation.json", "documents.arrow", "audit.json")]
        contents = b"".join(file.read_bytes() for file in (checkpoint / "weights.safetensors", *results))
        found[run.name] = hashlib.sha256(contents).hexdigest()
    assert len(found) == N_RUNS
    return found


def tracked(root: Path) -> dict[str, tuple[str, float]]:
    """Status and start of every tracked run by its MLflow id; what was run twice would show here."""
    records = {}
    tracker = Tracker(Storage(root))
    for run in tracker._history.by_tag("hrs.kind", ["trial"]):
        records[run.run_id] = (run.status, tracker._client.get_run(run.run_id).info.end_time)
    return records


def wait_for_checkpoint(root: Path, alive: Callable[[], bool]) -> Path:
    """Until some run has written one and is not finished."""

    def found() -> Path | None:
        runs = (checkpoint.parent.parent for checkpoint in root.glob("runs/*/checkpoints/step_*"))
        return next((run for run in runs if not (run / "training.json").exists()), None)

    return wait_until(found, alive)


def workers_in_trials(root: Path) -> list[int]:
    """Process ids of the workers that own a running trial, from the tracked runs."""
    runs = [run for run in Tracker(Storage(root))._history.running() if run.tags["hrs.kind"] == "trial"]
    return [int(run.tags["hrs.owner"].split(":")[1]) for run in runs]


def test_a_killed_worker_is_replaced_and_nothing_changes(
    arguments: list[str], undisturbed: Mapping[str, str], tmp_path: Path
) -> None:
    sweep = start(arguments, tmp_path)
    wait_for_checkpoint(tmp_path, lambda: sweep.poll() is None)
    worker = wait_until(lambda: workers_in_trials(tmp_path), lambda: sweep.poll() is None)[0]
    assert worker != sweep.pid
    os.kill(worker, signal.SIGKILL)
    finish(sweep)
    assert fingerprints(tmp_path) == undisturbed
    assert [status for status, _ in tracked(tmp_path).values()] == ["FINISHED"] * N_RUNS


def test_a_killed_driver_is_continued_by_the_same_command(
    arguments: list[str], undisturbed: Mapping[str, str], tmp_path: Path
) -> None:
    sweep = start(arguments, tmp_path)
    wait_for_checkpoint(tmp_path, lambda: sweep.poll() is None)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    before = {run: end for run, (status, end) in tracked(tmp_path).items() if status == "FINISHED"}
    finish(start(arguments, tmp_path))
    after = tracked(tmp_path)
    assert fingerprints(tmp_path) == undisturbed
    assert [status for status, _ in after.values()] == ["FINISHED"] * N_RUNS
    assert all(after[run][1] == end for run, end in before.items()), "finished trials are not run again"


def test_a_killed_cluster_is_continued_by_the_same_job(
    arguments: list[str], undisturbed: Mapping[str, str], tmp_path: Path
) -> None:
    command = " ".join(["python", "jobs/ablation_sweep.py", *arguments])
    env = {"HRS_STORAGE": str(tmp_path)}
    with LocalHead(num_cpus=2) as head:
        job = threading.Thread(target=lambda: _submit_to_its_death(head, command, env), daemon=True)
        job.start()
        wait_for_checkpoint(tmp_path, job.is_alive)
        head.kill()
        job.join()
    with LocalHead(num_cpus=2) as head:
        assert head.submit(command, working_dir=ROOT, env_vars=env) == 0
    assert fingerprints(tmp_path) == undisturbed
    assert [status for status, _ in tracked(tmp_path).values()] == ["FINISHED"] * N_RUNS


def _submit_to_its_death(head: LocalHead, command: str, env: Mapping[str, str]) -> None:
    with contextlib.suppress(Exception):
        head.submit(command, working_dir=ROOT, env_vars=env)


def test_a_second_submission_of_a_finished_study_runs_nothing(
    arguments: list[str], undisturbed: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = next(p for p in tmp_path_factory.getbasetemp().iterdir() if p.name.startswith("undisturbed"))
    before = tracked(root)
    finish(start(arguments, root))
    assert tracked(root) == before


def test_an_interrupt_stops_cleanly_and_says_how_to_go_on(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "ablation_sweep.py"), *arguments]
    environment = os.environ | {"HRS_STORAGE": str(tmp_path)}
    sweep = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(tmp_path, lambda: sweep.poll() is None)
    sweep.send_signal(signal.SIGTERM)
    _, errors = sweep.communicate()
    assert sweep.returncode == 2
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    assert "RUNNING" not in {status for status, _ in tracked(tmp_path).values()}
