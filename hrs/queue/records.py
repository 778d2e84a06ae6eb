"""What the queue takes and gives: studies, runs, stages, claims and attempts as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hrs.queue.states import Wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one attempt at a stage reserves."""

    cpus: float = 1.0
    gpu_bytes: int = 0
    """Device memory; 0 for work on the CPU."""
    busy_frac: float = 0.25
    """Share of its time in which the GPU computes for it, if it has one to itself; a guess if nothing is known."""
    workers: int = 1
    """Processes that it needs at the same time, each with these ``cpus`` and ``gpu_bytes``."""
    minutes: float = 0.0
    """Predicted time; 0 if nothing is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """A piece of work with a content key: equal keys are the same work, whoever submits them."""

    key: str
    kind: str
    """For example ``train``; what it is called in lists."""
    label: str
    function: str
    """``package.module:name`` of the function that does it."""
    payload: Mapping[str, Any] = field(default_factory=dict)
    """Its arguments, as JSON."""
    inputs: tuple[str, ...] = ()
    """Keys of the stages whose results it reads."""
    resources: Resources = Resources()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """One config with one seed, and the stages it needs."""

    key: str
    label: str
    definition: Mapping[str, Any]
    stages: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySpec:
    """A named comparison."""

    title: str
    definition: Mapping[str, Any]
    """All that selects its runs, as JSON: two studies of one title with other definitions are not the same."""
    runs: tuple[RunSpec, ...]
    stages: tuple[StageSpec, ...]
    """All stages of its runs and of the study itself, each key once."""
    own_stages: tuple[str, ...] = ()
    """Keys of the stages of the study itself, such as its report."""
    priority: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """What a submission found."""

    study_id: str
    new: int
    """Stages that nobody had submitted before."""
    shared: int
    """Stages that were known, but are not finished."""
    finished: int
    """Stages whose result is there already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The right to work on one stage until it is given back or taken away."""

    attempt: int
    token: int
    stage: StageSpec
    rung: int
    """How often the stage has run out of memory: the step of the ladder that this attempt is on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """An attempt that has not ended."""

    claim: Claim
    worker: str
    host: str
    pid: int
    device: str
    reserved: Resources
    claimed: float
    """Seconds since the epoch."""
    beats: int
    """Renewals so far."""
    progress: dict[str, Any] | None
    wanted: Wanted
