"""Checkpoints written beside training: consistent, one at a time, by time, and no error lost."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from simulated_gpu import SimulatedGpu, simulated_gpus
from torch._subclasses.fake_tensor import FakeTensorMode
from training_checks import different

from hrs.config import OptimizerConfig
from hrs.errors import HRSError
from hrs.gpu import open_gpu
from hrs.models import build_model
from hrs.presets import experiment
from hrs.training import Runtime, checkpoint_writer, train
from hrs.training.averaging import Averages
from hrs.training.checkpoint import read_checkpoint, read_latest
from hrs.training.checkpoint_writer import (
    LONGEST_SECONDS,
    SHORTEST_SECONDS,
    THREAD_NAME,
    CheckpointSchedule,
    CheckpointWriter,
    interval_seconds,
)
from hrs.training.optimizer import build_optimizer

CPU = torch.device("cpu")
SOON = Runtime(device="cpu", log_every=1, checkpoint_minutes=1e-9)


class SlowDisk:
    """Let checkpoints through only while ``open`` is set; ``steps`` are those whose writing began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.steps, self._write = threading.Event(), [], checkpoint_writer.write_checkpoint
        monkeypatch.setattr(checkpoint_writer, "write_checkpoint", self._wait)

    def _wait(self, directory, state, files):
        self.steps.append(state["step"])
        assert self.open.wait(60)
        return self._write(directory, state, files)


def writers() -> int:
    return sum(thread.name == THREAD_NAME for thread in threading.enumerate())


@pytest.fixture
def state(small_experiment) -> tuple[torch.nn.Module, torch.optim.Optimizer, Averages, Callable[[], None]]:
    """A model, its optimizer and averages after a step, and a function that makes another step of all."""
    config = small_experiment("full_hrs", {"training.averaging.decays": [0.9], "training.averaging.start_frac": 0.0})
    torch.manual_seed(0)
    model = build_model(config.model)
    optimizer = build_optimizer(model, OptimizerConfig())
    averages = Averages(config.training.averaging, model, 10)
    averages.follow(0, updated=False)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        averages.follow(1, updated=True)
        for buffer in model.buffers():
            buffer.add_(1)

    step()
    return model, optimizer, averages, step


def tensors_of(writer: CheckpointWriter) -> dict[str, torch.Tensor]:
    return {f"{file}/{k}": v.clone() for file, found in writer._state_tensors().items() for k, v in found.items()}


# ---- one snapshot ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_checkpoint_holds_one_moment_however_long_the_disk_takes(on_gpu, state, tmp_path, monkeypatch) -> None:
    """Weights, moments, averages, kept weights, random state and counters; on a GPU through pinned memory."""
    model, optimizer, averages, step = state
    averages.finish(1)
    disk = SlowDisk(monkeypatch)
    with simulated_gpus(SimulatedGpu()) as cuda:
        gpu = open_gpu("cuda") if on_gpu else None
        writer = CheckpointWriter(tmp_path, model, optimizer, gpu.device if gpu else CPU, averages, gpu)
        for number in (1, 2):  # the second one in the same memory
            disk.open.clear()
            before, rng, counters = tensors_of(writer), torch.get_rng_state(), {"step": number, "sums": [1.0]}
            calls = len(cuda.calls)
            writer.begin(counters)
            counters["sums"].append(2.0)
            step()
            assert writer.busy
            disk.open.set()
            writer.wait()
            found = read_checkpoint(tmp_path / "checkpoints" / f"step_{number:08d}")
            parts = {"weights": found.weights, "trainer": found.trainer, "averages": found.averages, "kept": found.kept}
            read = {f"{part}.safetensors/{k}": v for part, content in parts.items() for k, v in content.items()}
            read_rng = {read.pop(name).numpy().tobytes() for name in list(read) if "/rng/" in name}
            assert different(read, before) == [] and different(read, tensors_of(writer)) != []
            assert read_rng == {rng.numpy().tobytes()}
            assert found.state == {"step": number, "sums": [1.0]}
            assert ("set_device(0)" in cuda.calls[calls:]) == on_gpu, "a thread begins with GPU 0"
            assert ("record_event(0)" in cuda.calls[calls:]) == on_gpu
            pinned = sum("pinned_empty" in call for call in cuda.calls[calls:])
            assert bool(pinned) == (on_gpu and number == 1), "the memory is used again"
        kept = sum(v.nbytes for v in found.kept.values())  # read where it is
        assert writer.host_bytes == sum(v.nbytes for v in before.values()) - kept


