"""From a tracked run to the record a report needs."""

import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hrs.tracking.history import Curve, History, Tracked
from hrs.tracking.logger import Outcome

if TYPE_CHECKING:  # a worker that only logs must not import the report, which brings its plots
    from hrs.report.records import RunRecord, Status

_log = logging.getLogger(__name__)

_FILES = ("config.json", "training.json", "evaluation.json", "audit.json", "documents.arrow")
_RESULTS = ("evaluation.json", "documents.arrow")


def status_of(run: Tracked | None) -> "Status":
    """The outcome that was written down, else what MLflow says; ``missing`` without a run."""
    if run is None:
        return "missing"
    if run.status in ("RUNNING", "SCHEDULED"):
        return "running"
    outcome = run.tags.get("hrs.outcome")
    by_name: dict[str | None, Status] = {name: name for name in get_args(Outcome)}
    by_status: dict[str, Status] = {"FINISHED": "finished", "FAILED": "failed"}
    return by_name.get(outcome) or by_status.get(run.status, "killed")


def missing_record(key: str) -> "RunRecord":
    """The record of a run that never was."""
    from hrs.report.records import RunRecord

    return RunRecord(key=key, preset="", scale="", seed=0, status="missing")


def has_results(history: History, run: Tracked, directory: Path) -> bool:
    """Whether what was measured of a finished run can be read; True of one that was never evaluated."""
    return not _lost(run, _Contents(history, run, directory))


def read_record(history: History, run: Tracked, directory: Path, curves: Mapping[str, Curve]) -> "RunRecord":
    """The record of a run from its tags, metrics and files; what the run does not have stays empty.

    A finished run whose results are missing or damaged is ``failed``: submitting its study measures it again.

    Args:
        directory: of the run in the storage, where files of a finished run are read first: artifacts are copies.
    """
    from hrs.report.records import RunRecord

    tags, metrics = run.tags, run.metrics
    contents = _Contents(history, run, directory)
    documents = contents.read("documents.arrow")
    audit, evaluation = contents.read("audit.json"), contents.read("evaluation.json") or {}
    lost = _lost(run, contents)
    reason = f"{', '.join(lost)} missing or damaged: submit its study again" if lost else tags.get("hrs.reason", "")
    summary = dict(metrics) | (contents.read("training.json") or {})
    return RunRecord(
        key=tags["hrs.run_key"],
        preset=tags["preset"],
        scale=tags["scale"],
        seed=int(tags["seed"]),
        status="failed" if lost else status_of(run),
        reason=reason,
        code_version=tags.get("hrs.code_version", ""),
        data_fingerprint=tags.get("hrs.data_fingerprint", ""),
        causal=audit["causal"] if audit else None,
        audit_failures=tuple(f"{t['name']}: {t['detail']}" for t in audit["tests"] if not t["passed"]) if audit else (),
        parameters=_integer(summary.get("parameters")),
        tokens_per_second=summary.get("tokens_per_second"),
        peak_memory_bytes=_integer(summary.get("peak_memory_bytes")),
        metrics=dict(metrics),
        documents=documents,
        loss_by_position=evaluation.get("loss_by_position"),
        history=dict(curves),
        config=contents.read("config.json") or {},
        tier_share=evaluation.get("tier_share") or None,
    )


class _Contents:
    """Files of a run, each from its directory or, where it is missing or damaged there, from its artifacts."""

    def __init__(self, history: History, run: Tracked, directory: Path) -> None:
        self._history, self._run, self._directory = history, run, directory
        self._found: dict[str, Any] = {}

    def read(self, name: str) -> Any:
        """Content of a file, parsed; None if it is nowhere whole, and damage is logged."""
        if name not in self._found:
            self._found[name] = self._read(name)
        return self._found[name]

    def _read(self, name: str) -> Any:
        # What lies in the directory of a run that is not finished may be of an earlier attempt.
        own = self._directory / name
        if status_of(self._run) == "finished" and own.is_file():
            found = _parse(name, own.read_bytes(), str(own))
            if found is not None:
                return found
        if name not in self._artifacts:
            return None
        return _parse(name, self._artifacts[name], f"artifact {name} of run {self._run.tags['hrs.run_key']}")

    @cached_property
    def _artifacts(self) -> dict[str, bytes]:
        return self._history.files(self._run, _FILES)


def _lost(run: Tracked, contents: _Contents) -> list[str]:
    """Names of the results that a finished run had and that cannot be read any more."""
    if status_of(run) != "finished" or "bits_per_byte" not in run.metrics:
        return []
    return [name for name in _RESULTS if contents.read(name) is None]


def _parse(name: str, content: bytes, where: str) -> Any:
    import pyarrow as pa

    try:
        if name.endswith(".json"):
            return json.loads(content)
        return pa.ipc.open_file(pa.BufferReader(content)).read_all()
    except (ValueError, pa.ArrowException) as error:
        _log.warning("%s is damaged and left out (%s)", where, error)
        return None


def _integer(value: float | None) -> int | None:
    return None if value is None else int(value)
