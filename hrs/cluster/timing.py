"""How long a run takes on a processor: from a run of its shape that was timed there, else from a model of its kernels.

The model is :mod:`hrs.training.gpu_time`, with the peaks of the data sheets: no GPU has to be at hand and none is
disturbed. One core of the CPU is timed instead.
"""

import functools
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from hrs import strict_json
from hrs.cluster.hardware import GpuPool
from hrs.config import ExperimentConfig, canonical_json, from_dict
from hrs.errors import HRSError
from hrs.files import read_json
from hrs.gpu import FIRST_BF16_CAPABILITY, GpuProperties
from hrs.storage import Storage
from hrs.training import Runtime
from hrs.training.gpu_time import GpuSpeed, TrainingTrace, model_step, trace_training

_log = logging.getLogger(__name__)

DEVICE_FILE = "device.json"
"""In a run's directory: ``device`` (a GPU's kind, ``cpu``, or that there were several workers), ``tenants`` (trials
planned on that GPU) and ``evaluation_seconds`` (evaluation and audit)."""

EVALUATION_FRAC = 0.2
"""Evaluation and audit, as a share of the training time, where none was measured; at least ``EVALUATION_SECONDS``."""
EVALUATION_SECONDS = 12.0
"""Shortest time of evaluation and audit: a whole split does not get shorter with the run. On one core the smallest
models took 5 to 20 s (wiki-mini, ``micro``)."""

_CPU_EFFICIENCY = 0.25
"""Share of the speed of a plain matrix product that a training step reaches on the CPU."""

_PEAKS: dict[str, tuple[float, float]] = {
    "V100": (112, 900), "T4": (65, 320), "TITAN RTX": (65, 672), "RTX 2080 Ti": (54, 616), "RTX 2080": (42, 448),
    "RTX 2070": (33, 448), "RTX 2060": (26, 336), "RTX 8000": (65, 672), "RTX 6000": (65, 672),
    "A100": (312, 1555), "A800": (312, 1555), "A30": (165, 933), "A40": (150, 696), "A10G": (70, 600),
    "A10": (125, 600), "A16": (18, 200), "A2": (18, 200), "RTX A6000": (155, 768), "RTX A5000": (111, 768),
    "RTX A4000": (77, 448), "RTX 3090 Ti": (80, 1008), "RTX 3090": (71, 936), "RTX 3080 Ti": (68, 912),
    "RTX 3080": (60, 760), "RTX 3070 Ti": (43, 608), "RTX 3070": (41, 448), "RTX 3060 Ti": (32, 448),
    "RTX 3060": (25, 360), "RTX 3050": (18, 224),
    "L40S": (362, 864), "L40": (181, 864), "L4": (121, 300), "RTX 6000 Ada": (364, 960), "RTX 5000 Ada": (261, 576),
    "RTX 4500 Ada": (158, 432), "RTX 4000 Ada": (107, 360), "RTX 4090": (165, 1008), "RTX 4080 SUPER": (104, 736),
    "RTX 4080": (97, 717), "RTX 4070 Ti": (80, 504), "RTX 4070 SUPER": (71, 504), "RTX 4070": (58, 504),
    "RTX 4060 Ti": (44, 288), "RTX 4060": (30, 272), "RTX 4050": (24, 192),
    "H100 PCIe": (756, 2000), "H100 NVL": (835, 3900), "H100": (989, 3350), "H800": (989, 3350), "H200": (989, 4800),
    "H20": (148, 4000), "GH200": (989, 4000),
    "B100": (1750, 8000), "B200": (2250, 8000), "GB200": (2500, 8000), "B300": (2250, 8000), "GB300": (2500, 8000),
    "RTX PRO 6000": (500, 1792), "RTX 5090": (209, 1792), "RTX 5080": (113, 960), "RTX 5070 Ti": (88, 896),
    "RTX 5070": (62, 672), "RTX 5060 Ti": (48, 448), "RTX 5060": (38, 448),
}  # fmt: skip
"""Peak of dense bf16 matrix products with float32 sums in TFLOP/s (fp16 where bf16 is emulated), and memory bandwidth
in GB/s, by part of the name. From NVIDIA's data sheets and architecture papers, without sparsity."""

