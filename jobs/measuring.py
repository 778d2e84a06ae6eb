"""What jobs that measure models share: finding a model, a worker for each, whole results, runs in MLflow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrs.cluster.hardware import offers_gpus
from hrs.cluster.preflight import connect
from hrs.cluster.workers import reserved_runtime
from hrs.config import ExperimentConfig
from hrs.data import TokenStore
from hrs.export import OpenedModel, open_model, open_text
from hrs.retrieval.engrams import model_fingerprint
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.tracking.naming import find_model as named_model


def find_model(storage: Storage, source: str) -> Path | None:
    """Where the model lies that is named, see :mod:`hrs.tracking.naming`; None for the name of a study.

    Raises:
        HRSError: if nothing has that name, or several do.
    """
    if not Path(source).exists() and source in Tracker(storage).studies():
        return None
    return named_model(storage, source).resolve()


def require_model(storage: Storage, source: str) -> Path:
    """Where the model lies that is named; for the name of a study its best causal run.

    Raises:
        HRSError: if nothing has that name, or several do.
    """
    return named_model(storage, source).resolve()


# ---- in a worker -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Subject:
    """A model that is measured, on this worker's device, and the corpus it was trained on."""

    opened: OpenedModel
    tokens: TokenStore
    fingerprint: str
    """See :func:`hrs.retrieval.engrams.model_fingerprint`."""


def open_subject(path: Path, storage: Storage) -> Subject:
    """A model with the text that it was trained on.

    Raises:
        HRSError: if it cannot be opened, or its text is lost.
    """
    opened = open_model(path, storage.tokens)
    opened.model.to(reserved_runtime().torch_device())
    tokens = open_text(opened, storage.tokens)
    return Subject(opened=opened, tokens=tokens, fingerprint=model_fingerprint(opened.model))


# ---- in the job ------------------------------------------------------------------------------------------------------


def tell(function: Callable[..., Iterator[Any]], tasks: Sequence[tuple[Any, ...]], storage: Storage) -> Iterator[Any]:
    """What ``function(*task)`` yields in a worker for each task, one core each and a GPU if there is one, as it comes.

    A worker that fails stops no other: its error is raised when all have ended, the first of several.
    """
    gpus = float(offers_gpus(connect(storage)))
    import ray

    worker = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(function)
    streams: list[Any] = [worker.remote(*task) for task in tasks]
    errors: list[BaseException] = []
    while streams:
        (stream,), _ = ray.wait(streams, num_returns=1)
        try:
            told = ray.get(next(stream))
        except StopIteration:
            streams.remove(stream)
        except ray.exceptions.RayError as error:
            streams.remove(stream)
            errors.append(getattr(error, "cause", None) or error)
        else:
            yield told
    if errors:
        raise errors[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One result as MLflow keeps it: a run of its own in a study of its own."""

    key: str
    study: str
    name: str
    """Of the run."""
    kind: str
    config: ExperimentConfig
    """Of the model."""
    data_fingerprint: str
    causal: bool | None
    metrics: Mapping[str, float]
    files: Sequence[Path]


def track(measurement: Measurement, tracker: Tracker) -> None:
    """Log numbers and files, once."""
    key = measurement.key
    if key in tracker.finished([key]):
        return
    study_id = tracker.open_study(measurement.study, {})
    with tracker.open_run(key, study_id, measurement.config, measurement.data_fingerprint) as run:
        causal = str(measurement.causal).lower()
        run.set_tags({"mlflow.runName": measurement.name, "hrs.kind": measurement.kind, "causal": causal})
        run.log(0, measurement.metrics)
        for file in measurement.files:
            run.log_artifact(file)
    tracker.close_study(study_id, "finished")