def test_writing_waits_for_the_copies(state, tmp_path, monkeypatch) -> None:
    model, optimizer, averages, _ = state
    order = []
    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", lambda *args: order.append("write"))
    with simulated_gpus(SimulatedGpu()) as cuda:

        class Event:
            def synchronize(self) -> None:
                order.append("copied")

        monkeypatch.setattr(cuda, "record_event", lambda device: Event())
        writer = CheckpointWriter(tmp_path, model, optimizer, CPU, averages, open_gpu("cuda"))
        writer.begin({"step": 1})
        writer.wait()
    assert order == ["copied", "write"]


# ---- in the loop -----------------------------------------------------------------------------------------------------


def test_training_goes_on_beside_a_slow_disk_with_one_checkpoint_in_flight(
    small_experiment, small_store, tmp_path: Path, monkeypatch
) -> None:
    disk = SlowDisk(monkeypatch)
    for progress in train(small_experiment("full_hrs"), small_store, tmp_path, SOON):
        if 1 < progress.step < 6:
            assert disk.steps == [1] and writers() == 1
        if progress.step == 6:
            assert not list(tmp_path.glob("checkpoints/step_*"))
            disk.open.set()
    assert disk.steps[0] == 1 and disk.steps[-1] == 12 and min(disk.steps[1:]) >= 6
    assert writers() == 0
    latest = read_latest(tmp_path)
    assert latest is not None and latest.state["step"] == 12


def test_steps_that_were_asked_for_are_all_written(small_experiment, small_store, tmp_path: Path, monkeypatch) -> None:
    disk = SlowDisk(monkeypatch)
    disk.open.set()
    runtime = Runtime(device="cpu", log_every=3, checkpoint_every=2)
    for progress in train(small_experiment(), small_store, tmp_path, runtime):
        latest = read_latest(tmp_path)
        assert latest is not None and latest.state["step"] == (progress.step - 1) // 2 * 2
    assert disk.steps == [2, 4, 6, 8, 10, 12]


def test_a_full_disk_ends_training_at_the_next_step_and_leaves_the_checkpoints_before(
    small_experiment, small_store, tmp_path: Path, monkeypatch
) -> None:
    real, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 5:  # the second checkpoint
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    reports = []
    with pytest.raises(HRSError, match=r"could not be written .*No space left on device") as error:
        reports.extend(train(small_experiment(), small_store, tmp_path, SOON))
    assert "\n" not in str(error.value)
    (left,) = (tmp_path / "checkpoints").iterdir()
    read_checkpoint(left)
    assert writers() == 0