_PEAK_BY_GENERATION: dict[tuple[int, int], tuple[float, float]] = {
    (7, 0): (112, 900), (7, 5): (26, 320), (8, 0): (165, 933), (8, 6): (25, 360), (8, 9): (30, 272),
    (9, 0): (756, 2000), (10, 0): (1750, 8000), (12, 0): (38, 448),
}  # fmt: skip
"""The weakest common GPU of each compute capability, for names that are not in the table."""
_PEAK_OF_UNKNOWN = (26.0, 320.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """How long one run takes with a processor to itself."""

    minutes: float
    """With evaluation and audit."""
    busy_frac: float
    """Share of that time in which it computes on the GPU: what several runs on one GPU have to share; 1 on the CPU."""
    source: Literal["measured", "estimated"]


def gpu_speed(gpu: GpuProperties) -> GpuSpeed:
    """Return the peaks of a GPU; those of a weak one of its generation if it is unknown."""
    words = gpu.name.upper().replace("-", " ").split()
    best: tuple[int, tuple[float, float]] = (0, _PEAK_BY_GENERATION.get(gpu.capability, _PEAK_OF_UNKNOWN))
    for name, peak in _PEAKS.items():
        wanted = name.upper().split()
        places = range(len(words) - len(wanted) + 1)
        if any(words[i : i + len(wanted)] == wanted for i in places) and len(wanted) > best[0]:
            best = len(wanted), peak
    half_tera_flops, giga_bytes = best[1]
    half_flops = half_tera_flops * 1e12
    # TF32 and bfloat16 came with the same generation.
    single_flops = half_flops / (2 if gpu.capability >= FIRST_BF16_CAPABILITY else 8)
    return GpuSpeed(half_flops=half_flops, single_flops=single_flops, bytes_per_second=giga_bytes * 1e9)


def time_on_gpu(
    config: ExperimentConfig, micro_batch: int, runtime: Runtime, pool: GpuPool, tenants: int, storage: Storage
) -> Timing:
    """Return how long a run takes on the slowest GPU of ``pool``.

    A speed that was measured while ``tenants`` trials were planned on the GPU counts only for as many: it is converted
    to that of a GPU of its own by the rate that :func:`shared_rate` gives.
    """
    slowest: tuple[float, float] = (0.0, 0.0)
    for gpu in {gpu.kind: gpu for gpu in pool.gpus}.values():
        slowest = max(slowest, _modelled_step(config, micro_batch, runtime, gpu))
    step_seconds, busy_seconds = slowest
    steps = config.training.steps
    modelled = steps * step_seconds
    busy_frac = min(1.0, busy_seconds / step_seconds)
    measured = _measured(storage)
    for kind in dict.fromkeys(gpu.kind for gpu in pool.gpus):
        if alone := measured.get(config, kind, 1):
            seconds = config.tokens_per_step * steps / alone.tokens_per_second
            return _timing(seconds, min(1.0, steps * busy_seconds / seconds), "measured", alone.evaluation_seconds)
        if shared := measured.get(config, kind, tenants):
            rate = shared_rate(tenants * busy_frac)
            seconds = config.tokens_per_step * steps / shared.tokens_per_second
            return _timing(seconds, busy_frac, "measured", shared.evaluation_seconds, rate)
    return _timing(modelled, busy_frac, "estimated", None)


def time_on_cpu(config: ExperimentConfig, micro_batch: int, runtime: Runtime, storage: Storage) -> Timing:
    """Return how long a run takes on a core of this machine."""
    tokens = config.tokens_per_step * config.training.steps
    if known := _measured(storage).get(config, "cpu", 1):
        return _timing(tokens / known.tokens_per_second, 1.0, "measured", known.evaluation_seconds)
    step = _trace(config, micro_batch, runtime)
    repeats = config.training.batch_sequences // micro_batch
    flops = repeats * sum(kernel.flops for kernel in step.gradients) + sum(kernel.flops for kernel in step.update)
    seconds = config.training.steps * flops / (_matmul_flops_per_second() * _CPU_EFFICIENCY)
    return _timing(seconds, 1.0, "estimated", None)


def shared_rate(busy: float) -> float:
    """Return the speed of runs that share a GPU, as a share of the speed of one alone.

    Without MPS a GPU computes for one process at a time: while the kernels of all fit into the time there is, nobody
    waits; beyond that everybody's share shrinks.

    Args:
        busy: sum of the runs' :attr:`Timing.busy_frac`.
    """
    return min(1.0, 1.0 / busy) if busy else 1.0


def _timing(
    training_seconds: float,
    busy_frac: float,
    source: Literal["measured", "estimated"],
    evaluation_seconds: float | None,
    rate: float = 1.0,
) -> Timing:
    """Return the time of a whole run; ``rate`` is the speed at which its seconds were measured, as a share of full."""
    if evaluation_seconds is None:
        evaluation_seconds = max(EVALUATION_SECONDS, EVALUATION_FRAC * training_seconds)
    return Timing(minutes=(training_seconds + evaluation_seconds) * rate / 60, busy_frac=busy_frac, source=source)


def _modelled_step(
    config: ExperimentConfig, micro_batch: int, runtime: Runtime, gpu: GpuProperties
) -> tuple[float, float]:
    """Return the modelled seconds of one training step, and how many of them the GPU computes."""
    speed, step = gpu_speed(gpu), _trace(config, micro_batch, runtime)
    compiled = runtime.compile is not False and config.training.optimizer.expert_updates != "lazy"
    repeats = config.training.batch_sequences // micro_batch
    gradients = model_step(step.gradients, speed, compiled=compiled)
    update = model_step(step.update, speed, compiled=False)
    return (
        repeats * gradients.seconds + update.seconds,
        repeats * gradients.busy_seconds + update.busy_seconds,
    )


def _trace(config: ExperimentConfig, micro_batch: int, runtime: Runtime) -> TrainingTrace:
    return trace_training(config, micro_batch, activation_checkpointing=runtime.activation_checkpointing)


class Measured(NamedTuple):
    """What a run of some shape took."""

    tokens_per_second: float
    evaluation_seconds: float | None
    """None of runs of an earlier version."""


class _Measured:
    """What the trained runs of a storage took, by shape, device and planned tenants.

    Configs are compared as the JSON that they are written in, and only what has a wanted shape is read further: the
    history of years must not slow a plan. Runs that do not say where they were trained are taken for runs on the CPU.
    A run whose files are damaged is logged and left out: its speed is worth less than the plan.
    """

    def __init__(self, storage: Storage) -> None:
        self._runs: dict[str, list[Path]] = {}
        for config in storage.root.glob("runs/*/config.json"):
            try:
                values = read_json(config)
                if not isinstance(values, dict) or _names(values) != _names(_DEFAULTS):  # of another version
                    values = json.loads(canonical_json(read_config(config)))
                shape = _written_shape(values)
            except (HRSError, LookupError, TypeError, ValueError) as error:
                _log.warning("the speed of run %s is not known: %s", config.parent.name, error)
                continue
            self._runs.setdefault(shape, []).append(config.parent)
        self._known: dict[str, dict[tuple[str, int], Measured]] = {}

    def get(self, config: ExperimentConfig, device: str, tenants: int) -> Measured | None:
        """Return what a run of this shape took on a device that was planned for so many; None if none ran there."""
        shape = _written_shape(json.loads(canonical_json(config)))
        if shape not in self._known:
            self._known[shape] = dict(filter(None, map(_read_measured, self._runs.get(shape, ()))))
        return self._known[shape].get((device, tenants))


_measured = functools.cache(_Measured)


_DEFAULTS: dict[str, Any] = json.loads(canonical_json(ExperimentConfig()))


def _names(values: dict[str, Any]) -> list[Any]:
    """Return the names of a config's fields as a tree."""
    return [(name, _names(value) if isinstance(value, dict) else None) for name, value in sorted(values.items())]


def _written_shape(values: dict[str, Any]) -> str:
    """Return what decides speed of a config as it was written: the model and the phases, not the seed or the data."""
    return strict_json.dumps({**values, "seed": 0, "data": None}, sort_keys=True)


def _read_measured(directory: Path) -> tuple[tuple[str, int], Measured] | None:
    device, summary = directory / DEVICE_FILE, directory / "training.json"
    if not summary.exists():
        return None
    try:
        facts: dict[str, Any] = read_json(device) if device.exists() else {"device": "cpu", "tenants": 1}
        known = Measured(float(read_json(summary)["tokens_per_second"]), facts.get("evaluation_seconds"))
        return (facts["device"], facts["tenants"]), known
    except (HRSError, LookupError, TypeError, ValueError) as error:
        _log.warning("the speed of run %s is not known: %s", directory.name, error)
        return None


def read_config(path: Path) -> ExperimentConfig:
    """Return the config of a run from its ``config.json``.

    Raises:
        HRSError: naming the file if it is damaged, or has fields that this version does not know.
    """
    values = read_json(path)
    try:
        config: ExperimentConfig = from_dict(ExperimentConfig, values)
    except (HRSError, LookupError, TypeError, ValueError) as error:
        raise HRSError(f"{path} is of another version of hrs ({str(error).partition(';')[0]})") from error
    return config


@functools.cache
def _matmul_flops_per_second() -> float:
    """Return the speed of one core of this machine: the best of a few products of square matrices."""
    x = torch.randn(512, 512)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * 512**3 / best
