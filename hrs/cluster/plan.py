"""Before anything starts: what each run needs, what is done, what runs beside what, and how long it all takes."""

import functools
import heapq
import json
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import psutil
import torch

from hrs.cluster.hardware import Hardware
from hrs.cluster.progress import format_seconds
from hrs.cluster.study import Run
from hrs.config import DataConfig, ExperimentConfig, content_hash, from_dict
from hrs.gpu import has_gpu
from hrs.models import count_parameters
from hrs.storage import Storage
from hrs.training import Runtime
from hrs.training.memory import card_fraction, fit_micro_batch

_GENERATED_BYTES_PER_PARAMETER = 4 * 12
"""Two kept checkpoints, one being written and one with the tracked run, each weights and two moments in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialPlan:
    """How one run is to be executed."""

    run: Run
    state: Literal["finished", "resumes", "new"]
    micro_batch: int
    accumulation: int
    peak_bytes: int
    cpus: float
    card_frac: float
    """Share of one card; 0 without one."""
    minutes: float
    timing: Literal["measured", "estimated"]
    start_minutes: float = 0.0
    slot: int = -1
    """Which lane of the machine it is expected to run in; -1 if it does not run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All trials of a study and the expected makespan."""

    hardware: Hardware
    trials: tuple[TrialPlan, ...]

    @property
    def missing(self) -> tuple[TrialPlan, ...]:
        """Trials that must run, longest first: the last to finish then waits least."""
        return tuple(sorted((t for t in self.trials if t.state != "finished"), key=lambda t: -t.minutes))

    @property
    def makespan_minutes(self) -> float:
        return max((t.start_minutes + t.minutes for t in self.missing), default=0.0)


def plan_runs(
    runs: Sequence[Run], finished: Collection[str], hardware: Hardware, storage: Storage, runtime: Runtime
) -> Plan:
    """Fit every run to the hardware and simulate the queue.

    Raises:
        HRSError: if a model does not fit the card at micro-batch 1, or the disk is too full for the checkpoints.
    """
    trials = [_plan_run(run, run.key in finished, hardware, storage, runtime) for run in runs]
    heaviest = max((count_parameters(t.run.config.model) for t in trials if t.state != "finished"), default=0)
    storage.require_free(heaviest * _GENERATED_BYTES_PER_PARAMETER * max(1, len(trials)))
    return Plan(hardware=hardware, trials=tuple(_place(trials, hardware)))


def _plan_run(run: Run, finished: bool, hardware: Hardware, storage: Storage, runtime: Runtime) -> TrialPlan:
    limit = (
        min(hardware.card_bytes) if hardware.card_bytes else psutil.virtual_memory().available // max(1, hardware.cpus)
    )
    # Planned for where it will run, which need not be where the plan is made.
    device = "cuda" if hardware.card_bytes else "cpu"
    memory = fit_micro_batch(run.config, limit, replace(runtime, device=device))
    share = card_fraction(memory.peak_bytes, limit) if hardware.card_bytes else 0.0
    started = (storage.run(run.key) / "checkpoints").is_dir()
    minutes, timing = _minutes(run, storage)
    return TrialPlan(
        run=run,
        state="finished" if finished else "resumes" if started else "new",
        micro_batch=memory.micro_batch,
        accumulation=memory.accumulation,
        peak_bytes=memory.peak_bytes,
        cpus=min(1.0, hardware.cpus),
        card_frac=share,
        minutes=minutes,
        timing=timing,
    )


# ---- time ------------------------------------------------------------------------------------------------------------

_MODEL_FLOPS_UTILISATION = 0.25
"""Share of a plain matrix product's speed that a training step reaches; only used before anything was measured."""
_EVALUATION_FRAC = 0.2
"""Evaluation and audit, as a share of the training time."""


