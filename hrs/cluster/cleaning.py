"""What a storage holds that no study needs, and what killed processes left behind.

Needed is every run that a study lists, with its tokens, the runs that those read memories of, what the registry names,
what the queue holds, and whatever a living process uses. A run that is not tracked here is left alone: another tracking
store may know it.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from hrs.cluster.listing import folder_bytes
from hrs.errors import HRSError
from hrs.files import read_json
from hrs.queue.database import ENVIRONMENT, Database, queue_url
from hrs.queue.schema import runs as queued
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.tracking.naming import run_keys
from hrs.tracking.owner import OWNER_FILE, is_abandoned
from hrs.tracking.registry import registered_runs

UNCLAIMED_SECONDS = 24 * 3600.0
"""Age from which a temporary folder of an earlier version, which names no owner, counts as left behind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftover:
    """One folder that can be removed."""

    path: Path
    n_bytes: int
    reason: str
    artifacts: Path | None = None
    """The run's copies in the tracking store, which go with it."""


def find_leftovers(storage: Storage, *, old_code: bool = False, temporary: Path = Path("/tmp")) -> Iterator[Leftover]:
    """Yield what can be removed.

    Args:
        old_code: also the runs of code versions that a study no longer shows.
        temporary: where Ray's folders are.

    Raises:
        HRSError: if the tracking store or the queue cannot be read: what is needed is then not known.
    """
    needed, tokens = _needed(storage, old_code)
    tracker = Tracker(storage)
    ids = {run.tags["hrs.run_key"]: run.run_id for run in tracker.tracked()}
    keys = run_keys(storage)
    for key in keys:
        directory = storage.run(key)
        if key in ids and key not in needed and not _is_locked(directory):
            yield _leftover(directory, "no study shows this run", storage.artifacts / ids[key])
    if ids and ids.keys() >= set(keys):
        for folder in _folders(storage.tokens):
            if folder.name not in tokens and not folder.name.startswith("."):
                yield _leftover(folder, "no run that is kept was trained on these tokens")
    for folder in _folders(storage.root / "tune"):
        if _is_left_behind(folder):
            yield _leftover(folder, "bookkeeping of a search or sweep that has ended")
    for folder in sorted(temporary.glob("hrs-*")):
        if folder.is_dir() and folder.stat().st_uid == os.getuid() and _is_left_behind(folder):
            yield _leftover(folder, "temporary files of a process that was killed")


def remove(leftover: Leftover) -> None:
    """Delete a folder, and the copies of a run.

    Raises:
        HRSError: if it cannot be deleted.
    """
    for path in filter(None, (leftover.artifacts, leftover.path)):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise HRSError(f"{path} cannot be deleted ({error.strerror}): check its permissions") from error


def _needed(storage: Storage, old_code: bool) -> tuple[set[str], set[str]]:
    """Return the keys of the runs that something needs, and the fingerprints of their tokens."""
    tracker = Tracker(storage)
    studies = tracker.studies()
    keys = set().union(*(tracker.listed(name, newest_code=old_code) for name in studies)) | _queued(storage)
    if studies:  # else there may be no store yet, and none is made
        keys |= registered_runs(storage)
    runs = tracker.tracked()
    keys |= {run.tags["hrs.run_key"] for run in runs if run.status == "RUNNING"}
    for key in tuple(keys):
        config = storage.run(key) / "config.json"
        if config.is_file():
            with contextlib.suppress(HRSError, AttributeError, LookupError):
                keys.add(read_json(config)["training"]["retrieval"]["base"])
    tokens = {run.tags.get("hrs.data_fingerprint", "") for run in runs if run.tags["hrs.run_key"] in keys}
    return keys, tokens


def _queued(storage: Storage) -> set[str]:
    """Return the keys of all runs in the durable queue, if there is one."""
    if not (storage.root / "queue.db").is_file() and not os.environ.get(ENVIRONMENT):
        return set()
    database = Database(queue_url(storage.root))
    try:
        with database.read() as connection:
            return {key for (key,) in connection.execute(queued.select().with_only_columns(queued.c.key))}
    finally:
        database.close()


def _leftover(path: Path, reason: str, artifacts: Path | None = None) -> Leftover:
    n_bytes = folder_bytes(path) + (folder_bytes(artifacts) if artifacts else 0)
    return Leftover(path=path, n_bytes=n_bytes, reason=reason, artifacts=artifacts)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _is_locked(directory: Path) -> bool:
    """Return True if a living process works on a run."""
    if not (directory / "lock").exists():
        return False
    lock = filelock.FileLock(directory / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


def _is_left_behind(folder: Path) -> bool:
    """Return True if the owner of a folder is gone, or nobody has touched one without an owner for a day."""
    if (folder / OWNER_FILE).exists():
        return is_abandoned(folder)
    newest = max((path.lstat().st_mtime for path in (folder, *folder.iterdir())), default=0.0)
    return time.time() - newest > UNCLAIMED_SECONDS