@pytest.mark.parametrize("ending", ["closed", "error inside", "error thrown in"])
def test_whatever_ends_the_run_waits_for_the_checkpoint_in_flight(
    ending, small_experiment, small_store, tmp_path: Path, monkeypatch
) -> None:
    disk = SlowDisk(monkeypatch)
    run = train(small_experiment(), small_store, tmp_path, Runtime(device="cpu", log_every=1, checkpoint_every=2))
    assert [next(run).step, next(run).step] == [1, 2]
    threading.Timer(0.2, disk.open.set).start()
    if ending == "closed":
        next(run)
        run.close()
    elif ending == "error thrown in":
        next(run)
        with pytest.raises(ValueError, match="of the consumer"):
            run.throw(ValueError("of the consumer"))
    else:
        monkeypatch.setattr("hrs.training.step.cross_entropy", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(run)
    assert writers() == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    read_checkpoint(tmp_path / "checkpoints" / "step_00000002")


def test_a_failed_write_does_not_hide_why_the_run_ended(
    small_experiment, small_store, tmp_path: Path, monkeypatch, caplog
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    run = train(small_experiment(), small_store, tmp_path, Runtime(device="cpu", log_every=1, checkpoint_minutes=60))
    next(run)
    monkeypatch.setattr(os, "fsync", full)
    run.close()
    assert "No space left on device" in caplog.text
    assert list((tmp_path / "checkpoints").iterdir()) == []


# ---- when ------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        monkeypatch.setattr(checkpoint_writer.time, "monotonic", lambda: self.seconds)


def written(schedule: CheckpointSchedule, clock: Clock, steps: int, step_seconds: float, size: int) -> list[int]:
    """The steps after which a checkpoint is written, of the first ``steps``."""
    found = []
    for step in range(1, steps + 1):
        clock.seconds += step_seconds
        if schedule.due(step, size):
            schedule.taken()
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"checkpoint_every": 4}, [4, 8, 12, 13]),
        ({"checkpoint_minutes": 1.0}, [4, 8, 12, 13]),  # 20 seconds a step: at 80, 160 and 240
        ({"checkpoint_minutes": 1e-9}, list(range(1, 14))),
        ({"checkpoint_minutes": 60.0}, [13]),
        ({}, [3, 6, 9, 12, 13]),  # 50 MB: every 50 seconds
    ],
)
def test_steps_at_which_checkpoints_are_due(options, expected, monkeypatch) -> None:
    step_seconds = 16.0 if "checkpoint_minutes" in options else 20.0
    clock = Clock(monkeypatch)
    schedule = CheckpointSchedule(Runtime(device="cpu", **options), 13)
    assert written(schedule, clock, 13, step_seconds, 50_000_000) == expected


def test_the_time_between_checkpoints_follows_their_size() -> None:
    assert interval_seconds(1) == SHORTEST_SECONDS
    assert interval_seconds(460_000_000) == 460
    assert interval_seconds(6_000_000_000) == LONGEST_SECONDS


@pytest.mark.parametrize("preset", ["dense_baseline", "v17_peer_only"])
def test_bytes_written_in_an_hour_at_paper_scale(preset: str, monkeypatch) -> None:
    """At the 88,000 tokens/s planned for an RTX 4080. Every 50 steps would be 118 and 1,540 GB an hour."""
    config = experiment(preset, "paper", 0)
    with FakeTensorMode():
        model = build_model(config.model)
        optimizer = build_optimizer(model, config.training.optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        writer = CheckpointWriter(Path("nowhere"), model, optimizer, CPU)
        size = writer.checkpoint_bytes
    expected = 3 * 4 * sum(parameter.numel() for parameter in model.parameters())  # weights and two moments
    assert expected <= size < 1.001 * expected
    step_seconds = config.tokens_per_step / 88_000
    clock = Clock(monkeypatch)
    schedule = CheckpointSchedule(Runtime(device="cpu"), 10**9)
    count = len(written(schedule, clock, int(3600 / step_seconds), step_seconds, size))
    assert 5 <= count <= 8
    assert count * size <= {"dense_baseline": 3.6e9, "v17_peer_only": 36e9}[preset]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes must be above 0"),
        ({"checkpoint_minutes": float("nan")}, "checkpoint_minutes must be above 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"checkpoint_every": 5, "checkpoint_minutes": 1.0}, "by minutes or by steps"),
    ],
)
def test_a_schedule_without_sense_is_refused(fields, message: str) -> None:
    with pytest.raises(HRSError, match=message):
        Runtime(**fields)
