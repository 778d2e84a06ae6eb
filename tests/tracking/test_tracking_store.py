"""Opening a store: made whole and once, or refused in one sentence."""

import http.server
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from waiting import free_port, wait_for_health

from hrs.config import ExperimentConfig
from hrs.errors import HRSError
from hrs.storage import Storage, open_storage
from hrs.tracking import Tracker, ui_command
from hrs.tracking.store import check_database
from hrs.tracking.study_page import prepare_experiment

WRITER = """
import sys
from pathlib import Path
from hrs.config import ExperimentConfig
from hrs.storage import open_storage
from hrs.tracking import Tracker
root, seed = Path(sys.argv[1]), int(sys.argv[2])
config = ExperimentConfig(seed=seed)
tracker = Tracker(open_storage(root))
study_id = tracker.open_study("together", {f"key{seed}": config})
with tracker.open_run(f"key{seed}", study_id, config, "data") as run:
    for step in range(100):
        run.log(step, {"train_loss": step + seed / 100, "lr": 1e-3, "grad_norm": 1.0})
"""


@pytest.mark.parametrize("n_writers", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_processes_that_start_at_once_make_one_store_and_lose_nothing(n_writers: int, tmp_path: Path) -> None:
    """Also after a first attempt that was killed half-way and left its unfinished file."""
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db.new").write_bytes(b"half-made")
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in range(n_writers)
    ]
    errors = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * n_writers, errors

    tracker = Tracker(open_storage(tmp_path))
    assert tracker.studies() == ["together"]
    records = tracker.study_records("together")
    assert sorted(record.seed for record in records) == list(range(n_writers))
    for record in records:
        assert record.status == "finished"
        assert record.history["train_loss"] == [(step, step + record.seed / 100) for step in range(100)]
        assert len(record.history["lr"]) == len(record.history["grad_norm"]) == 100