def _minutes(run: Run, storage: Storage) -> tuple[float, Literal["measured", "estimated"]]:
    tokens = run.config.tokens_per_step * run.config.training.steps
    speed = _measured_speeds(storage).get(_shape(run.config))
    if speed:
        return tokens / speed * (1 + _EVALUATION_FRAC) / 60, "measured"
    flops = 6 * count_parameters(run.config.model) * tokens  # forward and backward of every weight (Kaplan et al. 2020)
    return flops / (_matmul_flops_per_second() * _MODEL_FLOPS_UTILISATION) * (1 + _EVALUATION_FRAC) / 60, "estimated"


def _shape(config: ExperimentConfig) -> str:
    """What decides speed: the model and the phases, not the seed or the data."""
    return content_hash(replace(config, seed=0, data=DataConfig()))


@functools.cache
def _measured_speeds(storage: Storage) -> dict[str, float]:
    """Tokens per second of every trained run in the storage, by shape."""
    speeds = {}
    for summary in storage.root.glob("runs/*/training.json"):
        config = summary.with_name("config.json")
        if config.exists():
            speed = json.loads(summary.read_text())["tokens_per_second"]
            speeds[_shape(from_dict(ExperimentConfig, json.loads(config.read_text())))] = speed
    return speeds


@functools.cache
def _matmul_flops_per_second() -> float:
    """Speed of this machine's first card, or one core, from the best of a few products of square matrices."""
    cuda = has_gpu()
    n = 4096 if cuda else 512
    x = torch.randn(n, n, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the card
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * n**3 / best


# ---- placement -------------------------------------------------------------------------------------------------------


def _place(trials: Sequence[TrialPlan], hardware: Hardware) -> list[TrialPlan]:
    """Simulate the queue: every trial, longest first, in the lane that is free first."""
    order = sorted((t for t in trials if t.state != "finished"), key=lambda t: -t.minutes)
    lanes = [(0.0, lane) for lane in range(lane_count(order, hardware))]
    placed = {t.run.key: t for t in trials}
    for trial in order:
        free_at, lane = heapq.heappop(lanes)
        placed[trial.run.key] = replace(trial, start_minutes=free_at, slot=lane)
        heapq.heappush(lanes, (free_at + trial.minutes, lane))
    return [placed[t.run.key] for t in trials]


def lane_count(trials: Sequence[TrialPlan], hardware: Hardware) -> int:
    """Trials that run side by side, if all were as large as the largest."""
    if not trials:
        return 1
    by_cpu = int(hardware.cpus / max(t.cpus for t in trials))
    share = max(t.card_frac for t in trials)
    by_card = len(hardware.card_bytes) * int(1 / share + 1e-9) if share else by_cpu
    return max(1, min(by_cpu, by_card))


# ---- for people ------------------------------------------------------------------------------------------------------


def format_plan(plan: Plan) -> str:
    """The plan as aligned text: one line a trial, then the makespan."""
    head = ("trial", "state", "memory", "micro-batch", "takes", "card", "cores", "lane", "starts")
    rows = [_plan_row(t) for t in plan.trials]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    done = len(plan.trials) - len(plan.missing)
    lanes = lane_count(plan.missing, plan.hardware)
    guess = " (estimated from this machine's speed: no run of this shape was measured yet)" if any(
        t.timing == "estimated" for t in plan.missing
    ) else ""  # fmt: skip
    return "\n".join(
        (
            *lines,
            "",
            f"{plan.hardware}: {lanes} at a time, {done} of {len(plan.trials)} finished before, "
            f"{format_seconds(60 * plan.makespan_minutes)} for the rest{guess}",
        )
    )


def _plan_row(t: TrialPlan) -> tuple[str, ...]:
    ran = t.state == "finished"
    return (
        t.run.label,
        t.state,
        f"{t.peak_bytes / 2**20:,.0f} MiB",
        f"{t.micro_batch} x {t.accumulation}",
        "-" if ran else format_seconds(60 * t.minutes),
        f"{t.card_frac:.2f}" if t.card_frac else "-",
        f"{t.cpus:g}",
        "-" if ran else str(t.slot),
        "-" if ran else "+" + format_seconds(60 * t.start_minutes),
    )
