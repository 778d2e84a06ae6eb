"""Reading what was tracked, many runs at a time: from the SQLite file itself, or through the client of a server.

MLflow's own interface needs a query per run and per metric, and a second to be imported: a study of 300 runs took over
a minute to read. The tables are those of MLflow 3 (runs, tags, latest_metrics, metrics); nothing here writes.
"""

import math
import sqlite3
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hrs.tracking.patience import patiently

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "hrs"
_SYSTEM = "system/"
"""MLflow's prefix of machine measurements, which no report shows."""
_VALUES_PER_QUERY = 900
"""SQLite's limit was 999 for long."""

Curve = list[tuple[int, float]]
"""(step, value) in order of steps, one value per step: the last one noted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracked:
    """One tracked run or study, as MLflow has it."""

    run_id: str
    experiment_id: str
    name: str
    status: str
    """MLflow's: RUNNING, SCHEDULED, FINISHED, FAILED or KILLED."""
    start_milliseconds: int
    """Since the epoch."""
    artifact_uri: str
    tags: dict[str, str]
    metrics: dict[str, float]
    """Last values."""


class History(Protocol):
    """What was tracked."""

    def by_tag(self, tag: str, values: Sequence[str] | None = None) -> list[Tracked]:
        """Return the runs whose tag has one of the values, or that have the tag at all; the oldest first."""

    def running(self) -> list[Tracked]:
        """Return what is marked as running; the oldest first."""

    def curves(self, runs: Sequence[Tracked]) -> dict[str, dict[str, Curve]]:
        """Return the curves of runs by run id and metric."""

    def files(self, run: Tracked, names: Iterable[str]) -> dict[str, bytes]:
        """Return those of the named artifacts that a run has."""


class SqliteHistory:
    """The history in a SQLite file, which may lie on a read-only disk; empty if the file is not there."""

    def __init__(self, path: Path, artifacts: Path) -> None:
        """``artifacts`` is where runs keep theirs if the storage has moved since."""
        self._path, self._artifacts = path, artifacts

    def by_tag(self, tag: str, values: Sequence[str] | None = None) -> list[Tracked]:
        condition = "run_uuid IN (SELECT run_uuid FROM tags WHERE key = ?{})"
        if values is None:
            return self._tracked(condition.format(""), [tag])
        found: list[Tracked] = []
        for part in _parts(values):
            found += self._tracked(condition.format(f" AND value IN ({_marks(part)})"), [tag, *part])
        return sorted(found, key=lambda run: run.start_milliseconds)

    def running(self) -> list[Tracked]:
        return self._tracked("status = 'RUNNING'", [])

    def curves(self, runs: Sequence[Tracked]) -> dict[str, dict[str, Curve]]:
        points: dict[str, dict[str, dict[int, float]]] = {run.run_id: {} for run in runs}
        for part in _parts([run.run_id for run in runs]):
            query = (
                "SELECT run_uuid, key, step, value, is_nan FROM metrics "
                f"WHERE run_uuid IN ({_marks(part)}) AND key NOT LIKE '{_SYSTEM}%' ORDER BY step, timestamp"
            )
            for run_id, name, step, value, is_nan in self._rows(query, part):
                points[run_id].setdefault(name, {})[step] = math.nan if is_nan else value
        return {i: {name: list(c.items()) for name, c in sorted(of_run.items())} for i, of_run in points.items()}

    def files(self, run: Tracked, names: Iterable[str]) -> dict[str, bytes]:
        folder = self._folder(run)
        return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}

    def _folder(self, run: Tracked) -> Path:
        own = Path(urllib.request.url2pathname(urllib.parse.urlsplit(run.artifact_uri).path))
        served = self._artifacts / str(own).lstrip("/")  # a server of this folder calls it mlflow-artifacts:/...
        here = self._artifacts / run.run_id / "artifacts"  # first, since a copied storage may name the original's
        return next((path for path in (here, own, served) if path.is_dir()), here)

    def _tracked(self, condition: str, values: Sequence[str]) -> list[Tracked]:
        query = (
            "SELECT run_uuid, experiment_id, name, status, start_time, artifact_uri FROM runs "
            "WHERE lifecycle_stage = 'active' AND experiment_id IN "
            f"(SELECT experiment_id FROM experiments WHERE name = '{EXPERIMENT}') AND {condition} "
            "ORDER BY start_time, run_uuid"
        )
        found = self._rows(query, values)
        ids = [run_id for run_id, *_ in found]
        tags: dict[str, dict[str, str]] = {run_id: {} for run_id in ids}
        metrics: dict[str, dict[str, float]] = {run_id: {} for run_id in ids}
        for part in _parts(ids):
            among = f"run_uuid IN ({_marks(part)})"
            for run_id, key, value in self._rows(f"SELECT run_uuid, key, value FROM tags WHERE {among}", part):
                tags[run_id][key] = value
            last = (
                f"SELECT run_uuid, key, value, is_nan FROM latest_metrics WHERE {among} AND key NOT LIKE '{_SYSTEM}%'"
            )
            for run_id, key, value, is_nan in self._rows(last, part):
                metrics[run_id][key] = math.nan if is_nan else value
        return [
            Tracked(
                run_id=run_id,
                experiment_id=str(experiment_id),
                name=name,
                status=status,
                start_milliseconds=start,
                artifact_uri=uri,
                tags=tags[run_id],
                metrics=metrics[run_id],
            )
            for run_id, experiment_id, name, status, start, uri in found
        ]

    def _rows(self, query: str, values: Sequence[str]) -> list[tuple[Any, ...]]:
        if not self._path.exists() or self._path.stat().st_size == 0:
            return []

        def read() -> list[tuple[Any, ...]]:
            with closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)) as database:
                return database.execute(query, values).fetchall()

        return patiently(read, str(self._path))


