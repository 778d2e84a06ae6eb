"""Studies and runs: found again by name and key, continued, closed when their process died, read back as records."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrs.config import ExperimentConfig, to_dict
from hrs.config.effective import fields_in_effect
from hrs.errors import HRSError, is_full, reason_of
from hrs.identity import code_version
from hrs.storage import Storage
from hrs.tracking.crash import why_it_ended
from hrs.tracking.history import Tracked
from hrs.tracking.logger import Outcome, RunLogger, close_run, storable
from hrs.tracking.names import require_study_name
from hrs.tracking.owner import is_alive, this_process
from hrs.tracking.reading import has_results, missing_record, read_record, status_of
from hrs.tracking.store import connect, open_history, store_lock
from hrs.tracking.study_list import (
    COMMANDS_TAG,
    commands_of,
    commands_tag,
    entry_of_config,
    entry_of_tags,
    keys_of_version,
)
from hrs.tracking.study_page import NOTE_TAG, best_trial, note_of_report, page_of, prepare_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from hrs.report.records import RunRecord, Status

_log = logging.getLogger(__name__)

_PARAM_VALUE_CHARACTERS = 6000  # MLflow's limits
_PARAMS_PER_REQUEST = 100
_RUNS_FILE = "study.json"


class RunBusy(HRSError):
    """Another living process is writing this run."""


class Tracker:
    """The tracking store of one storage root. What only reads makes no store, writes nothing and needs no MLflow.

    Raises:
        HRSError: if the store cannot be used or reached.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._history = open_history(storage)

    def connect(self) -> None:
        """Make the store if there is none yet.

        Raises:
            HRSError: if it cannot be made or written.
        """
        assert self._connection

    def experiment_page(self, port: int) -> str:
        """Return the address of the table of all runs where ``hrs ui`` shows it on a port."""
        return f"http://127.0.0.1:{port}/#/experiments/{self._connection[1]}/runs?workflowType=machine_learning"

    @functools.cached_property
    def _connection(self) -> tuple["MlflowClient", str]:
        client, experiment_id = connect(self._storage)
        prepare_experiment(client, experiment_id)
        return client, experiment_id

    @property
    def _client(self) -> "MlflowClient":
        return self._connection[0]

    # ---- studies -----------------------------------------------------------------------------------------------------

    def open_study(
        self,
        name: str,
        runs: Mapping[str, ExperimentConfig],
        *,
        samples: Mapping[str, Mapping[str, Any]] | None = None,
        command: str = "",
    ) -> str:
        """Start or continue a study and return its tracking id.

        ``runs`` (run key to config, in the order of the report) are added to the study's list, which loses nothing but
        entries that name the same run of this code: after the corpus has changed, a run has another key. Runs that
        another study already made belong to the list like any other.

        Args:
            samples: what a search drew for the runs, by key.
            command: what a reader types to make these runs again; kept with the study, once.
        """
        require_study_name(name)
        drawn = samples or {}
        made = {key: entry_of_config(config, drawn.get(key, {}), code_version()) for key, config in runs.items()}
        self.connect()  # before the lock, which making a store takes too
        with store_lock(self._storage):
            study, planned, commands = self._study(name), {}, []
            if study is None:
                tags = {"hrs.kind": "study", "hrs.study": name}
                study_id = self._client.create_run(self._connection[1], tags=tags, run_name=name).info.run_id
            else:
                study_id, planned, commands = study.run_id, self._planned(study), commands_of(study)
            planned = {key: entry for key, entry in planned.items() if key in made or entry not in made.values()}
            tags = {"hrs.code_version": code_version()}
            if command and command not in commands:
                tags[COMMANDS_TAG] = commands_tag([*commands, command])
            self._claim(study_id, tags)
            self._client.log_dict(study_id, planned | made, _RUNS_FILE)
        _opened_here[study_id] = self
        return study_id

    def close_study(self, study_id: str, outcome: Outcome, reason: str = "") -> None:
        """Close the study's own run and note its best score; its trials are closed by their loggers."""
        _opened_here.pop(study_id, None)
        close_run(self._client, study_id, outcome, reason)
        name = self._client.get_run(study_id).data.tags["hrs.study"]
        best = best_trial(self._find_all(self.study_keys(name)).values())
        if best is not None:
            self._client.log_metric(study_id, "best_bits_per_byte", best.metrics["bits_per_byte"])
            self._client.set_tag(study_id, "best_run", f"{best.name} ({best.tags['hrs.run_key']})")

    def log_study_artifact(self, study_id: str, path: Path) -> None:
        """Store a copy of a file or directory with the study. A directory with a report is linked from its note.

        Raises:
            HRSError: if the store does not take it.
        """
        try:
            if path.is_dir():
                self._client.log_artifacts(study_id, str(path), path.name)
                if (path / "report.html").is_file():
                    self._client.set_tag(study_id, NOTE_TAG, note_of_report(self._connection[1], study_id, path))
            else:
                self._client.log_artifact(study_id, str(path))
        except Exception as error:  # each artifact store raises its own
            cause = "the disk is full" if is_full(error) else " ".join(str(error).split())[:200]
            raise HRSError(
                f"{path} could not be copied to the tracking store ({cause}): it is whole where it is"
            ) from error

    def studies(self) -> list[str]:
        """Names of all studies, the oldest first."""
        return [run.tags["hrs.study"] for run in self._history.by_tag("hrs.kind", ["study"])]

    def pages(self, study: str, keys: Iterable[str]) -> tuple[str, dict[str, str]]:
        """Return the addresses of MLflow's pages of a study and, by key, of those runs that there are.

        Raises:
            HRSError: if there is no such study.
        """
        uri = self._storage.tracking_uri
        found = self._find_all(list(keys))
        return page_of(self._require_study(study), uri), {key: page_of(run, uri) for key, run in found.items()}

    def study_keys(self, name: str) -> list[str]:
        """Return the keys of the runs that :meth:`study_records` gives.

        Raises:
            HRSError: if there is no such study.
        """
        return keys_of_version(name, *self._versions(name), None)

    def study_commands(self, name: str) -> list[str]:
        """Return the commands that made the runs of a study, the oldest first.

        Raises:
            HRSError: if there is no such study.
        """
        return commands_of(self._require_study(name))

    def study_versions(self, name: str) -> list[str]:
        """Return the code versions whose runs a study lists; the last one is what :meth:`study_records` gives.

        Raises:
            HRSError: if there is no such study.
        """
        return self._versions(name)[1]

    def study_records(
        self,
        name: str,
        with_history: bool = True,
        *,
        keys: Sequence[str] | None = None,
        code_version: str | None = None,
    ) -> "list[RunRecord]":
        """Return the records of a study's runs; one that never ran is ``missing`` but knows preset, scale and seed.

        Runs of different code never stand in one list: without ``keys`` or ``code_version`` it is that of the code
        which ran the study last.

        Args:
            keys: only these runs, in this order, such as those that one of several sweeps asked for.
            code_version: only the runs of that code.

        Raises:
            HRSError: if there is no such study, or it has no runs of that code.
        """
        planned, versions = self._versions(name)
        keys = keys_of_version(name, planned, versions, code_version) if keys is None else keys
        records = []
        for record in self.records(keys, with_history):
            entry = planned[record.key]
            known = entry if record.status == "missing" else {"sample": entry.get("sample", {})}
            records.append(dataclasses.replace(record, **known))
        return records

    # ---- runs --------------------------------------------------------------------------------------------------------

    def log_run_artifacts(self, key: str, paths: Iterable[Path], folder: str) -> None:
        """Store copies of files in a folder of a run's artifacts, whether it is finished or not.

        Raises:
            HRSError: if there is no such run.
        """
        run_id = self.run_id(key)
        for path in paths:
            self._client.log_artifact(run_id, str(path), folder)

    def log_run_metrics(self, key: str, values: Mapping[str, float]) -> None:
        """Add metrics to a run, whether it is finished or not, such as what it scores on another split.

        Raises:
            HRSError: if there is no such run.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id(key), metrics=[Metric(n, storable(v), now, 0) for n, v in values.items()])

    def run_id(self, key: str) -> str:
        """MLflow's id of the run of ``key``, whichever study made it.

        Raises:
            HRSError: if there is no such run.
        """
        run = self._find(key)
        if run is None:
            raise HRSError(f"there is no run {key}: train it first")
        return run.run_id

    def open_run(
        self, key: str, study_id: str, config: ExperimentConfig, data_fingerprint: str, *, system_metrics: bool = False
    ) -> RunLogger:
        """Start the run of ``key`` as a child of a study, or continue it where its curves end.

        Args:
            system_metrics: sample processor, memory, disk, network and (with nvidia-ml-py) cards every ten seconds.

        Raises:
            RunBusy: if another living process is writing this run.
        """
        self.connect()
        with store_lock(self._storage):
            found = self._find(key)
            if found is None:
                study = self._client.get_run(study_id).data.tags["hrs.study"]
                run = self._create_run(key, study_id, study, config, data_fingerprint)
            elif status_of(found) == "running" and _has_living_owner(found, other_than_this=True):
                raise RunBusy(f"run {key} is being written by process {found.tags['hrs.owner']}: wait until it ends")
            else:
                run = self._client.get_run(found.run_id)
            self._claim(run.info.run_id, {})
        self._log_params(run, config)
        monitor = self._start_monitor(run.info.run_id) if system_metrics else None
        # The latest point of every metric: its step is not among MLflow's public fields.
        last_steps = {metric.key: metric.step for metric in run.data._metric_objs}
        return RunLogger(self._client, run.info.run_id, self._storage.run(key), last_steps, monitor)

    def note_end(
        self,
        key: str,
        study_id: str,
        config: ExperimentConfig,
        data_fingerprint: str,
        outcome: Outcome,
        reason: str,
    ) -> None:
        """Record how a run ended that could not do so itself: it failed before it was tracked, or its process is gone.

        A run that has an outcome already keeps it.
        """
        status = status_of(self._find(key))
        if status not in ("missing", "running"):
            return
        with contextlib.suppress(RunBusy):  # somebody else has it by now
            self.open_run(key, study_id, config, data_fingerprint).finish(outcome, reason)

    def tracked(self, keys: Sequence[str] | None = None) -> list[Tracked]:
        """Return the runs of these keys, or all that there are, as MLflow has them; the oldest first."""
        return self._history.by_tag("hrs.run_key", keys)

    def listed(self, study: str, *, newest_code: bool) -> set[str]:
        """Return the keys of the runs that a study lists, of all code or of the newest only.

        Raises:
            HRSError: if there is no such study, or its list is out of reach.
        """
        planned, versions = self._versions(study)
        return set(keys_of_version(study, planned, versions, None) if newest_code else planned)

    def last_value(self, key: str, metric: str) -> float:
        """Return the value of a metric at its last step; NaN if there is none, or no run of ``key``."""
        run = self._find(key)
        return run.metrics.get(metric, math.nan) if run is not None else math.nan

    def statuses(self, keys: Iterable[str]) -> "dict[str, Status]":
        """How each run stands, whichever study made it; ``missing`` if none did."""
        keys = list(keys)
        found = self._find_all(keys)
        return {key: status_of(found.get(key)) for key in keys}

    def finished(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys whose run is finished, whichever study made it, and whose results can be read."""
        return {
            key
            for key, run in self._find_all(list(keys)).items()
            if status_of(run) == "finished" and has_results(self._history, run, self._storage.run(key))
        }

    def lost(self) -> list[str]:
        """Keys of the runs that are marked as finished and whose results cannot be read any more."""
        keys = [run.tags["hrs.run_key"] for run in self._history.by_tag("hrs.run_key")]
        marked = {key for key, status in self.statuses(keys).items() if status == "finished"}
        return sorted(marked - self.finished(keys))

    def records(self, keys: Iterable[str], with_history: bool = True) -> "list[RunRecord]":
        """One record per key, in order; ``with_history=False`` leaves out the curves."""
        keys = list(keys)
        found = self._find_all(keys)
        curves = self._history.curves(list(found.values())) if with_history else {}
        return [
            read_record(self._history, found[key], self._storage.run(key), curves.get(found[key].run_id, {}))
            if key in found
            else missing_record(key)
            for key in keys
        ]

    def reap(self, study: str | None = None) -> list[str]:
        """Close, as killed, what dead processes left running, in one study or everywhere; returns the runs' names."""
        closed = []
        self.connect()
        with store_lock(self._storage):
            for run in self._history.running():
                if study not in (None, run.tags.get("hrs.study")) or _has_living_owner(run):
                    continue
                if self._client.get_run(run.run_id).info.status != "RUNNING":
                    continue  # it has finished since the search
                directory = self._storage.run(run.tags.get("hrs.run_key", ""))
                reason = why_it_ended(directory, run.tags.get("hrs.owner", "unknown"))
                close_run(self._client, run.run_id, "killed", reason)
                closed.append(run.name)
        return closed

    # ---- the store ---------------------------------------------------------------------------------------------------

    def _find(self, key: str) -> Tracked | None:
        return self._find_all([key]).get(key)

    def _find_all(self, keys: Sequence[str]) -> dict[str, Tracked]:
        """Return the runs of those keys that have one; of several the oldest."""
        found: dict[str, Tracked] = {}
        for run in self._history.by_tag("hrs.run_key", keys):
            found.setdefault(run.tags["hrs.run_key"], run)
        return found

    def _study(self, name: str) -> Tracked | None:
        runs = self._history.by_tag("hrs.kind", ["study"])
        return next((run for run in runs if run.tags.get("hrs.study") == name), None)

    def _require_study(self, name: str) -> Tracked:
        study = self._study(name)
        if study is None:
            raise HRSError(f"there is no study '{name}'; there are {', '.join(self.studies()) or 'none yet'}")
        return study

    def _versions(self, name: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Return a study's list, and the code versions in it with the one that ran last at the end."""
        study = self._require_study(name)
        planned = self._planned(study)
        versions = dict.fromkeys(entry.get("code_version", "") for entry in planned.values())
        if (newest := study.tags.get("hrs.code_version", "")) in versions:
            versions[newest] = versions.pop(newest)
        return planned, list(versions)

    def _planned(self, study: Tracked) -> dict[str, dict[str, Any]]:
        """A study's list; where it is missing or damaged, that of the runs which were made for the study."""
        try:
            return dict(json.loads(self._history.files(study, [_RUNS_FILE])[_RUNS_FILE]))
        except (LookupError, ValueError):
            name = study.tags["hrs.study"]
            _log.warning(
                "the list of study '%s' is not at %s, or damaged: it has the runs that it made itself",
                name,
                study.artifact_uri,
            )
            made = self._history.by_tag("hrs.study", [name])
            return {r.tags["hrs.run_key"]: entry_of_tags(r.tags) for r in made if r.tags.get("hrs.kind") == "trial"}

    def _create_run(
        self, key: str, study_id: str, study: str, config: ExperimentConfig, data_fingerprint: str
    ) -> "Run":
        tags = {
            "mlflow.parentRunId": study_id,
            "hrs.kind": "trial",
            "hrs.run_key": key,
            "hrs.study": study,
            "hrs.code_version": code_version(),
            "hrs.data_fingerprint": data_fingerprint,
            "preset": config.preset,
            "scale": config.scale,
            "seed": str(config.seed),
        } | _git_commit()
        name = f"{config.preset} {config.scale} seed {config.seed}"
        run = self._client.create_run(self._connection[1], tags=tags, run_name=name)
        self._client.log_dict(run.info.run_id, to_dict(config), "config.json")
        return run

    def _claim(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Make this process the owner of a run that is running from now on."""
        from mlflow.entities import RunTag

        tags = {"hrs.owner": this_process(), "hrs.outcome": "running", "hrs.reason": ""} | dict(tags)
        self._client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()])
        self._client.update_run(run_id, status="RUNNING")

    def _log_params(self, run: "Run", config: ExperimentConfig) -> None:
        """Log the fields that decide something and that the run does not have yet: MLflow takes each one once."""
        from mlflow.entities import Param

        params = [
            Param(name, str(value)[:_PARAM_VALUE_CHARACTERS])
            for name, value in fields_in_effect(config).items()
            if name not in run.data.params
        ]
        for start in range(0, len(params), _PARAMS_PER_REQUEST):
            self._client.log_batch(run.info.run_id, params=params[start : start + _PARAMS_PER_REQUEST])

    def _start_monitor(self, run_id: str) -> Any:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self._storage.tracking_uri)
        monitor.start()
        return monitor


_opened_here: dict[str, Tracker] = {}
"""Studies that this process opened and has not closed."""


def close_open_studies(error: BaseException) -> None:
    """Close what this process opened and left open, with the error that ended it: nobody else would, for days."""
    outcome: Outcome = "failed" if isinstance(error, Exception) else "killed"
    for study_id, tracker in list(_opened_here.items()):
        try:
            tracker.close_study(study_id, outcome, reason_of(error))
        except Exception as unrecorded:  # must not hide what ended the command
            _log.warning("study %s stays open in the tracking store (%s)", study_id, reason_of(unrecorded))


def _has_living_owner(run: Tracked, other_than_this: bool = False) -> bool:
    owner = run.tags.get("hrs.owner")
    if owner is None or (other_than_this and owner == this_process()):
        return False
    beat = run.tags.get("hrs.heartbeat")
    return is_alive(owner, float(beat) if beat else None)


@functools.cache
def _git_commit() -> dict[str, str]:
    """MLflow's tag for the commit of this checkout; empty outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return {}
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit.stdout.strip()}
