"""From a tracked run to the record a report needs."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, get_args

from hrs.tracking.history import Curve, History, Tracked
from hrs.tracking.logger import Outcome

if TYPE_CHECKING:  # a worker that only logs must not import the report, which brings its plots
    import pyarrow as pa

    from hrs.report.records import RunRecord, Status

_FILES = ("config.json", "training.json", "evaluation.json", "audit.json", "documents.arrow")


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


def read_record(history: History, run: Tracked, curves: Mapping[str, Curve]) -> "RunRecord":
    """The record of a run from its tags, metrics and artifacts; what the run does not have stays empty."""
    from hrs.report.records import RunRecord

    tags, metrics = run.tags, run.metrics
    files = history.files(run, _FILES)
    contents = {name: json.loads(content) for name, content in files.items() if name.endswith(".json")}
    documents = _read_documents(files["documents.arrow"]) if "documents.arrow" in files else None
    audit, evaluation = contents.get("audit.json"), contents.get("evaluation.json", {})
    summary = metrics | contents.get("training.json", {})
    return RunRecord(
        key=tags["hrs.run_key"],
        preset=tags["preset"],
        scale=tags["scale"],
        seed=int(tags["seed"]),
        status=status_of(run),
        reason=tags.get("hrs.reason", ""),
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
        config=contents.get("config.json", {}),
        tier_share=evaluation.get("tier_share") or None,
    )


def _read_documents(content: bytes) -> "pa.Table":
    import pyarrow as pa

    return pa.ipc.open_file(pa.BufferReader(content)).read_all()


def _integer(value: float | None) -> int | None:
    return None if value is None else int(value)