class ClientHistory:
    """The history behind a client, such as that of an MLflow server."""

    def __init__(self, connect: Callable[[], tuple["MlflowClient", str]]) -> None:
        """``connect`` gives the client and the id of the experiment."""
        self._connect = connect

    def by_tag(self, tag: str, values: Sequence[str] | None = None) -> list[Tracked]:
        if values is None:
            return self._tracked(f"tags.`{tag}` LIKE '%'")
        return [run for value in dict.fromkeys(values) for run in self._tracked(f"tags.`{tag}` = '{value}'")]

    def running(self) -> list[Tracked]:
        return self._tracked("attributes.status = 'RUNNING'")

    def curves(self, runs: Sequence[Tracked]) -> dict[str, dict[str, Curve]]:
        return {run.run_id: {name: self._curve(run.run_id, name) for name in sorted(run.metrics)} for run in runs}

    def files(self, run: Tracked, names: Iterable[str]) -> dict[str, bytes]:
        client, _ = self._connect()
        there = {file.path for file in client.list_artifacts(run.run_id)}
        with tempfile.TemporaryDirectory() as folder:
            found = {name: client.download_artifacts(run.run_id, name, folder) for name in names if name in there}
            return {name: Path(path).read_bytes() for name, path in found.items()}

    def _curve(self, run_id: str, name: str) -> Curve:
        client, _ = self._connect()
        points = sorted(client.get_metric_history(run_id, name), key=lambda point: (point.step, point.timestamp))
        return list({point.step: point.value for point in points}.items())

    def _tracked(self, condition: str) -> list[Tracked]:
        client, experiment_id = self._connect()
        found: list[Run] = []
        token = None
        while True:
            page = client.search_runs(
                [experiment_id], condition, order_by=["attributes.start_time ASC"], page_token=token
            )
            found += page
            if not (token := page.token):
                return [_as_tracked(run) for run in found]


def _as_tracked(run: "Run") -> Tracked:
    return Tracked(
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        name=run.info.run_name,
        status=run.info.status,
        start_milliseconds=run.info.start_time,
        artifact_uri=run.info.artifact_uri,
        tags=dict(run.data.tags),
        metrics={name: value for name, value in run.data.metrics.items() if not name.startswith(_SYSTEM)},
    )


def _parts(values: Sequence[str]) -> Iterator[Sequence[str]]:
    return (values[i : i + _VALUES_PER_QUERY] for i in range(0, len(values), _VALUES_PER_QUERY))


def _marks(values: Sequence[str]) -> str:
    return ", ".join("?" * len(values))
