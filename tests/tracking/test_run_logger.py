"""One run: curves without gaps or doubles through resumes and failing stores."""

import contextlib
import json
import math
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest
from waiting import wait_until

import hrs.tracking.logger as logger_module
from hrs.config import DataConfig, ExperimentConfig
from hrs.errors import HRSError
from hrs.storage import Storage
from hrs.tracking import RunLogger, Tracker
from hrs.tracking.logger import FLUSH_VALUES

OpenRun = Callable[..., RunLogger]


def only_record(tracker: Tracker, key: str = "k0"):
    (record,) = tracker.records([key])
    return record


def loss_at(step: int) -> float:
    return 1 / (step + 1)


def execute(storage: Storage, statement: str) -> list[tuple]:
    path = storage.root / "mlflow" / "mlflow.db"
    with closing(sqlite3.connect(path, timeout=60)) as database, database:
        return database.execute(statement).fetchall()


def break_store(storage: Storage) -> None:
    """Every write of metrics fails from now on."""
    execute(storage, "ALTER TABLE metrics RENAME TO metrics_hidden")


def repair_store(storage: Storage) -> None:
    execute(storage, "ALTER TABLE metrics_hidden RENAME TO metrics")


def test_a_resumed_run_is_the_same_run_with_one_unbroken_curve(tracker: Tracker, open_run: OpenRun) -> None:
    first = open_run()
    for step in range(10):
        first.log(step, {"train_loss": loss_at(step)} | ({"validation_loss": 2.0} if step % 4 == 0 else {}))
    first.finish("killed", "SIGTERM")
    assert only_record(tracker).status == "killed"

    second = open_run()
    assert second.run_id == first.run_id
    assert only_record(tracker).status == "running"
    for step in range(5, 20):  # the last checkpoint was at step 5, so five steps are trained twice
        second.log(step, {"train_loss": loss_at(step)} | ({"validation_loss": 2.0} if step % 4 == 0 else {}))
    second.finish("finished")

    points = tracker._client.get_metric_history(first.run_id, "train_loss")  # also doubles that a record would hide
    assert [(p.step, p.value) for p in points] == [(step, loss_at(step)) for step in range(20)]
    record = only_record(tracker)
    assert (record.status, record.reason) == ("finished", "")
    assert record.history["validation_loss"] == [(step, 2.0) for step in (0, 4, 8, 12, 16)]
    assert len(tracker._history.by_tag("hrs.run_key", ["k0"])) == 1


def test_a_metric_has_one_value_at_a_step(tracker: Tracker, open_run: OpenRun) -> None:
    run = open_run()
    run.log(4, {"tokens_per_second": 100.0})
    run.log(4, {"tokens_per_second": 90.0, "bits_per_byte": 1.0})
    run.log(3, {"tokens_per_second": 80.0})
    run.finish("finished")
    points = tracker._client.get_metric_history(run.run_id, "tokens_per_second")
    assert [(p.step, p.value) for p in points] == [(4, 100.0)]
    assert only_record(tracker).metrics["bits_per_byte"] == 1.0


def test_parameters_are_flat_and_survive_a_resume(tracker: Tracker, open_run: OpenRun, storage: Storage) -> None:
    """Values above the store's limit are cut; writing one twice would be refused."""
    config = ExperimentConfig(data=DataConfig(corpus="text:/" + "a" * 7000))
    open_run(config=config).finish("killed")
    run = open_run(config=config)
    run.finish("finished")
    params = tracker._client.get_run(run.run_id).data.params
    assert params["model.engram.kind"] == "none"
    assert params["training.optimizer.beta1"] == "0.9"
    assert "model.engram.window" not in params and "model.router.hidden" not in params
    assert params["data.corpus"] == "text:/" + "a" * 5994


@pytest.mark.parametrize(
    ("outcome", "mlflow_status"),
    [("finished", "FINISHED"), ("failed", "FAILED"), ("killed", "KILLED"), ("stopped", "FINISHED")],
)
def test_the_four_ends_of_a_run_are_told_apart(
    outcome, mlflow_status: str, tracker: Tracker, open_run: OpenRun
) -> None:
    run = open_run()
    run.finish(outcome, "two\n lines")
    run.finish("failed", "only the first call counts")
    assert tracker._client.get_run(run.run_id).info.status == mlflow_status
    record = only_record(tracker)
    assert (record.status, record.reason) == (outcome, "two lines")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (
            ValueError("loss is nan\nand more"),
            "failed",
            r"ValueError: loss is nan and more \(test_run_logger\.py:\d+\)",
        ),
        (KeyboardInterrupt(), "killed", "KeyboardInterrupt"),
        (None, "finished", ""),
    ],
)
def test_leaving_the_context_closes_the_run(
    error, status: str, reason: str, tracker: Tracker, open_run: OpenRun
) -> None:
    with contextlib.suppress(ValueError, KeyboardInterrupt), open_run() as run:
        run.log(0, {"train_loss": 1.0})
        if error:
            raise error
    record = only_record(tracker)
    assert record.status == status
    assert re.fullmatch(reason, record.reason)
    assert record.history["train_loss"] == [(0, 1.0)]


def test_values_reach_the_store_while_the_run_goes_on(tracker: Tracker, open_run: OpenRun) -> None:
    """A full buffer is sent at once, without waiting for the next regular flush."""
    with open_run() as run:
        for step in range(FLUSH_VALUES):
            run.log(step, {"train_loss": loss_at(step)})
        wait_until(lambda: len(only_record(tracker).history.get("train_loss", [])) == FLUSH_VALUES)


