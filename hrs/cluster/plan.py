"""Before anything starts: what each run needs, what is done, what runs beside what, and how long it all takes."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import psutil

from hrs.cluster.hardware import GpuPool, Hardware
from hrs.cluster.placement import Job, choose_pools, simulate, spread
from hrs.cluster.progress import format_seconds
from hrs.cluster.study import Run
from hrs.cluster.timing import Timing, time_on_cpu, time_on_gpu
from hrs.errors import HRSError
from hrs.models import count_parameters
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.training import Runtime
from hrs.training.memory import MemoryPlan, card_fraction, fit_micro_batch

State = Literal["finished", "resumes", "new"]

_GENERATED_BYTES_PER_PARAMETER = 4 * 12
"""Two kept checkpoints, one being written and one with the tracked run, each weights and two moments in fp32."""

_LONG_ON_CPU_MINUTES = 7 * 24 * 60.0
"""A study that takes longer on the CPU is said to need a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialPlan:
    """How one run is to be executed."""

    run: Run
    state: State
    micro_batch: int
    accumulation: int
    peak_bytes: int
    cpus: float
    gpu_frac: float
    """Reserved share of one GPU; 0 on the CPU."""
    memory_frac: float = 0.0
    """Share of that GPU's whole memory which the trial may take, CUDA's own included; 0 on the CPU. Less than
    ``gpu_frac``, which is a share of the memory that is free."""
    pool: int = 0
    """Index in :attr:`Hardware.pools`."""
    tenants: int = 1
    """Trials that may run on that GPU at once."""
    minutes: float
    """With a GPU or a core to itself."""
    busy_frac: float = 1.0
    """Share of ``minutes`` in which the GPU computes for it."""
    timing: Literal["measured", "estimated"]
    start_minutes: float = 0.0
    end_minutes: float = 0.0
    slot: int = -1
    """Which worker slot it is expected to run in; -1 if it does not run."""
    nodes: str = ""
    """Ray's selector over the label ``ray.io/node-id``; empty if any node will do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All trials of a study and the expected makespan."""

    hardware: Hardware
    trials: tuple[TrialPlan, ...]
    refused: tuple[tuple[Run, str], ...] = ()
    """Runs that fit nowhere, and why; they are not among the trials."""

    @property
    def missing(self) -> tuple[TrialPlan, ...]:
        """Trials that must run, longest first: the last to finish then waits least."""
        return tuple(sorted((t for t in self.trials if t.state != "finished"), key=lambda t: -t.minutes))

    @property
    def makespan_minutes(self) -> float:
        """Minutes until the last trial ends."""
        return max((t.end_minutes for t in self.missing), default=0.0)


def plan_runs(
    runs: Sequence[Run],
    finished: Collection[str],
    hardware: Hardware,
    storage: Storage,
    runtime: Runtime,
    *,
    copies: int = 1,
) -> Plan:
    """Fit every run to the hardware and simulate the queue. A run that fits nowhere is refused and stops no other.

    Args:
        runtime: with device ``cpu`` the GPUs are left alone.
        copies: how many runs like each of these will wait in the queue, in a search.

    Raises:
        HRSError: if nothing that is left to run fits at micro-batch 1, or the disk is too full for the checkpoints.
    """
    if runtime.device == "cpu":
        hardware = replace(hardware, nodes=())
    states = {run.key: _state(run, finished, storage) for run in runs}
    refused: dict[str, str] = {}
    fitted = _on_gpus if hardware.nodes else _on_cpu
    trials = fitted(runs, states, hardware, storage, runtime, copies, refused)
    if refused and not any(t.state != "finished" for t in trials):
        raise HRSError(next(iter(refused.values())))
    heaviest = max((count_parameters(t.run.config.model) for t in trials if t.state != "finished"), default=0)
    storage.require_free(heaviest * _GENERATED_BYTES_PER_PARAMETER * max(1, len(trials)))
    return Plan(
        hardware=hardware,
        trials=tuple(_place(trials, hardware)),
        refused=tuple((run, refused[run.key]) for run in runs if run.key in refused),
    )


def note_refused(plan: Plan, study_id: str, tracker: Tracker) -> None:
    """Record the runs that fit nowhere as failed, so that the table says why they are missing."""
    for run, reason in plan.refused:
        tracker.note_end(run.key, study_id, run.config, run.data_fingerprint, "failed", reason)


def _state(run: Run, finished: Collection[str], storage: Storage) -> State:
    if run.key in finished:
        return "finished"
    return "resumes" if (storage.run(run.key) / "checkpoints").is_dir() else "new"


# ---- on the CPU ------------------------------------------------------------------------------------------------------


def _on_cpu(
    runs: Sequence[Run],
    states: dict[str, State],
    hardware: Hardware,
    storage: Storage,
    runtime: Runtime,
    copies: int,
    refused: dict[str, str],
) -> list[TrialPlan]:
    free = psutil.virtual_memory().available // max(1, hardware.cpus)
    trials = []
    for run in runs:
        limit = free if states[run.key] != "finished" else sys.maxsize  # what is done need not fit any more
        try:
            memory = fit_micro_batch(run.config, limit, replace(runtime, device="cpu"))
        except HRSError as error:
            refused[run.key] = str(error)
            continue
        timing = time_on_cpu(run.config, memory.micro_batch, runtime, storage)
        trials.append(_trial(run, states[run.key], memory, timing, cpus=min(1.0, hardware.cpus)))
    return trials


