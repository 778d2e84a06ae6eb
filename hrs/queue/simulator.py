"""What a queue will do: the same claims and the same admission on a clock that jumps from event to event.

`simulate` answers when each stage starts and ends, and on which GPU, before anything is started; policies are tested
with it in milliseconds.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import URL

from hrs.queue.admission import Decision, Host, Placement, Tenant, admit
from hrs.queue.database import Database
from hrs.queue.queue import Queue
from hrs.queue.records import Claim, StageSpec, StudySpec
from hrs.queue.states import Outcome

Admission = Callable[[Sequence[StageSpec], Sequence[Host], Sequence[Tenant], float], Decision]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One attempt of the simulated timeline; times in minutes from its start."""

    key: str
    host: str
    gpu: str
    start_minutes: float
    end_minutes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """What happened."""

    entries: tuple[Entry, ...]
    impossible: tuple[str, ...]
    """Keys of stages that fit nowhere."""

    @property
    def makespan_minutes(self) -> float:
        return max((entry.end_minutes for entry in self.entries), default=0.0)


@dataclass(kw_only=True, slots=True)
class _Running:
    claim: Claim
    placement: Placement
    start: float
    left: float
    busy: float
    tenants: list[Tenant] = field(default_factory=list)


def simulate(
    studies: Sequence[StudySpec],
    hosts: Sequence[Host],
    *,
    minutes: Mapping[str, float] | None = None,
    busy: Mapping[str, float] | None = None,
    admission: Admission = admit,
    arrivals: Sequence[float] | None = None,
) -> Timeline:
    """Return the timeline of studies on hosts.

    Args:
        minutes: what each stage takes with a GPU to itself, by key; by default what it predicts.
        busy: share of that time in which a GPU computes for it, by key; by default what it predicts. Stages that share
            a GPU slow each other down when their shares exceed it together.
        admission: the policy.
        arrivals: when each study is submitted, in minutes; by default all at once.

    Raises:
        ValueError: if no time of a stage is known.
    """
    clock = [0.0]
    queue = Queue(Database(URL.create("sqlite")), lambda: 60 * clock[0])
    worker = queue.add_worker("simulator", 0)
    arriving = list(zip(arrivals or [0.0] * len(studies), range(len(studies)), strict=True))
    heapq.heapify(arriving)
    running: list[_Running] = []
    entries: list[Entry] = []
    impossible: list[str] = []
    try:
        while True:
            while arriving and arriving[0][0] <= clock[0]:
                queue.submit(studies[heapq.heappop(arriving)[1]])
            _start(queue, worker, hosts, running, clock[0], admission, impossible, minutes or {}, busy or {})
            if not running and not arriving:
                return Timeline(entries=tuple(entries), impossible=tuple(impossible))
            _advance(queue, clock, running, arriving[0][0] if arriving else None, entries)
    finally:
        queue.database.close()


def _start(
    queue: Queue, worker: str, hosts: Sequence[Host], running: list[_Running], now: float, admission: Admission,
    impossible: list[str], minutes: Mapping[str, float], busy: Mapping[str, float],
) -> None:  # fmt: skip
    tenants = [tenant for one in running for tenant in one.tenants]
    decision = admission(queue.candidates(limit=10**6), hosts, tenants, now)
    for stage in decision.impossible:
        queue.give_up(queue.claim(stage.key, worker), Outcome.TOO_LARGE, "fits nowhere")
        impossible.append(stage.key)
    for placement in decision.placements:
        stage = placement.stage
        duration = minutes.get(stage.key, stage.resources.minutes)
        if duration <= 0:
            raise ValueError(f"nobody knows how long stage {stage.key} takes")
        one = _Running(
            claim=queue.claim(stage.key, worker), placement=placement, start=now, left=duration,
            busy=busy.get(stage.key, stage.resources.busy_frac),
        )  # fmt: skip
        expected = stage.resources.minutes
        one.tenants = [
            Tenant(
                host=host, gpu=gpu, cpus=stage.resources.cpus, gpu_bytes=stage.resources.gpu_bytes,
                busy_frac=stage.resources.busy_frac,
                ends_minutes=now + expected if expected else float("inf"),
            )
            for host, gpu in placement.places
        ]  # fmt: skip
        running.append(one)


def _advance(
    queue: Queue, clock: list[float], running: list[_Running], next_arrival: float | None, entries: list[Entry]
) -> None:
    """Let time pass until the next stage ends or the next study comes."""
    load: dict[tuple[str, str], float] = {}
    for one in running:
        for place in one.placement.places:
            load[place] = load.get(place, 0.0) + one.busy
    rates = [min(min(1.0, 1.0 / load[p]) if p[1] else 1.0 for p in one.placement.places) for one in running]
    steps = [one.left / rate for one, rate in zip(running, rates, strict=True)]
    step = min(steps, default=float("inf"))
    if next_arrival is not None:
        step = min(step, next_arrival - clock[0])
    clock[0] += step
    for one, rate in zip(list(running), rates, strict=True):
        one.left -= step * rate
        if one.left <= 1e-9:
            running.remove(one)
            queue.finish(one.claim)
            for host, gpu in one.placement.places:
                entries.append(
                    Entry(key=one.claim.stage.key, host=host, gpu=gpu, start_minutes=one.start, end_minutes=clock[0])
                )
