"""The tracking store: one SQLite file below the storage root, or the MLflow server that MLFLOW_TRACKING_URI names."""

import contextlib
import functools
import logging
import os
import sqlite3
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock, Timeout

from hrs.errors import HRSError, is_full
from hrs.storage import Storage
from hrs.tracking.history import EXPERIMENT, ClientHistory, History, SqliteHistory
from hrs.tracking.patience import LOCK_SECONDS, PatientClient, patiently
from hrs.tracking.study_page import UI_PORT

if TYPE_CHECKING:
    from mlflow import MlflowClient

_TABLES = {"experiments", "alembic_version"}
"""Of MLflow, by which its databases are known."""
_REACH_TIMEOUT_SECONDS = 5
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow's own 7 retries keep a training run waiting for minutes; RunLogger buffers and retries instead.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def connect(storage: Storage) -> tuple["MlflowClient", str]:
    """A client of the store and the id of the experiment; both are made if they are missing.

    The first to open a new SQLite file makes it under a file lock and under another name, with the experiment in it, so
    that no process ever sees a store whose migrations are still running (two at once would crash each other).

    Raises:
        HRSError: if the store is not one, belongs to something else, is half-made or cannot be reached.
    """
    path = _sqlite_path(storage)
    if path is None:
        _require_server(storage.tracking_uri)
    _import_mlflow()
    if path is not None:
        if _is_missing(path):
            _create_sqlite(path, storage)
        _require_whole(path)
        if path == storage.tracking_database:
            _follow_storage(path, storage)
    return _experiment(storage.tracking_uri, storage)


def _sqlite_path(storage: Storage) -> Path | None:
    """Return the SQLite file that the tracking URI names; None for a server."""
    uri = storage.tracking_uri
    if urlsplit(uri).scheme in ("http", "https"):
        return None
    if (path := _path_of(uri)) is not None:
        return path
    raise HRSError(
        f"tracking store '{uri}' is not supported: set MLFLOW_TRACKING_URI to http://HOST:PORT or "
        "sqlite:////ABSOLUTE/PATH.db, or unset it"
    )