def _trial(
    run: Run, state: State, memory: MemoryPlan, timing: Timing, *, cpus: float, gpu_frac: float = 0.0
) -> TrialPlan:
    return TrialPlan(
        run=run,
        state=state,
        micro_batch=memory.micro_batch,
        accumulation=memory.accumulation,
        peak_bytes=memory.peak_bytes,
        cpus=cpus,
        gpu_frac=gpu_frac,
        minutes=timing.minutes,
        busy_frac=timing.busy_frac,
        timing=timing.source,
    )


# ---- on GPUs ---------------------------------------------------------------------------------------------------------


def _on_gpus(
    runs: Sequence[Run],
    states: dict[str, State],
    hardware: Hardware,
    storage: Storage,
    runtime: Runtime,
    copies: int,
    refused: dict[str, str],
) -> list[TrialPlan]:
    """Fit every run to each pool, choose one, and reserve a share of a GPU there.

    The share is of the memory that is free, so what other programs use is left to them.
    """
    pools = hardware.pools
    options: dict[str, dict[int, TrialPlan]] = {}
    for run in runs:
        try:
            options[run.key] = _fit_pools(run, states[run.key], pools, storage, runtime)
        except HRSError as error:
            refused[run.key] = str(error)
    runs = [run for run in runs if run.key in options]
    missing = [run.key for run in runs if states[run.key] != "finished"]
    chosen = choose_pools(
        {key: {i: _job(t) for i, t in options[key].items()} for key in missing},
        gpus=[pool.count for pool in pools],
        lanes=[_lanes([options[key][i] for key in missing if i in options[key]], pools[i]) for i in range(len(pools))],
    )
    trials = {run.key: options[run.key][chosen.get(run.key, min(options[run.key]))] for run in runs}
    for i, pool in enumerate(pools):
        mine = [key for key, chosen_pool in chosen.items() if chosen_pool == i]
        shares = spread([trials[key].gpu_frac for key in mine for _ in range(copies)], pool.count)[::copies]
        for key, share in zip(mine, shares, strict=True):
            trials[key] = replace(trials[key], gpu_frac=share)
    return [_reserved(trials[run.key], hardware, storage, runtime) for run in runs]


def _fit_pools(
    run: Run, state: State, pools: Sequence[GpuPool], storage: Storage, runtime: Runtime
) -> dict[int, TrialPlan]:
    """Return the run's plan on each pool that it fits.

    Raises:
        HRSError: if it fits none, with the number of bytes that it needs.
    """
    fitting = {}
    refusal: HRSError | None = None
    for i, pool in enumerate(pools):  # the most memory first
        limit = pool.limit_bytes if state != "finished" else sys.maxsize  # what is done need not fit any more
        try:
            memory = fit_micro_batch(run.config, limit, replace(runtime, device="cuda"))
        except HRSError as error:
            refusal = refusal or error
            continue
        share = card_fraction(memory.peak_bytes, pool.limit_bytes)
        timing = time_on_gpu(run.config, memory.micro_batch, runtime, pool, int(1 / share + 1e-9), storage)
        cpus = min(1.0, float(min(node.cpus for node in pool.nodes))) or 1.0
        fitting[i] = replace(_trial(run, state, memory, timing, cpus=cpus, gpu_frac=share), pool=i)
    if not fitting:
        assert refusal is not None
        raise HRSError(f"{refusal}{_larger_neighbour(run, pools, runtime)}") from refusal
    return fitting


def _larger_neighbour(run: Run, pools: Sequence[GpuPool], runtime: Runtime) -> str:
    """Return advice if a run fits a GPU that shares its node with smaller ones, else nothing."""
    for node in (node for pool in pools for node in pool.nodes):
        largest = max(node.gpus, key=lambda gpu: gpu.free_bytes)
        if largest.free_bytes > node.limit_bytes:
            try:
                fit_micro_batch(run.config, largest.free_bytes, replace(runtime, device="cuda"))
            except HRSError:
                continue
            return (
                f". It fits GPU {largest.index}, but Ray cannot choose among the GPUs of one node: "
                f"CUDA_VISIBLE_DEVICES={largest.index} leaves the others out; a Ray node for each kind uses them all"
            )
    return ""


def _reserved(trial: TrialPlan, hardware: Hardware, storage: Storage, runtime: Runtime) -> TrialPlan:
    pool = hardware.pools[trial.pool]
    tenants = int(1 / trial.gpu_frac + 1e-9)
    timing = time_on_gpu(trial.run.config, trial.micro_batch, runtime, pool, tenants, storage)
    return replace(
        trial,
        memory_frac=trial.gpu_frac * pool.limit_bytes / min(gpu.total_bytes for gpu in pool.gpus),
        tenants=tenants,
        nodes=hardware.selector(pool),
        minutes=timing.minutes,
        busy_frac=timing.busy_frac,
        timing=timing.source,
    )


