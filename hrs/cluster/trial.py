"""One trial from tokens to a tracked, evaluated and audited result, as a generator that can be driven anywhere.

Everything a trial learns is on disk below ``Storage.run(key)`` before it is reported, so a trial that is killed at any
moment continues where its last checkpoint was, in the same tracked run.
"""

import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from hrs import strict_json
from hrs.cluster.manifold import geometry_of
from hrs.cluster.progress import TrialProgress
from hrs.cluster.study import Run
from hrs.cluster.timing import DEVICE_FILE
from hrs.config import ExperimentConfig, canonical_json, from_dict
from hrs.data import TokenStore, open_tokens
from hrs.data.duplicates import Duplicates
from hrs.errors import reason_of
from hrs.evaluation import AuditReport, Evaluation, audit, evaluate
from hrs.files import read_json, write_whole
from hrs.gpu import explained, gpu_of, move
from hrs.models import LanguageModel
from hrs.models.geometry import TokenGeometry
from hrs.report.plots import plot_loss_by_position
from hrs.storage import Storage, open_storage
from hrs.tracking import SILENT_SECONDS, Outcome, RunBusy, RunLogger, Tracker
from hrs.tracking.crash import recording_crashes
from hrs.training import Progress, Runtime, latest_checkpoint, load_model, train
from hrs.training.memory import cap_process_memory

