"""Killing a run at any moment loses nothing but time."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_checks import curve, different, weights

from hrs.config import canonical_json
from hrs.data import open_tokens
from hrs.errors import HRSError
from hrs.training import Runtime, latest_checkpoint, train

RUNTIME = Runtime(device="cpu", log_every=2, checkpoint_every=3)
PHASES = [
    {"name": "first", "frac": 0.5, "multipliers": [["engram", 0.0]]},
    {"name": "second", "frac": 0.5, "freeze": ["engram.encoder"], "reinitialise": ["engram.type_embedding"]},
]


@pytest.fixture
def config(small_experiment):
    """All that draws numbers: dropout, routing noise, anchors, engram dropout, parameters drawn anew at step 6."""
    return small_experiment("full_hrs_trc", {"training.phases": PHASES, "model.engram.dropout": 0.5})


@pytest.fixture
def undisturbed(config, small_store, tmp_path: Path):
    """Weights and curve of the run that nothing interrupts."""
    reports = list(train(config, small_store, tmp_path / "undisturbed", RUNTIME))
    return weights(tmp_path / "undisturbed"), curve(reports)


@pytest.mark.parametrize("stop_after", range(1, 9))
def test_a_generator_abandoned_anywhere_resumes_to_the_same_bits(
    stop_after, config, small_store, undisturbed, tmp_path: Path
) -> None:
    """Stops fall on, before and after checkpoints, and on both sides of the step that draws parameters anew."""
    reports = []
    for progress in train(config, small_store, tmp_path / "run", RUNTIME):
        reports.append(progress)
        if len(reports) == stop_after:
            break
    torch.manual_seed(99)  # another process would not have this one's generator
    reports += train(config, small_store, tmp_path / "run", RUNTIME)
    assert different(weights(tmp_path / "run"), undisturbed[0]) == []
    assert curve(reports) == undisturbed[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "count"),
    [("report", 1), ("report", 5), ("fsync", 2), ("fsync", 7), ("fsync", 10), ("replace", 1), ("replace", 3)],
)
def test_a_process_killed_with_sigkill_resumes_to_the_same_bits(
    where, count, config, undisturbed, tmp_path: Path
) -> None:
    """Kills at reports, and at every stage of writing a checkpoint; a checkpoint is five fsyncs and one replace."""
    open_tokens(config.data, tmp_path / "tokens")
    directory = tmp_path / "killed"
    script = Path(__file__).with_name("killed_run.py")
    command = [sys.executable, script, canonical_json(config), tmp_path / "tokens", directory, where, str(count)]
    child = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    metrics = dict(map(json.loads, child.stdout.splitlines()))
    reports = list(train(config, open_tokens(config.data, tmp_path / "tokens"), directory, RUNTIME))
    metrics |= {p.step: p.metrics for p in reports}
    for values in metrics.values():
        del values["tokens_per_second"]
    assert different(weights(directory), undisturbed[0]) == []
    assert metrics == undisturbed[1]
    assert not list((directory / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(("fsync", "survives"), [(3, []), (8, ["step_00000001"])])
def test_a_process_killed_while_its_writer_is_at_work_resumes_to_the_same_bits(
    fsync, survives, config, undisturbed, tmp_path: Path
) -> None:
    """Training went on for some steps beside the first or the second checkpoint, of which the disk has a part."""
    open_tokens(config.data, tmp_path / "tokens")
    directory = tmp_path / "killed"
    script = Path(__file__).with_name("killed_run.py")
    command = [sys.executable, script, canonical_json(config), tmp_path / "tokens", directory, "while writing", fsync]
    child = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert len(child.stdout.splitlines()) == 4
    left = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert [name for name in left if name.startswith("step_")] == survives
    assert [name for name in left if name.endswith(".partial")]
    reports = list(train(config, open_tokens(config.data, tmp_path / "tokens"), directory, RUNTIME))
    assert reports[0].step == 2
    assert different(weights(directory), undisturbed[0]) == []
    assert curve(reports) == undisturbed[1]
    assert not list((directory / "checkpoints").glob(".*"))


def test_what_the_consumer_draws_does_not_reach_the_run(config, small_store, undisturbed, tmp_path: Path) -> None:
    for _ in train(config, small_store, tmp_path / "run", RUNTIME):
        torch.randn(5)
    assert different(weights(tmp_path / "run"), undisturbed[0]) == []


@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_a_run_left_at_a_report_goes_on_from_there(
    stop_after, config, small_store, undisturbed, tmp_path: Path
) -> None:
    """By time nothing is due in these seconds: closing writes the checkpoint, with the run's own random state."""
    runtime, directory, reports = Runtime(device="cpu", log_every=2, checkpoint_minutes=60), tmp_path / "run", []
    for progress in train(config, small_store, directory, runtime):
        reports.append(progress)
        torch.randn(5)
        if len(reports) == stop_after:
            break
    assert [path.name for path in (directory / "checkpoints").iterdir()] == [f"step_{reports[-1].step:08d}"]
    reports += train(config, small_store, directory, runtime)
    assert [p.step for p in reports] == [2, 4, 6, 8, 10, 12]
    assert different(weights(directory), undisturbed[0]) == []
    assert curve(reports) == undisturbed[1]


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    config, small_store, undisturbed, tmp_path: Path, caplog
) -> None:
    directory = tmp_path / "run"
    for progress in train(config, small_store, directory, RUNTIME):
        if progress.step == 8:
            break
    latest = latest_checkpoint(directory)
    assert latest is not None and latest.name == "step_00000006"
    trainer = latest / "trainer.safetensors"
    trainer.write_bytes(trainer.read_bytes()[:-7])
    list(train(config, small_store, directory, RUNTIME))
    assert len(caplog.records) == 1 and "step_00000006 is damaged: trainer.safetensors" in caplog.text
    assert different(weights(directory), undisturbed[0]) == []


def test_starting_over_unasked_is_refused_when_no_checkpoint_can_be_read(run, small_experiment, tmp_path: Path) -> None:
    config = small_experiment("dense_baseline", {"training.steps": 2})
    run(config, tmp_path)
    (tmp_path / "checkpoints" / "step_00000002" / "state.json").write_text("{")
    with pytest.raises(HRSError, match="delete that folder to start over"):
        run(config, tmp_path)


def test_a_finished_run_yields_nothing_and_keeps_its_summary(run, small_experiment, tmp_path: Path) -> None:
    config = small_experiment("dense_baseline", {"training.steps": 2})
    run(config, tmp_path)
    before = (tmp_path / "training.json").read_text()
    stamp = latest_checkpoint(tmp_path).stat().st_mtime_ns
    assert run(config, tmp_path) == []
    after = json.loads((tmp_path / "training.json").read_text())
    assert {**after, "seconds": 0} == {**json.loads(before), "seconds": 0}
    assert latest_checkpoint(tmp_path).stat().st_mtime_ns == stamp


def test_a_directory_of_another_run_is_refused(run, small_experiment, tmp_path: Path) -> None:
    run(small_experiment("dense_baseline", {"training.steps": 2}), tmp_path)
    with pytest.raises(HRSError, match="another config"):
        run(small_experiment("dense_baseline", {"training.steps": 3}), tmp_path)