# ---- the queue -------------------------------------------------------------------------------------------------------


def _place(trials: Sequence[TrialPlan], hardware: Hardware) -> list[TrialPlan]:
    """Simulate the queue of each pool, the longest trial first; worker slots are numbered through."""
    placed = {t.run.key: replace(t, end_minutes=t.minutes) for t in trials}
    first_slot = 0
    for i, (n_gpus, cpus) in enumerate(_capacities(hardware)):
        order = sorted((t for t in trials if t.state != "finished" and t.pool == i), key=lambda t: -t.minutes)
        places = simulate([_job(t) for t in order], n_gpus, cpus)
        for trial in order:
            place = places[trial.run.key]
            placed[trial.run.key] = replace(
                trial,
                start_minutes=place.start_minutes,
                end_minutes=place.end_minutes,
                slot=first_slot + place.slot,
            )
        first_slot += 1 + max((place.slot for place in places.values()), default=-1)
    return [placed[t.run.key] for t in trials]


def _capacities(hardware: Hardware) -> list[tuple[int, float]]:
    """Return GPUs and cores of each pool; without a GPU all cores are one pool."""
    return [(pool.count, max(1, pool.cpus)) for pool in hardware.pools] or [(0, hardware.cpus)]


def _job(t: TrialPlan) -> Job:
    return Job(key=t.run.key, minutes=t.minutes, cpus=t.cpus, gpu_frac=t.gpu_frac, busy_frac=t.busy_frac)


def lane_count(trials: Sequence[TrialPlan], hardware: Hardware) -> int:
    """Return how many trials run side by side, if all on a pool were as large as its largest; at least 1."""
    if not hardware.nodes:
        return max(1, int(hardware.cpus / max((t.cpus for t in trials), default=1.0)))
    pools = enumerate(hardware.pools)
    return max(1, sum(_lanes(mine, pool) for i, pool in pools if (mine := [t for t in trials if t.pool == i])))


def _lanes(trials: Sequence[TrialPlan], pool: GpuPool) -> int:
    if not trials:
        return 1
    by_gpu = pool.count * int(1 / max(t.gpu_frac for t in trials) + 1e-9)
    return max(1, min(int(pool.cpus / max(t.cpus for t in trials)), by_gpu))


# ---- for people ------------------------------------------------------------------------------------------------------


def format_plan(plan: Plan) -> str:
    """Return the plan as aligned text: one line a trial in order of their starts, the GPUs, then the makespan."""
    head = ("trial", "state", "memory", "micro-batch", "takes", "GPU", "cores", "slot", "starts")
    order = sorted(plan.trials, key=lambda t: (t.state != "finished", t.start_minutes))
    rows = [_plan_row(t, plan.hardware) for t in order]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    lines += [f"{run.label}  left out: {reason}" for run, reason in plan.refused]
    done = len(plan.trials) - len(plan.missing)
    lanes = lane_count(plan.missing, plan.hardware)
    left = format_seconds(60 * plan.makespan_minutes)
    needs_gpu = not plan.hardware.nodes and plan.makespan_minutes > _LONG_ON_CPU_MINUTES
    return "\n".join(
        (
            *lines,
            "",
            *plan.hardware.gpu_lines(),
            f"{plan.hardware}: {lanes} at a time, {done} of {len(plan.trials)} finished before, "
            + (f"the rest needs a GPU: about {left} on this CPU" if needs_gpu else f"{left} for the rest")
            + _how_timed(plan),
        )
    )


def _how_timed(plan: Plan) -> str:
    if all(t.timing == "measured" for t in plan.missing):
        return ""
    if plan.hardware.nodes:
        return " (estimated from the GPU's data sheet: no run of this shape was measured on such a GPU yet)"
    return " (estimated from this machine's speed: no run of this shape was measured yet)"


def _takes(t: TrialPlan, hardware: Hardware) -> str:
    minutes = t.end_minutes - t.start_minutes
    needs_gpu = not hardware.nodes and minutes > _LONG_ON_CPU_MINUTES
    return format_seconds(60 * minutes) + (": needs a GPU" if needs_gpu else "")


def _plan_row(t: TrialPlan, hardware: Hardware) -> tuple[str, ...]:
    ran = t.state == "finished"
    kind = f" of {hardware.pools[t.pool].kind}" if t.gpu_frac and len(hardware.pools) > 1 else ""
    return (
        t.run.label,
        t.state,
        f"{t.peak_bytes / 2**20:,.0f} MiB",
        f"{t.micro_batch} x {t.accumulation}",
        "-" if ran else _takes(t, hardware),
        f"{t.gpu_frac:.2f}{kind}" if t.gpu_frac else "-",
        f"{t.cpus:g}",
        "-" if ran else str(t.slot),
        "-" if ran else "+" + format_seconds(60 * t.start_minutes),
    )
