"""Which GPUs each run goes to, what share of one it reserves, and when it starts and ends there.

The simulation follows Ray: a run starts when its cores and its share of one GPU are free, on the fullest GPU that has
room. Runs on one GPU compute in turns, so they slow each other down (:func:`hrs.cluster.timing.shared_rate`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hrs.cluster.timing import shared_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run, as far as its place in the queue depends on it."""

    key: str
    minutes: float
    """With a GPU or a core to itself."""
    cpus: float
    gpu_frac: float = 0.0
    """Reserved share of one GPU; 0 on the CPU."""
    busy_frac: float = 1.0
    """Share of ``minutes`` in which the GPU computes for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """When and beside what a job runs; times in minutes from the start of the queue."""

    start_minutes: float
    end_minutes: float
    slot: int
    """Number of the worker that runs it: jobs of one slot follow each other."""


@dataclass(kw_only=True, slots=True)
class _Running:
    job: Job
    start_minutes: float
    slot: int
    gpu: int
    left_minutes: float = field(default=0.0)


def simulate(jobs: Sequence[Job], n_gpus: int, cpus: float) -> dict[str, Place]:
    """Return the place of every job in a queue that is served in the given order by ``n_gpus`` GPUs and ``cpus`` cores.

    A job that asks for more than there is runs alone.
    """
    waiting, running = list(jobs), list[_Running]()
    places: dict[str, Place] = {}
    now = 0.0
    while waiting or running:
        while waiting and (gpu := _room(waiting[0], running, n_gpus, cpus)) is not None:
            job, taken = waiting.pop(0), {r.slot for r in running}
            slot = next(i for i in range(len(taken) + 1) if i not in taken)
            running.append(_Running(job=job, start_minutes=now, slot=slot, gpu=gpu, left_minutes=job.minutes))
        rates = [_rate(r, running) for r in running]
        step = min(r.left_minutes / rate for r, rate in zip(running, rates, strict=True))
        now += step
        for r, rate in zip(running, rates, strict=True):
            r.left_minutes -= step * rate
        for r in [r for r in running if r.left_minutes <= 1e-9 * r.job.minutes]:
            running.remove(r)
            places[r.job.key] = Place(start_minutes=r.start_minutes, end_minutes=now, slot=r.slot)
    return places


def _room(job: Job, running: Sequence[_Running], n_gpus: int, cpus: float) -> int | None:
    """Return the GPU that Ray would take, 0 for a job on the CPU, or None if the job has to wait."""
    if not running:
        return 0
    if sum(r.job.cpus for r in running) + job.cpus > cpus + 1e-9:
        return None
    if not job.gpu_frac:
        return 0
    used = [sum(r.job.gpu_frac for r in running if r.gpu == gpu) for gpu in range(n_gpus)]
    roomy = [gpu for gpu in range(n_gpus) if used[gpu] + job.gpu_frac <= 1 + 1e-9]
    return max(roomy, key=lambda gpu: used[gpu], default=None)


def _rate(one: _Running, running: Sequence[_Running]) -> float:
    if not one.job.gpu_frac:
        return 1.0
    return shared_rate(sum(r.job.busy_frac for r in running if r.gpu == one.gpu))


def spread(fractions: Sequence[float], n_gpus: int) -> list[float]:
    """Raise reserved shares so that jobs which all fit at once use all GPUs.

    Ray fills one GPU before it takes the next: two small jobs on two GPUs would share the first one.

    Returns:
        The shares, in hundredths, none smaller than before; unchanged if they do not fit at once anyway.
    """
    for tenants in range(1, len(fractions) + 1):
        raised = [max(fraction, math.floor(100 / tenants) / 100) for fraction in fractions]
        if _fit_at_once(raised, n_gpus):
            return raised
    return list(fractions)


def _fit_at_once(fractions: Sequence[float], n_gpus: int) -> bool:
    used = [0.0] * n_gpus
    for fraction in fractions:
        roomy = [gpu for gpu in range(n_gpus) if used[gpu] + fraction <= 1 + 1e-9]
        if not roomy:
            return False
        used[max(roomy, key=lambda gpu: used[gpu])] += fraction
    return True


def choose_pools(options: Mapping[str, Mapping[int, Job]], gpus: Sequence[int], lanes: Sequence[int]) -> dict[str, int]:
    """Return a pool for each job, so that no pool is done long after the others.

    Longest jobs first, each goes where the work that waits would then be done first.

    Args:
        options: for each job, what it would be on each pool that it fits.
        gpus: number of GPUs of each pool.
        lanes: how many jobs each pool runs at once.
    """
    chosen: dict[str, int] = {}
    computing, occupying = [0.0] * len(gpus), [0.0] * len(gpus)

    def done_at(pool: int, job: Job) -> float:
        compute = (computing[pool] + job.minutes * job.busy_frac) / gpus[pool]
        return max(compute, (occupying[pool] + job.minutes) / lanes[pool], job.minutes)

    for key in sorted(options, key=lambda key: -min(job.minutes for job in options[key].values())):
        pool = min(options[key], key=lambda pool: (done_at(pool, options[key][pool]), pool))
        job = options[key][pool]
        chosen[key] = pool
        computing[pool] += job.minutes * job.busy_frac
        occupying[pool] += job.minutes
    return chosen
