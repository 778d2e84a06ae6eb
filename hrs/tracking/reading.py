"""From a tracked run to the record a report needs."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hrs.tracking.logger import Outcome

if TYPE_CHECKING:  # a worker that only logs must not import the report, which brings its plots
    import pyarrow as pa
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from hrs.report.records import RunRecord, Status

_SYSTEM = "system/"  # MLflow's prefix of machine measurements, which no report shows


def status_of(run: "Run | None") -> "Status":
    """The outcome that was written down, else what MLflow says; ``missing`` without a run."""
    if run is None:
        return "missing"
    if run.info.status in ("RUNNING", "SCHEDULED"):
        return "running"
    outcome = run.data.tags.get("hrs.outcome")
    by_name: dict[str | None, Status] = {name: name for name in get_args(Outcome)}
    by_status: dict[str, Status] = {"FINISHED": "finished", "FAILED": "failed"}
    return by_name.get(outcome) or by_status.get(run.info.status, "killed")


def missing_record(key: str) -> "RunRecord":
    """The record of a run that never was."""
    from hrs.report.records import RunRecord

    return RunRecord(key=key, preset="", scale="", seed=0, status="missing")


def read_record(client: "MlflowClient", run: "Run", with_history: bool) -> "RunRecord":
    """The record of a run from its tags, metrics and artifacts; what the run does not have stays empty."""
    from hrs.report.records import RunRecord

    tags = run.data.tags
    metrics = {name: value for name, value in run.data.metrics.items() if not name.startswith(_SYSTEM)}
    with tempfile.TemporaryDirectory() as folder:
        wanted = {"config.json", "training.json", "evaluation.json", "audit.json", "documents.arrow"}
        there = {file.path for file in client.list_artifacts(run.info.run_id)} & wanted
        files = {name: Path(client.download_artifacts(run.info.run_id, name, folder)) for name in there}
        contents = {name: _read_json(path) for name, path in files.items() if path.suffix == ".json"}
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
        metrics=metrics,
        documents=documents,
        loss_by_position=evaluation.get("loss_by_position"),
        history={name: _curve(client, run.info.run_id, name) for name in sorted(metrics)} if with_history else {},
        config=contents.get("config.json", {}),
        tier_share=evaluation.get("tier_share") or None,
    )


def _curve(client: "MlflowClient", run_id: str, name: str) -> list[tuple[int, float]]:
    """One point per step: the last one noted."""
    points = sorted(client.get_metric_history(run_id, name), key=lambda point: (point.step, point.timestamp))
    return list({point.step: point.value for point in points}.items())


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_documents(path: Path) -> "pa.Table":
    import pyarrow as pa

    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _integer(value: float | None) -> int | None:
    return None if value is None else int(value)