def test_artifacts_lie_below_the_storage_root_whatever_the_working_directory(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    tracker = Tracker(storage)
    config = ExperimentConfig()
    tracker.open_run("k0", tracker.open_study("demo", {"k0": config}), config, "data").finish("finished")
    assert list(elsewhere.iterdir()) == []
    assert list(storage.artifacts.rglob("config.json"))


@pytest.mark.parametrize("name", ["per%2Fcent", "what?mode=ro", "ha#sh", "a b+ü"])
def test_a_storage_may_have_any_name(name: str, tmp_path: Path) -> None:
    storage = open_storage(tmp_path / name)
    tracker, config = Tracker(storage), ExperimentConfig()
    with tracker.open_run("k0", tracker.open_study("demo", {"k0": config}), config, "data") as run:
        run.log(0, {"train_loss": 1.0})
    (record,) = Tracker(storage).study_records("demo")
    assert record.status == "finished" and record.config["scale"] == "tiny"
    assert list(storage.artifacts.rglob("config.json")) and storage.tracking_database.stat().st_size > 0
    check_database(storage.tracking_database)
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing is written outside of it"


def test_a_storage_of_a_user_who_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(HRSError, match="storage ~nosuchuser/hrs cannot be found"):
        open_storage("~nosuchuser/hrs")


def as_a_new_process(root: Path) -> Tracker:
    """A tracker without what MLflow remembers of artifacts by run, since both storages have the same runs."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()
    return Tracker(open_storage(root))


def test_a_storage_can_be_moved_and_copied(storage: Storage, tmp_path: Path) -> None:
    """MLflow keeps absolute URIs of artifacts."""
    here = open_storage(tmp_path / "here" / "deep")
    (here.root / "mlflow").mkdir()
    shutil.copy(storage.tracking_database, here.tracking_database)
    tracker, config = Tracker(here), ExperimentConfig()
    tracker.open_run("k0", tracker.open_study("demo", {"k0": config}), config, "data").finish("finished")
    there = open_storage(tmp_path / "there%20")
    there.root.rmdir()
    here.root.rename(there.root)
    assert as_a_new_process(there.root).study_records("demo")[0].config["scale"] == "tiny"
    copied = tmp_path / "copied"
    shutil.copytree(there.root, copied)
    copy = as_a_new_process(copied)
    other = ExperimentConfig(seed=1)
    copy.open_run("k1", copy.open_study("demo", {"k1": other}), other, "data").finish("finished")
    assert [record.seed for record in copy.study_records("demo")] == [0, 1]
    assert len(list((copied / "mlflow").rglob("config.json"))) == 2
    assert len(list((there.root / "mlflow").rglob("config.json"))) == 1, "the original is left alone"
    assert [record.seed for record in as_a_new_process(there.root).study_records("demo")] == [0]


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "sqlite:///relative.db", "postgresql://host/db"])
def test_unsupported_stores_are_refused(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(HRSError, match="is not supported: set MLFLOW_TRACKING_URI to http"):
        Tracker(open_storage(tmp_path))


def test_an_unreachable_server_is_one_sentence_without_long_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(HRSError, match=r"cannot be reached .*Connection refused.*: start it, or unset") as caught:
        Tracker(open_storage(tmp_path))
    assert sum(slept) < 6, "MLflow alone tries again for minutes"
    assert "secret" not in str(caught.value)


@pytest.fixture
def foreign_server() -> Iterator[str]:
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_of_something_else_is_named(
    foreign_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", foreign_server)
    with pytest.raises(HRSError, match=f"{foreign_server} is not an MLflow server .*404"):
        Tracker(open_storage(tmp_path))


def write_text(path: Path) -> None:
    path.write_text("this is a diary, not a database, and it is longer than one page header of a hundred bytes " * 3)


def write_other_database(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")


def write_half_migrated_store(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE experiments (experiment_id INTEGER)")
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('181f10493468')")


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (write_text, "cannot be read as SQLite"),
        (write_other_database, "is a database of something else"),
        (write_half_migrated_store, "cannot be used .*half-made"),
    ],
)
def test_a_file_that_is_not_a_whole_store_is_refused_in_one_sentence(write, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    write(tmp_path / "mlflow" / "mlflow.db")
    with pytest.raises(HRSError, match=sentence) as caught:
        Tracker(open_storage(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_database_of_something_else_is_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "mlflow" / "mlflow.db"
    path.parent.mkdir()
    write_other_database(path)
    before = path.read_bytes()
    with pytest.raises(HRSError):
        Tracker(open_storage(tmp_path))
    assert path.read_bytes() == before


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, json, hrs.tracking; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    assert not {"mlflow", "torch", "ray", "pyarrow", "matplotlib", "psutil", "sqlalchemy"} & set(modules)


def test_the_interface_of_a_server_is_the_server_itself(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    with pytest.raises(HRSError, match="open http://tracking:5000 in a browser"):
        ui_command(storage)


@pytest.mark.slow
def test_a_run_through_a_real_server_reads_back_the_same(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is the one that ``ui_command`` starts, on the SQLite store of the storage."""
    port = free_port()
    server = subprocess.Popen(
        ui_command(storage, port=port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        wait_for_health(port, lambda: server.poll() is None)
        tracker = Tracker(storage)
        config = ExperimentConfig(seed=3)
        study_id = tracker.open_study("served", {"k": config})
        with tracker.open_run("k", study_id, config, "data") as run:
            for step in range(20):
                run.log(step, {"train_loss": 1 / (step + 1)})
        through_server = tracker.study_records("served")
    finally:
        server.terminate()
        server.wait()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert through_server == Tracker(storage).study_records("served")
    assert through_server[0].history["train_loss"] == [(step, 1 / (step + 1)) for step in range(20)]


def test_two_that_describe_the_experiment_at_once_agree(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow looks for a tag and then inserts it: of two at once, one is refused by the database."""
    client, experiment_id = tracker._connection
    wanted = client.get_experiment(experiment_id).tags
    for tag in wanted:
        client._tracking_client.store.delete_experiment_tag(experiment_id, tag)
    assert not client.get_experiment(experiment_id).tags
    insert = client.set_experiment_tag

    def insert_second(*arguments: str) -> None:
        insert(*arguments)
        raise MlflowException("UNIQUE constraint failed")

    monkeypatch.setattr(client, "set_experiment_tag", insert_second)
    prepare_experiment(client, experiment_id)
    assert client.get_experiment(experiment_id).tags == wanted