def _path_of(uri: str) -> Path | None:
    """The file that an SQLite URI names by an absolute path; None of anything else."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except ArgumentError:
        return None
    if url.get_backend_name() != "sqlite" or url.query or not (url.database or "").startswith("/"):
        return None
    return Path(url.database or "")


def open_history(storage: Storage) -> History:
    """Return the tracking store for reading, which makes nothing and, on a SQLite file, needs no MLflow.

    Raises:
        HRSError: if the store is not one, belongs to something else, is half-made or cannot be reached.
    """
    if (path := _sqlite_path(storage)) is None:
        _require_server(storage.tracking_uri)
        return ClientHistory(functools.cache(lambda: connect(storage)))
    if not _is_missing(path):
        _require_whole(path)
    return SqliteHistory(path, storage.artifacts)


@contextlib.contextmanager
def store_lock(storage: Storage) -> Iterator[None]:
    """Hold the lock under which a store, a study or a run is looked up and made, so that none is made twice.

    Raises:
        HRSError: if another process holds it for ``LOCK_SECONDS``.
    """
    folder = storage.root / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "tracking.lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise HRSError(
            f"{lock.lock_file} has been held by another process for {LOCK_SECONDS:.0f} s: end that process (`fuser` on "
            "the file names it) and run the same command again"
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_database(path: Path) -> None:
    """Read all of an SQLite file and check it; SQLite writes nothing meanwhile.

    Raises:
        HRSError: if it cannot be opened, is damaged or, as the tracking store, of something else.
    """
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            problems = [line for (line,) in database.execute("PRAGMA integrity_check") if line != "ok"]
            tables = _tables(database)
    except sqlite3.DatabaseError as error:
        raise HRSError(f"{path} cannot be read as SQLite ({error})") from error
    if problems:
        raise HRSError(f"{path} is damaged: {'; '.join(problems[:3])}")
    if path.name == "mlflow.db" and not tables >= _TABLES:
        raise HRSError(f"{path} is no tracking store: it has no table {', '.join(sorted(_TABLES - tables))}")


def _tables(database: sqlite3.Connection) -> set[str]:
    return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def ui_command(storage: Storage, host: str = "127.0.0.1", port: int = UI_PORT) -> list[str]:
    """The command that shows the SQLite store in MLflow's browser interface: one worker, no job runner.

    Raises:
        HRSError: if the runs are on a server already.
    """
    uri = storage.tracking_uri
    if _path_of(uri) is None:
        raise HRSError(f"the runs are on a tracking server already: open {uri} in a browser")
    lean = ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", "MLFLOW_DISABLE_TELEMETRY=true"]
    server = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", host, "--port", str(port)]
    return ["env", *lean, *server, "--backend-store-uri", uri, "--artifacts-destination", storage.artifacts.as_uri()]


def _remedy(error: Exception) -> str:
    if is_full(error):
        return "make room on its disk, then run the same command again"
    if "readonly database" in str(error) or "unable to open" in str(error):
        return "make the file and its folder writable for this user"
    return "if it is older run 'mlflow db upgrade' on it, if it is half-made move it away"


def _import_mlflow() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It prints a stack trace before it raises the same error, also for one that a retry mends.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _require_server(uri: str) -> None:
    parts = urlsplit(uri)
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    try:
        urllib.request.urlopen(f"{address}/health", timeout=_REACH_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):  # the client, unlike this look, brings credentials
            raise HRSError(
                f"{address} is not an MLflow server (it answers {error.code} to /health): correct MLFLOW_TRACKING_URI"
            ) from error
    except OSError as error:
        raise HRSError(
            f"tracking server {address} cannot be reached ({getattr(error, 'reason', error)}): "
            "start it, or unset MLFLOW_TRACKING_URI to use the storage folder"
        ) from error


def _require_whole(path: Path) -> None:
    """Refuse a file that is no tracking store, and wait for one that is only locked."""

    def table_names() -> set[str]:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            return _tables(database)

    try:
        tables = patiently(table_names, str(path))
    except sqlite3.OperationalError as error:  # of the file or its disk; what is in the file may be whole
        raise HRSError(f"tracking store {path} cannot be read ({error}): check its permissions and its disk") from error
    except sqlite3.DatabaseError as error:
        raise HRSError(
            f"tracking store {path} cannot be read as SQLite ({error}): put a copy of it back, or move it away to "
            "begin without a history"
        ) from error
    if not tables >= _TABLES:
        raise HRSError(f"tracking store {path} is a database of something else: name another MLFLOW_TRACKING_URI")
    if missing := {"runs", "tags", "metrics", "latest_metrics"} - tables:
        raise HRSError(
            f"tracking store {path} cannot be used (it has no table {min(missing)}): it is half-made, move it away"
        )


_URIS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)
"""Columns in which MLflow keeps absolute URIs of artifacts."""


def _follow_storage(path: Path, storage: Storage) -> None:
    """Write the artifacts' new place into the database of a storage that was moved, renamed or copied.

    MLflow keeps absolute URIs: the artifacts of such a storage were out of reach, and those of a copy the original's.
    """
    new = storage.artifacts.as_uri()
    with closing(sqlite3.connect(path, timeout=60)) as database:
        old = _artifact_location(database)
        if old in (None, new) or not str(old).endswith("/mlflow/artifacts") or _is_same_folder(str(old), storage):
            return
        with store_lock(storage), database:
            columns = {(table, column[1]) for table in _tables(database) for column in _columns(database, table)}
            for table, column in (pair for pair in _URIS if pair in columns):
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (new, len(str(old)) + 1, old, len(str(old)) + 1, f"{old}/"),
                )


def _artifact_location(database: sqlite3.Connection) -> str | None:
    try:
        found = database.execute("SELECT artifact_location FROM experiments WHERE name = ?", (EXPERIMENT,)).fetchone()
    except sqlite3.DatabaseError:  # half-made: what opens it says so
        return None
    return found[0] if found else None


def _columns(database: sqlite3.Connection, table: str) -> list[tuple[Any, ...]]:
    return database.execute("SELECT * FROM pragma_table_info(?)", (table,)).fetchall()


def _is_same_folder(uri: str, storage: Storage) -> bool:
    old = Path(url2pathname(urlsplit(uri).path))
    try:
        return old.samefile(storage.artifacts)
    except OSError:
        return False


def _is_missing(path: Path) -> bool:
    return not path.exists() or path.stat().st_size == 0


def _create_sqlite(path: Path, storage: Storage) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.engine import URL

    path.parent.mkdir(parents=True, exist_ok=True)
    storage.artifacts.mkdir(parents=True, exist_ok=True)
    with store_lock(storage):
        if not _is_missing(path):
            return
        unfinished = path.with_name(path.name + ".new")
        unfinished.unlink(missing_ok=True)
        # Absolute, or artifacts would land below the working directory of whichever process logs them.
        url = URL.create("sqlite+pysqlite", database=str(unfinished))
        store = SqlAlchemyStore(url.render_as_string(), storage.artifacts.as_uri())
        store.create_experiment(EXPERIMENT, artifact_location=storage.artifacts.as_uri())
        store.engine.dispose()
        os.replace(unfinished, path)


def _experiment(uri: str, storage: Storage) -> tuple["MlflowClient", str]:
    from alembic.util import CommandError
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = cast(MlflowClient, PatientClient(MlflowClient(uri), uri))
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            with store_lock(storage):
                found = client.get_experiment_by_name(EXPERIMENT)
                if found is None:
                    is_file = _path_of(uri) is not None
                    location = storage.artifacts.as_uri() if is_file else None  # a server has its own
                    return client, client.create_experiment(EXPERIMENT, artifact_location=location)
    except (MlflowException, SQLAlchemyError, CommandError) as error:
        cause = " ".join(str(error).split())[:200]
        raise HRSError(f"tracking store {uri} cannot be used ({cause}): {_remedy(error)}") from error
    if found.lifecycle_stage != "active":
        raise HRSError(f"experiment '{EXPERIMENT}' is deleted in {uri}: restore it with 'mlflow experiments restore'")
    return client, found.experiment_id
