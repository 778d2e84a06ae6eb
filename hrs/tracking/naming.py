"""Models by name: what a person types in place of a path, and the list of runs to choose from.

A name is, in this order: ``mlflow:NAME@ALIAS``, a path that exists, ``PRESET@STUDY`` (the preset's best run in a study,
``PRESET/SEED@STUDY`` that seed's), a study (its best causal run), or the beginning of a run's key.
"""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hrs.errors import HRSError
from hrs.files import absolute_path
from hrs.storage import Storage
from hrs.tracking.candidates import judge
from hrs.tracking.registry import PREFIX, resolve_model
from hrs.tracking.tracker import Tracker

if TYPE_CHECKING:
    from hrs.report.records import RunRecord

_KEY_START = re.compile(r"[0-9a-f]{4,16}")
_SHOWN = 5
"""Candidates in a sentence."""


def find_model(storage: Storage, name: str) -> Path:
    """Return where the model lies that ``name`` stands for.

    Raises:
        HRSError: if nothing has that name, or several do; the sentence names candidates.
    """
    if name.startswith(PREFIX):
        return resolve_model(storage, name)
    if (path := absolute_path(name) if name.startswith("~") else Path(name)).exists():
        return path
    if os.sep in name and "@" not in name:
        raise HRSError(f"there is no model at {path.absolute()}: name a run, a study, a path or {PREFIX}NAME@ALIAS")
    tracker = Tracker(storage)
    if "@" in name:
        return _directory(storage, _in_study(tracker, *name.rsplit("@", 1)))
    if name in tracker.studies():
        return _directory(storage, best_run(name, tracker.study_records(name, with_history=False)).key)
    return _directory(storage, _by_key(storage, tracker, name))


def best_run(study: str, records: "Sequence[RunRecord]") -> "RunRecord":
    """Return the finished, causal run with the fewest bits per byte.

    Raises:
        HRSError: if there is none.
    """
    candidates = judge(records)
    if candidates and candidates[0].verdict == "taken":
        return candidates[0].record
    raise HRSError(
        f"study '{study}' has no finished run that passed the audit: finish one, or name a run as PRESET@{study} or by "
        "its directory"
    )


def run_keys(storage: Storage) -> list[str]:
    """Return the keys of all runs whose directories lie in a storage."""
    folder = storage.root / "runs"
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []


def model_names(storage: Storage, beginning: str) -> list[str]:
    """Return the names of models that begin with what was typed so far, for the completion of a shell."""
    tracker = Tracker(storage)
    preset, at, study = beginning.rpartition("@")
    if at:
        studies = [name for name in tracker.studies() if name.startswith(study)]
        return [f"{preset}@{name}" for name in studies]
    names = [*tracker.studies(), *run_keys(storage)] if beginning else tracker.studies()
    return [name for name in names if name.startswith(beginning)]


def _directory(storage: Storage, key: str) -> Path:
    if not (directory := storage.run(key)).is_dir():
        raise HRSError(f"run {key} is tracked, but its directory {directory} is gone: run its study again")
    return directory


def _in_study(tracker: Tracker, preset: str, study: str) -> str:
    """Return the key of a preset's best finished run in a study, causal or not: it was asked for by name."""
    if study not in (studies := tracker.studies()):
        raise HRSError(f"there is no study '{study}' in '{preset}@{study}'{_meant(study, studies)}")
    preset, _, seed = preset.partition("/")
    records = tracker.study_records(study, with_history=False)
    if preset not in (presets := list(dict.fromkeys(record.preset for record in records))):
        raise HRSError(f"study '{study}' has no preset '{preset}': it has {', '.join(presets) or 'none yet'}")
    runs = [r for r in records if r.preset == preset and seed in ("", str(r.seed))]
    finished = [r for r in runs if r.status == "finished" and "bits_per_byte" in r.metrics]
    if not finished:
        states = ", ".join(f"seed {r.seed} {r.status}" for r in runs) or f"no seed {seed}"
        raise HRSError(f"{preset} has no finished run in study '{study}' ({states}): run the study again")
    return min(finished, key=lambda r: r.metrics["bits_per_byte"]).key


def _by_key(storage: Storage, tracker: Tracker, name: str) -> str:
    keys = run_keys(storage)
    found = [key for key in keys if key.startswith(name)] if _KEY_START.fullmatch(name) else []
    if len(found) == 1:
        return found[0]
    if found:
        raise HRSError(f"'{name}' is the beginning of {len(found)} runs ({_some(found)}): type more of it")
    raise HRSError(
        f"no path, study or run has the name '{name}'{_meant(name, [*tracker.studies(), *keys])}; `hrs runs` lists "
        "what there is"
    )


def _meant(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, _SHOWN, 0.5)
    if close:
        return f": did you mean {' or '.join(close)}"
    return f": there are {_some(names)}" if names else ": there are none yet"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
