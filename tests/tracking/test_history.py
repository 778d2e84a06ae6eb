"""Reading the tracking store: the file itself and MLflow's client say the same, and a lock is waited for."""

import logging
import math
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import hrs.tracking.patience as patience
from hrs.config import ExperimentConfig
from hrs.errors import HRSError
from hrs.storage import Storage
from hrs.tracking import RunLogger, Tracker
from hrs.tracking.history import ClientHistory, SqliteHistory
from hrs.tracking.store import connect

OpenRun = Callable[..., RunLogger]


@pytest.fixture
def filled(tracker: Tracker, open_run: OpenRun) -> Tracker:
    """Three runs: one with a NaN, one that failed, one that runs."""
    for seed in range(3):
        run = open_run(f"k{seed}", ExperimentConfig(seed=seed))
        for step in (0, 1, 2):
            run.log(step, {"train_loss": step + seed, "system/cpu": 1.0})
        run.log(3, {"train_loss": math.nan if seed == 0 else 0.5})
        if seed < 2:
            run.finish("finished" if seed == 0 else "failed", "why")
        else:
            run._send()
    return tracker


def test_the_file_and_the_client_say_the_same(filled: Tracker, storage: Storage) -> None:
    file = SqliteHistory(storage.root / "mlflow" / "mlflow.db", storage.artifacts)
    client = ClientHistory(lambda: connect(storage))
    by_key = file.by_tag("hrs.run_key", ["k2", "k0", "k1", "unknown"])
    assert {run.tags["hrs.run_key"] for run in by_key} == {"k0", "k1", "k2"}
    for query in (lambda h: h.by_tag("hrs.kind", ["trial"]), lambda h: h.by_tag("hrs.kind"), lambda h: h.running()):
        ours, theirs = query(file), query(client)
        assert {run.run_id for run in ours} == {run.run_id for run in theirs}
        for run in ours:
            other = next(r for r in theirs if r.run_id == run.run_id)
            assert repr(replace(run, metrics={})) == repr(replace(other, metrics={}, tags=_as_in(run.tags, other.tags)))
            assert sorted(map(repr, run.metrics.items())) == sorted(map(repr, other.metrics.items()))
    assert repr(file.curves(by_key)) == repr(client.curves(by_key))  # repr, for NaN is not equal to itself
    for run in by_key:
        assert file.files(run, ["config.json", "none"]) == client.files(run, ["config.json", "none"])


def _as_in(first: dict[str, str], second: dict[str, str]) -> dict[str, str]:
    """The second in the order of the first; equal sets of names."""
    assert first.keys() == second.keys()
    return {name: second[name] for name in first}


def test_reading_writes_nothing_and_needs_no_store(filled: Tracker, storage: Storage, tmp_path: Path) -> None:
    def contents() -> dict[Path, tuple[int, float]]:
        return {p: (p.stat().st_size, p.stat().st_mtime) for p in (storage.root / "mlflow").rglob("*")}

    before = contents()
    reader = Tracker(storage)
    assert [r.status for r in reader.study_records("demo")] == ["finished", "failed", "running"]
    assert reader.finished(["k0", "k1"]) == {"k0"}
    assert contents() == before
    empty = Storage(tmp_path / "nowhere")
    assert Tracker(empty).studies() == [] and Tracker(empty).finished(["k0"]) == set()
    assert not empty.root.exists()


def test_artifacts_of_a_storage_that_moved_are_found_in_it(filled: Tracker, storage: Storage, tmp_path: Path) -> None:
    moved = Storage(tmp_path / "moved")
    shutil.copytree(storage.root / "mlflow", moved.root / "mlflow")
    shutil.rmtree(moved.artifacts)
    run = filled._history.by_tag("hrs.run_key", ["k1"])[0]
    history = SqliteHistory(moved.root / "mlflow" / "mlflow.db", moved.artifacts)
    gone = replace(run, artifact_uri="file:///no/such/storage/mlflow/artifacts/x/artifacts")
    assert history.files(gone, ["config.json"]) == {}
    (moved.artifacts / run.run_id / "artifacts").mkdir(parents=True)
    (moved.artifacts / run.run_id / "artifacts" / "config.json").write_text("{}")
    assert history.files(gone, ["config.json"]) == {"config.json": b"{}"}


@pytest.mark.parametrize("n_runs", [1, 3])
def test_the_number_of_queries_does_not_grow_with_the_runs(
    n_runs: int, filled: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries: list[str] = []
    rows = SqliteHistory._rows

    def counted(self: SqliteHistory, query: str, values: list[str]) -> list[tuple]:
        queries.append(query)
        return rows(self, query, values)

    monkeypatch.setattr(SqliteHistory, "_rows", counted)
    filled.records([f"k{seed}" for seed in range(n_runs)])
    assert len(queries) == 4, "runs, tags, last values, curves"


# ---- locks -----------------------------------------------------------------------------------------------------------


@contextmanager
def locked(storage: Storage, until: threading.Event) -> Iterator[None]:
    """Another connection that has the whole file to itself until an event, or the end of the block."""
    held = threading.Event()

    def hold() -> None:
        database = sqlite3.connect(storage.root / "mlflow" / "mlflow.db", isolation_level=None)
        database.execute("BEGIN EXCLUSIVE")
        held.set()
        until.wait(60)
        database.execute("ROLLBACK")
        database.close()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    try:
        yield
    finally:
        until.set()
        thread.join()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite itself gives up at once, so that only our own patience is seen."""
    connect_to = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect_to(*args, **options | {"timeout": 0.01}))


def test_a_locked_store_is_waited_for_and_said(
    filled: Tracker,
    storage: Storage,
    impatient: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = threading.Event()
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: release.set())
    with locked(storage, release), caplog.at_level(logging.WARNING):
        assert Tracker(storage).finished(["k0"]) == {"k0"}
    assert "is locked by another process: waiting" in caplog.text


def test_a_store_that_stays_locked_is_no_broken_one(
    filled: Tracker, storage: Storage, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "LOCK_SECONDS", 0.05)
    with locked(storage, threading.Event()), pytest.raises(HRSError, match="locked by another process") as caught:
        Tracker(storage)
    assert "move" not in str(caught.value)
    assert Tracker(storage).finished(["k0"]) == {"k0"}


def test_what_writes_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter([Exception("(sqlite3.OperationalError) database is locked"), None])

    class Client:
        def set_tag(self, *values: str) -> str:
            if error := next(calls):
                raise error
            return "written"

    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    assert patience.PatientClient(Client(), "store").set_tag("id", "name", "value") == "written"
