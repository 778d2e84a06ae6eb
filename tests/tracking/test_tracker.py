"""Studies and runs: who made what, who is alive, and what a report reads."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from hrs.config import ExperimentConfig, to_dict
from hrs.errors import HRSError
from hrs.identity import code_version
from hrs.storage import Storage
from hrs.tracking import RunBusy, RunLogger, Tracker, close_open_studies
from hrs.tracking.owner import is_alive, this_process

OpenRun = Callable[..., RunLogger]

WRITER_THAT_NEVER_ENDS = """
import sys, time
from hrs.config import ExperimentConfig
from hrs.storage import open_storage
from hrs.tracking import Tracker
tracker = Tracker(open_storage(sys.argv[1]))
config = ExperimentConfig()
run = tracker.open_run("k0", tracker.open_study("demo", {"k0": config}), config, "data")
run.log(0, {"train_loss": 1.0})
run._send()
print("ready", flush=True)
time.sleep(600)
"""


def configs(n: int) -> dict[str, ExperimentConfig]:
    return {f"k{seed}": ExperimentConfig(seed=seed) for seed in range(n)}


def test_a_study_gathers_runs_that_another_study_made(tracker: Tracker) -> None:
    plan = configs(3)
    first = tracker.open_study("first", {"k0": plan["k0"]})
    tracker.open_run("k0", first, plan["k0"], "data").finish("finished")
    tracker.close_study(first, "finished")

    second = tracker.open_study("second", plan)
    assert tracker.finished(plan) == {"k0"}
    tracker.open_run("k1", second, plan["k1"], "data").finish("stopped", "slower than its peers")
    assert tracker.statuses(plan) == {"k0": "finished", "k1": "stopped", "k2": "missing"}
    assert tracker.finished(plan) == {"k0"}
    records = tracker.study_records("second")
    assert [(r.key, r.status, r.preset, r.seed) for r in records] == [
        ("k0", "finished", "dense_baseline", 0),
        ("k1", "stopped", "dense_baseline", 1),
        ("k2", "missing", "dense_baseline", 2),
    ]


def test_a_study_opened_again_is_the_same_and_loses_no_run(tracker: Tracker) -> None:
    plan = configs(3)
    first = tracker.open_study("demo", {"k1": plan["k1"]}, command="sweep --seeds 1")
    assert tracker.open_study("demo", {"k0": plan["k0"]}, command="sweep --seeds 2") == first
    assert tracker.open_study("demo", plan, command="sweep --seeds 1") == first
    assert tracker.study_keys("demo") == ["k1", "k0", "k2"]
    assert tracker.study_commands("demo") == ["sweep --seeds 1", "sweep --seeds 2"]
    assert [r.key for r in tracker.study_records("demo", keys=["k2", "k1"])] == ["k2", "k1"]
    assert tracker.studies() == ["demo"]


def test_a_run_of_a_corpus_that_changed_takes_its_place_in_the_study(tracker: Tracker) -> None:
    plan = configs(2)
    tracker.open_study("demo", plan)
    tracker.open_study("demo", {"new": plan["k0"]})
    assert tracker.study_keys("demo") == ["k1", "new"]


def test_runs_of_other_code_stay_in_the_study_and_out_of_its_table(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = configs(2)
    tracker.open_study("demo", plan)
    monkeypatch.setattr("hrs.tracking.tracker.code_version", lambda: "other")
    tracker.open_study("demo", {"new": plan["k0"]})
    assert tracker.study_versions("demo") == [code_version(), "other"]
    assert [r.key for r in tracker.study_records("demo")] == ["new"]
    assert [r.key for r in tracker.study_records("demo", code_version=code_version())] == ["k0", "k1"]
    with pytest.raises(HRSError, match=r"no runs of code version third \(it has: "):
        tracker.study_records("demo", code_version="third")


def test_samples_of_a_search_come_back_with_the_records(tracker: Tracker) -> None:
    plan, sample = configs(2), {"training.schedule.peak_lr": 0.00123456}
    study_id = tracker.open_study("search", plan, samples={"k0": sample, "k1": {"training.schedule.peak_lr": 1.0}})
    tracker.open_run("k0", study_id, plan["k0"], "data").finish("finished")
    assert [r.sample for r in tracker.study_records("search")] == [sample, {"training.schedule.peak_lr": 1.0}]


def test_an_end_that_a_run_could_not_record_is_recorded_for_it(tracker: Tracker, open_run: OpenRun) -> None:
    plan = configs(3)
    study_id = tracker.open_study("demo", plan)
    open_run("k1", plan["k1"]).finish("finished")
    for key in ("k0", "k1"):
        tracker.note_end(key, study_id, plan[key], "data", "failed", "it does not fit")
    records = tracker.study_records("demo")
    assert [(r.status, r.reason) for r in records] == [("failed", "it does not fit"), ("finished", ""), ("missing", "")]


def test_a_trial_is_a_child_of_its_study_with_tags_to_find_it_by(tracker: Tracker) -> None:
    config = ExperimentConfig(preset="hrs", scale="micro", seed=7)
    study_id = tracker.open_study("demo", {"k": config})
    run = tracker.open_run("k", study_id, config, "fingerprint")
    run.set_tags({"causal": "true"})
    run.finish("finished")
    tags = tracker._client.get_run(run.run_id).data.tags
    expected = {
        "mlflow.parentRunId": study_id,
        "hrs.run_key": "k",
        "hrs.study": "demo",
        "hrs.code_version": code_version(),
        "hrs.data_fingerprint": "fingerprint",
        "hrs.owner": this_process(),
        "preset": "hrs",
        "scale": "micro",
        "seed": "7",
        "causal": "true",
    }
    assert tags.items() >= expected.items()


def test_a_study_that_does_not_exist_is_answered_with_those_that_do(tracker: Tracker) -> None:
    with pytest.raises(HRSError, match="there is no study 'demo'; there are none yet"):
        tracker.study_keys("demo")
    tracker.open_study("ablation-tiny", {})
    with pytest.raises(HRSError, match="there are ablation-tiny"):
        tracker.study_records("demo")


@pytest.mark.parametrize("name", ["", "it's", "a/b", "x" * 101])
def test_study_names_that_no_folder_or_query_could_hold_are_refused(name: str, tracker: Tracker) -> None:
    with pytest.raises(HRSError, match="study name"):
        tracker.open_study(name, {})


def test_a_living_writer_keeps_its_run_and_a_dead_ones_is_closed_and_continued(
    tracker: Tracker, storage: Storage, open_run: OpenRun
) -> None:
    own = open_run("own")
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER_THAT_NEVER_ENDS, str(storage.root)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        with pytest.raises(RunBusy, match=rf"run k0 is being written by process .*:{writer.pid}:"):
            open_run("k0")
        assert tracker.reap() == []
    finally:
        writer.kill()
        writer.wait()
    tracker.open_study("demo", configs(1))  # the dead process owned the study too; now this one does
    assert tracker.reap("another") == []
    assert tracker.reap("demo") == ["dense_baseline tiny seed 0"]
    (record,) = tracker.records(["k0"])
    assert record.status == "killed"
    assert record.reason.startswith("its process ") and "killed from outside" in record.reason

    again = open_run("k0")
    again.log(1, {"train_loss": 0.5})
    again.finish("finished")
    own.finish("finished")
    (record,) = tracker.records(["k0"])
    assert (record.status, record.history["train_loss"]) == ("finished", [(0, 1.0), (1, 0.5)])


def test_a_process_is_known_by_its_start_and_not_by_its_number_alone() -> None:
    host, pid, started = this_process().rsplit(":", 2)
    assert is_alive(this_process(), None)
    assert not is_alive(f"{host}:{pid}:{float(started) - 100}", None)  # the number was given out again
    child = subprocess.Popen([sys.executable, "-c", ""])
    owner = f"{socket.gethostname()}:{child.pid}:{psutil.Process(child.pid).create_time()}"
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(owner, None)  # a zombie writes nothing any more
    child.wait()
    assert not is_alive(owner, None)


def test_a_process_on_another_host_lives_as_long_as_its_heartbeat() -> None:
    owner = "far-away:1:1.0"
    assert is_alive(owner, time.time() - 60)
    assert not is_alive(owner, time.time() - 3600)
    assert is_alive(owner, None)


def test_a_record_holds_everything_the_report_shows(tracker: Tracker, open_run: OpenRun, tmp_path: Path) -> None:
    documents = pa.table({"document": pa.array([0, 1], pa.int32()), "title": ["a", "b"], "nats": [1.5, 2.5]})
    with pa.OSFile(str(tmp_path / "documents.arrow"), "wb") as sink, pa.ipc.new_file(sink, documents.schema) as writer:
        writer.write_table(documents)
    audit = {
        "causal": False,
        "tests": [
            {"name": "gradient", "passed": True, "detail": "no gradient from the future"},
            {"name": "perturbation", "passed": False, "detail": "position 3 sees position 5"},
        ],
    }
    evaluation = {"loss_by_position": [3.0, 2.0], "tier_share": [[0.25, 0.75], [0.5, 0.5]]}
    training = {"seconds": 4.0, "tokens_per_second": 1234.5, "peak_memory_bytes": 10_000}
    for name, content in (("audit", audit), ("evaluation", evaluation), ("training", training)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "step_10").mkdir()
    (tmp_path / "step_10" / "model.safetensors").write_bytes(b"weights")

    config = ExperimentConfig(preset="hrs", seed=2)
    with open_run("k", config) as run:
        for step in range(3):
            run.log(step, {"train_loss": 3.0 - step, "tokens_per_second": 1.0})
        run.log(2, {"bits_per_byte": 1.25, "parameters": 4_000_000})
        for name in ("audit.json", "evaluation.json", "training.json", "documents.arrow", "step_10"):
            run.log_artifact(tmp_path / name)
    (record,) = tracker.records(["k"])
    assert (record.preset, record.scale, record.seed) == ("hrs", "tiny", 2)
    assert record.config == json.loads(json.dumps(to_dict(config)))
    assert record.causal is False
    assert record.audit_failures == ("perturbation: position 3 sees position 5",)
    assert record.parameters == 4_000_000
    assert record.tokens_per_second == 1234.5
    assert record.peak_memory_bytes == 10_000
    assert record.metrics["bits_per_byte"] == 1.25
    assert record.documents == documents
    assert record.loss_by_position == [3.0, 2.0]
    assert record.tier_share == [[0.25, 0.75], [0.5, 0.5]]
    assert record.history["train_loss"] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert tracker.records(["k"], with_history=False)[0].history == {}
    checkpoint = tracker._client.download_artifacts(run.run_id, "step_10/model.safetensors", str(tmp_path))
    assert Path(checkpoint).read_bytes() == b"weights"


def leave_results(folder: Path) -> list[Path]:
    """What an evaluation leaves of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = pa.table({"nats": [1.5]})
    with pa.OSFile(str(folder / "documents.arrow"), "wb") as sink, pa.ipc.new_file(sink, documents.schema) as writer:
        writer.write_table(documents)
    (folder / "evaluation.json").write_text(json.dumps({"loss_by_position": [3.0]}))
    return [folder / "evaluation.json", folder / "documents.arrow"]


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_finished_means_that_the_results_can_be_read(
    damage: str, tracker: Tracker, open_run: OpenRun, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    """From the run's directory or, where they are lost there, from the artifacts; one lost file is told, and heals."""
    files = leave_results(storage.run("k0"))
    with open_run("k0") as run:
        run.log(2, {"bits_per_byte": 1.25})
        for file in files:
            run.log_artifact(file)
    with open_run("k1", ExperimentConfig(seed=1)) as other:
        other.log(2, {"bits_per_byte": 1.5})
        for file in leave_results(storage.run("k1")):
            other.log_artifact(file)
    artifacts = storage.artifacts / run.run_id / "artifacts"
    shutil.rmtree(artifacts)
    assert tracker.finished(["k0", "k1"]) == {"k0", "k1"}
    record = tracker.records(["k0"])[0]
    assert record.status == "finished" and record.documents is not None and record.loss_by_position == [3.0]

    broken = storage.run("k0") / "evaluation.json"
    broken.write_text('{"loss') if damage == "cut" else broken.unlink()
    assert tracker.finished(["k0", "k1"]) == {"k1"}
    lost, whole = tracker.records(["k0", "k1"])
    assert whole.status == "finished"
    assert (lost.status, lost.reason) == ("failed", "evaluation.json missing or damaged: submit its study again")
    assert damage == "removed" or f"{broken} is damaged and left out" in caplog.text

    leave_results(storage.run("k0"))
    assert tracker.finished(["k0"]) == {"k0"}
    shutil.rmtree(storage.root / "runs")  # as on a machine that shares the tracking server alone
    assert tracker.finished(["k0", "k1"]) == {"k1"}


def test_a_study_whose_list_is_lost_has_the_runs_that_it_made(
    tracker: Tracker, open_run: OpenRun, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(2):
        open_run(f"k{seed}", ExperimentConfig(seed=seed)).finish("finished")
    shutil.rmtree(storage.artifacts)
    assert [(r.key, r.seed, r.status) for r in tracker.study_records("demo")] == [
        ("k0", 0, "finished"),
        ("k1", 1, "finished"),
    ]
    assert "the list of study 'demo' is not at" in caplog.text
    open_run("k2", ExperimentConfig(seed=2)).finish("finished")
    caplog.clear()
    assert tracker.study_keys("demo") == ["k0", "k1", "k2"] and not caplog.text


def test_a_run_that_failed_early_has_a_record_with_what_there_is(tracker: Tracker, open_run: OpenRun) -> None:
    open_run().finish("failed", "OutOfMemoryError: 12 GiB")
    (record,) = tracker.records(["k0"])
    assert (record.status, record.reason) == ("failed", "OutOfMemoryError: 12 GiB")
    assert record.causal is None and record.documents is None and record.metrics == {}
    assert record.config["scale"] == "tiny"


def test_a_report_is_kept_with_its_study(tracker: Tracker, tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    (report / "index.html").write_text("<h1>table</h1>")
    (report / "report.html").write_text("<h1>table</h1>")
    study_id = tracker.open_study("demo", {})
    tracker.log_study_artifact(study_id, report)
    tracker.log_study_artifact(study_id, report / "index.html")
    tracker.close_study(study_id, "finished")
    names = {file.path for file in tracker._client.list_artifacts(study_id)}
    assert {"report", "index.html", "study.json"} <= names
    experiment, study = tracker._client.get_experiment(tracker._connection[1]), tracker._client.get_run(study_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    page = f"#/experiments/{experiment.experiment_id}/runs/{study_id}"
    assert f"({page}/artifacts/report/report.html)" in study.data.tags["mlflow.note.content"]
    runs = f"/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    assert tracker.experiment_page(5000).endswith(runs)
    assert tracker.pages("demo", ["k0"]) == (f"http://127.0.0.1:5000/{page}", {})


def test_a_study_shows_the_best_bits_per_byte_of_its_causal_runs(tracker: Tracker) -> None:
    plan = configs(4)
    study_id = tracker.open_study("demo", plan)
    scores = {"k0": (1.5, "true"), "k1": (1.25, "true"), "k2": (0.2, "false")}
    for key, (bits, causal) in scores.items():
        run = tracker.open_run(key, study_id, plan[key], "data")
        run.log(1, {"bits_per_byte": bits})
        run.set_tags({"causal": causal})
        run.finish("finished")
    tracker.close_study(study_id, "finished")
    study = tracker._client.get_run(study_id).data
    assert study.metrics == {"best_bits_per_byte": 1.25} and study.tags["best_run"].endswith("(k1)")
    _, pages = tracker.pages("demo", plan)
    assert list(pages) == ["k0", "k1", "k2"] and pages["k1"].endswith(f"/runs/{tracker.run_id('k1')}")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (KeyError("bug"), "FAILED", r"KeyError: 'bug' \(test_tracker\.py:\d+\)"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
    ],
)
def test_what_ends_a_command_closes_the_studies_that_it_left_open(
    error: BaseException, status: str, reason: str, tracker: Tracker
) -> None:
    left, closed = tracker.open_study("left", {}), tracker.open_study("closed", {})
    tracker.close_study(closed, "finished")
    try:
        raise error
    except BaseException as ended:
        close_open_studies(ended)
    run, other = tracker._client.get_run(left), tracker._client.get_run(closed)
    assert (run.info.status, other.info.status) == (status, "FINISHED")
    assert re.fullmatch(reason, run.data.tags["hrs.reason"])
