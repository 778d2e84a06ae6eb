"""What can be removed: what no study needs and what dead processes left, and nothing that is in use."""

import os
import subprocess
import sys
import time
from pathlib import Path

import filelock
import psutil
import pytest

from hrs.cluster.cleaning import UNCLAIMED_SECONDS, find_leftovers, remove
from hrs.config import ExperimentConfig, canonical_json, override
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.tracking.owner import OWNER_FILE, claim_folder

MIB = 2**20


def add_run(tracker: Tracker, storage: Storage, key: str, study: str | None, config: ExperimentConfig) -> None:
    """A finished run of 1 MiB, listed by a study or by none, on tokens of its own."""
    study_id = tracker.open_study(study or "other-micro", {key: config} if study else {})
    tracker.open_run(key, study_id, config, f"tokens-{key}").finish("finished")
    storage.run(key).mkdir(parents=True, exist_ok=True)
    (storage.run(key) / "weights").write_bytes(bytes(MIB))
    (storage.run(key) / "config.json").write_text(canonical_json(config))
    (storage.tokens / f"tokens-{key}").mkdir(parents=True)


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def found(storage: Storage, temporary: Path, **options: bool) -> set[str]:
    return {leftover.path.name for leftover in find_leftovers(storage, temporary=temporary, **options)}


def test_runs_that_no_study_lists_go_with_their_tokens_and_copies(
    tracker: Tracker, storage: Storage, temporary: Path
) -> None:
    config = ExperimentConfig()
    reader = override(
        ExperimentConfig(seed=1), {"training.retrieval.base": "base", "training.retrieval.fingerprint": "f"}
    )
    add_run(tracker, storage, "listed", "v1-tiny", config)
    add_run(tracker, storage, "reader", "v1-tiny", reader)
    add_run(tracker, storage, "base", None, config)
    add_run(tracker, storage, "loose", None, config)
    add_run(tracker, storage, "busy", None, config)
    with filelock.FileLock(storage.run("busy") / "lock"):
        assert found(storage, temporary) == {"loose", "tokens-loose", "tokens-busy"}
        (run, *_) = find_leftovers(storage, temporary=temporary)
        assert run.n_bytes > MIB and run.artifacts is not None and run.artifacts.is_dir()
        remove(run)
    assert not storage.run("loose").exists() and not run.artifacts.exists()
    assert storage.run("listed").is_dir() and storage.run("base").is_dir()

    (storage.root / "runs" / "unknown").mkdir()
    assert found(storage, temporary) == {"busy"}, "another tracking store may know it, and its tokens"


def test_runs_of_old_code_go_only_if_that_is_said(
    tracker: Tracker, storage: Storage, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_run(tracker, storage, "old", "v1-tiny", ExperimentConfig())
    monkeypatch.setattr("hrs.tracking.tracker.code_version", lambda: "newer")
    add_run(tracker, storage, "new", "v1-tiny", ExperimentConfig())
    assert found(storage, temporary) == set()
    assert found(storage, temporary, old_code=True) == {"old", "tokens-old"}


def test_folders_go_when_their_process_is_gone(tracker: Tracker, storage: Storage, temporary: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(child.pid).create_time()
    own, dead, fresh, aged = (temporary / f"hrs-{name}" for name in ("own", "dead", "fresh", "aged"))
    tune = storage.root / "tune" / "ablation-1"
    for folder in (own, dead, fresh, aged, tune):
        folder.mkdir(parents=True)
    claim_folder(own)
    owner = (own / OWNER_FILE).read_text().split(":")[0] + f":{child.pid}:{started:.2f}"
    (dead / OWNER_FILE).write_text(owner)
    (tune / OWNER_FILE).write_text(owner)
    long_ago = time.time() - UNCLAIMED_SECONDS - 60
    os.utime(aged, (long_ago, long_ago))
    assert found(storage, temporary) == {"hrs-aged"}
    child.communicate(b"\n")
    assert found(storage, temporary) == {"hrs-aged", "hrs-dead", "ablation-1"}