LOOK_AGAIN_SECONDS = 2.0
"""Between two attempts to get a run that another process has."""
_OF_TRAINING = ("routing_entropy", "expert_coverage", "expert_unevenness", "dead_experts")
"""Diagnostics that are taken in training and in evaluation."""
_STOPPED_FILE = "stopped"
"""In a run's directory: why a scheduler ended it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """All a worker needs to run one trial; travels as JSON."""

    run: Run
    study_id: str
    """Tracking id of the study this trial belongs to."""
    storage_root: str
    runtime: Runtime
    card_frac: float = 0.0
    """Share of one GPU that was reserved and that this process is kept to; 0 if none was, see
    :meth:`hrs.training.Runtime.reserving`."""
    tenants: int = 1
    """Trials that were planned for that GPU at once."""

    def to_json(self) -> str:
        return canonical_json(self)

    @classmethod
    def from_json(cls, text: str) -> "TrialSpec":
        values = json.loads(text)
        values["run"]["config"] = from_dict(ExperimentConfig, values["run"]["config"])
        values["run"] = Run(**values["run"])
        values["runtime"] = Runtime(**values["runtime"])
        return cls(**values)


Trainer = Callable[[ExperimentConfig, TokenStore, Path, Runtime, TokenGeometry | None], Iterator[Progress]]
"""What trains a run in its directory: :func:`hrs.training.train`, or another with its arguments and promises."""


def run_trial(spec: TrialSpec, trainer: Trainer = train) -> Iterator[TrialProgress]:
    """Train, evaluate and audit one run, tracking everything; yields as it goes, ends after ``done``.

    Closing the generator early ends the tracked run as ``stopped`` if a scheduler decided so (:func:`mark_stopped`),
    else as ``killed``. Whatever exception ends it is recorded as the run's failure and raised.
    """
    storage = open_storage(spec.storage_root)
    run, steps = spec.run, spec.run.config.training.steps
    directory = storage.run(run.key)
    directory.mkdir(parents=True, exist_ok=True)
    waiting = TrialProgress(stage="waiting", step=0, steps=steps, reason="another process works on this run")
    lock = FileLock(directory / "lock")
    yield from _acquire(lock, waiting)  # a second sweep over the same run waits, then finds it done
    try:
        write_whole(directory / "config.json", canonical_json(run.config))
        (directory / _STOPPED_FILE).unlink(missing_ok=True)
        tracker = Tracker(storage)
        if not tracker.finished([run.key]):
            logger = yield from _open_run(tracker, spec, waiting)
            yield from _until_finished(spec, trainer, logger, storage)
        loss = tracker.last_value(run.key, "validation_loss")
    finally:
        lock.release()
    yield TrialProgress(stage="done", step=steps, steps=steps, validation_loss=loss)


def mark_stopped(storage: Storage, key: str, step: int) -> None:
    """Note that a scheduler ends a run early, before the run is closed: a cancel closes it in the same way."""
    write_whole(storage.run(key) / _STOPPED_FILE, f"a scheduler ended it at step {step}")


def _acquire(lock: FileLock, waiting: TrialProgress) -> Generator[TrialProgress, None, None]:
    """Take a lock; yields ``waiting`` while another process holds it."""
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout:
            yield waiting
            time.sleep(LOOK_AGAIN_SECONDS)


def _open_run(tracker: Tracker, spec: TrialSpec, waiting: TrialProgress) -> Generator[TrialProgress, None, RunLogger]:
    """Open the tracked run, waiting for a writer on another machine that died to be known as dead."""
    run, patience_ends = spec.run, time.monotonic() + 2 * SILENT_SECONDS
    while True:
        try:
            return tracker.open_run(run.key, spec.study_id, run.config, run.data_fingerprint, system_metrics=True)
        except RunBusy:
            if time.monotonic() > patience_ends:
                raise
            yield waiting
            time.sleep(LOOK_AGAIN_SECONDS)


def _until_finished(spec: TrialSpec, trainer: Trainer, logger: RunLogger, storage: Storage) -> Iterator[TrialProgress]:
    try:
        with recording_crashes(storage.run(spec.run.key)):
            yield from _steps(spec, trainer, storage, logger)
    except GeneratorExit:
        stopped = storage.run(spec.run.key) / _STOPPED_FILE
        if stopped.exists():
            logger.finish("stopped", stopped.read_text(encoding="utf-8"))
        else:
            logger.finish("killed", "closed before its last step")
        raise
    except BaseException as error:
        outcome: Outcome = "failed" if isinstance(error, Exception) else "killed"
        logger.finish(outcome, reason_of(error))
        raise
    logger.finish("finished")


def _steps(spec: TrialSpec, trainer: Trainer, storage: Storage, logger: RunLogger) -> Iterator[TrialProgress]:
    config, directory = spec.run.config, storage.run(spec.run.key)
    steps = config.training.steps
    if spec.card_frac:
        device = spec.runtime.torch_device()  # opens the GPU: a cap, as everything, is valid only after that
        gpu = gpu_of(device)
        if gpu is not None:
            gpu.release_cached_memory()  # of the trial this process ran before
        cap_process_memory(spec.card_frac, device)
    store = open_tokens(config.data, storage.tokens, spec.run.data_fingerprint)
    for p in trainer(config, store, directory, spec.runtime, geometry_of(config, store, storage)):
        logger.log(p.step, _worth_a_chart(p.metrics, config))
        yield TrialProgress(
            stage="train",
            step=p.step,
            steps=p.steps,
            loss=p.loss,
            validation_loss=p.metrics.get("validation_loss", math.nan),
            tokens_per_second=p.tokens_per_second,
            seconds_left=p.seconds_left,
        )
    model, _ = load_model(directory)
    device = spec.runtime.torch_device()  # not before: another process may be the one that trains
    if (directory / DEVICE_FILE).exists():
        facts = read_json(directory / DEVICE_FILE)
    else:
        used = gpu_of(device)
        facts = {"device": used.properties.kind if used is not None else "cpu", "tenants": spec.tenants}
        write_whole(directory / DEVICE_FILE, strict_json.dumps(facts))
    began = time.monotonic()
    yield TrialProgress(stage="evaluate", step=steps, steps=steps)
    evaluation = evaluate(move(model, device), store, stride_frac=config.evaluation.stride_frac)
    evaluation.save(directory)
    yield TrialProgress(stage="audit", step=steps, steps=steps)
    cpu = torch.device("cpu")  # where float64 is fast enough and sums have one order
    with explained(cpu, "the audit is too much", "give this process more memory"):
        verdict = audit(model.to(cpu))
    write_whole(directory / "audit.json", verdict.to_json())
    facts["evaluation_seconds"] = time.monotonic() - began
    write_whole(directory / DEVICE_FILE, strict_json.dumps(facts))
    _record(spec, directory, model, evaluation, verdict, store.duplicates, logger)


def _worth_a_chart(metrics: Mapping[str, float], config: ExperimentConfig) -> dict[str, float]:
    """Return the metrics without the counters that stand still: a chart each, of a straight line."""
    still = {"phase": not config.training.phases, "skipped_steps": not metrics.get("skipped_steps")}
    return {name: value for name, value in metrics.items() if not still.get(name)}


def _record(
    spec: TrialSpec,
    directory: Path,
    model: LanguageModel,
    evaluation: Evaluation,
    verdict: AuditReport,
    duplicates: Duplicates | None,
    logger: RunLogger,
) -> None:
    summary = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    # A name that training logs too would have two values at the last step.
    final = {f"evaluation/{n}" if n in _OF_TRAINING else n: value for n, value in evaluation.metrics().items()}
    final["peak_memory_bytes"] = summary["peak_memory_bytes"]
    logger.log(spec.run.config.training.steps, final | {"parameters": model.count_parameters()})
    tags = {"causal": str(verdict.causal).lower()}
    if duplicates is not None:
        logger.log(spec.run.config.training.steps, {"validation_overlap": duplicates.validation_overlap})
        tags["duplicates"] = duplicates.sentence() or "none"
    logger.set_tags(tags)
    for name in ("config.json", "tokenizer.json", "training.json", "evaluation.json", "documents.arrow", "audit.json"):
        logger.log_artifact(directory / name)
    checkpoint = latest_checkpoint(directory)
    if checkpoint:
        logger.log_artifact(checkpoint)
    plot_loss_by_position({spec.run.label: evaluation.loss_by_position.tolist()}, directory / "loss_by_position.png")
    logger.log_artifact(directory / "loss_by_position.png")