def test_a_failing_store_neither_stops_nor_slows_the_run_and_nothing_is_lost(
    tracker: Tracker, open_run: OpenRun, storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(logger_module, "FLUSH_SECONDS", 0.02)
    run = open_run()
    attempts, send = [], run._send
    monkeypatch.setattr(run, "_send", lambda: (attempts.append(1), send()))
    break_store(storage)
    for step in range(3 * FLUSH_VALUES):
        run.log(step, {"train_loss": loss_at(step)})
    seen = len(attempts)
    wait_until(lambda: len(attempts) > seen + 3)  # some attempts fail, one warning is given
    repair_store(storage)
    run.finish("finished")
    assert only_record(tracker).history["train_loss"] == [(s, loss_at(s)) for s in range(3 * FLUSH_VALUES)]
    assert sum("tracking store fails" in message for message in caplog.messages) == 1


def test_what_a_dead_store_did_not_take_is_kept_and_logged_at_the_next_start(
    tracker: Tracker, open_run: OpenRun, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger_module, "_PATIENCE_SECONDS", (0.01,))
    run = open_run()
    break_store(storage)
    for step in range(8):
        run.log(step, {"train_loss": loss_at(step)})
    run.log(8, {"grad_norm": math.inf})
    with pytest.raises(HRSError, match=r"did not take its last values .*start the run again"):
        run.finish("finished")
    kept = storage.run("k0") / "unlogged_metrics.jsonl"
    assert [json.loads(line)[3] for line in kept.read_text().splitlines()] == list(range(9))
    assert "NaN" not in kept.read_text() and "Infinity" not in kept.read_text()

    repair_store(storage)
    assert only_record(tracker).status == "running"
    again = open_run()
    for step in range(4, 12):
        again.log(step, {"train_loss": loss_at(step)})
    again.finish("finished")
    points = tracker._client.get_metric_history(run.run_id, "train_loss")
    assert [(p.step, p.value) for p in points] == [(step, loss_at(step)) for step in range(12)]
    assert math.isnan(only_record(tracker).metrics["grad_norm"])
    assert not kept.exists()


def test_a_half_written_line_of_what_was_kept_does_not_make_the_run_unopenable(
    tracker: Tracker, open_run: OpenRun, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    kept = storage.run("k0") / "unlogged_metrics.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text('["train_loss", 1.5, 1000, 0]\n["train_loss"]\n["train_loss", 2.5, 2000, 1]\n["train_lo')
    open_run().finish("finished")
    assert only_record(tracker).history["train_loss"] == [(0, 1.5), (1, 2.5)]
    assert f"2 lines of {kept} are damaged and left out" in caplog.text


def test_a_batch_whose_answer_got_lost_is_stored_once_when_sent_again(tracker: Tracker, open_run: OpenRun) -> None:
    run = open_run()
    for step in range(5):
        run.log(step, {"train_loss": loss_at(step), "lr": 0.5})
    sent = list(run._buffer)
    run._send()
    run._buffer[:] = sent
    run.finish("finished")
    assert len(tracker._client.get_metric_history(run.run_id, "train_loss")) == 5


def test_values_that_are_not_finite_do_not_block_the_others(tracker: Tracker, open_run: OpenRun) -> None:
    with open_run() as run:
        run.log(0, {"train_loss": math.nan, "grad_norm": math.inf, "lr": 1.0})
    record = only_record(tracker)
    assert math.isnan(record.metrics["train_loss"])
    assert math.isnan(record.metrics["grad_norm"]), "MLflow has no infinity, and would draw 1.8e308"
    assert record.metrics["lr"] == 1.0


@pytest.mark.parametrize("name", ["", "a b", "../loss", "loss/", "loss!", "/loss"])
def test_a_name_that_would_poison_a_batch_is_refused_when_it_is_logged(name: str, open_run: OpenRun) -> None:
    with open_run() as run, pytest.raises(HRSError, match="metric name"):
        run.log(0, {"lr": 1.0, name: 1.0})


def test_logging_to_a_finished_run_is_an_error(open_run: OpenRun) -> None:
    run = open_run()
    run.finish("finished")
    with pytest.raises(HRSError, match="is finished: open it again"):
        run.log(0, {"lr": 1.0})


def test_a_long_run_gives_signs_of_life(tracker: Tracker, open_run: OpenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger_module, "FLUSH_SECONDS", 0.02)
    monkeypatch.setattr(logger_module, "HEARTBEAT_SECONDS", 0)
    before = time.time()
    with open_run() as run:
        beat = wait_until(lambda: tracker._client.get_run(run.run_id).data.tags.get("hrs.heartbeat"))
        assert before - 1 <= float(beat) <= time.time() + 1


def test_system_metrics_are_sampled_until_the_run_ends(
    tracker: Tracker, open_run: OpenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with open_run(system_metrics=True) as run:
        run.log(0, {"train_loss": 1.0})
        name = "system/cpu_utilization_percentage"
        wait_until(lambda: name in tracker._client.get_run(run.run_id).data.metrics)
    assert not [t for t in threading.enumerate() if t.name == "SystemMetricsMonitor"]
    assert list(only_record(tracker).metrics) == ["train_loss"]  # no report shows the machine
