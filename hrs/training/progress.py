"""What a run tells while it trains, and what it leaves when it is done."""

import contextlib
import ctypes
import gc
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hrs import strict_json
from hrs.files import write_whole
from hrs.gpu import gpu_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands after ``step`` of ``steps`` optimiser steps."""

    step: int
    steps: int
    loss: float
    """Mean training cross-entropy since the last report, in nats, without auxiliary terms; NaN if all was skipped."""
    metrics: dict[str, float]
    """``train_loss``, auxiliary losses by name, ``lr``, ``grad_norm`` (before clipping), ``phase`` (index),
    ``tier_share_<name>``, ``tokens_per_second``, ``skipped_steps``, and, when taken just now, ``validation_loss`` of
    the weights that learn and ``validation_loss_ema_<decay>`` of each of their averages."""
    tokens_per_second: float
    """Since the last report, without validations and checkpoints."""
    seconds_left: float
    """At the run's mean speed, with validations and checkpoints."""
    phase: str
    """Name of the phase of the last step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSummary:
    """What a finished run cost and which weights it is evaluated with; ``training.json`` in the run directory."""

    seconds: float
    """Over all sessions of the run, with validations and checkpoints, without steps that a crash undid."""
    tokens_per_second: float
    """Of the optimiser steps alone."""
    peak_memory_bytes: int
    """CUDA: the most its allocator had in use. CPU: the most that the process grew by (:class:`MemoryMeter`)."""
    skipped_steps: int
    """Steps without an update, because the loss or the gradient was not finite."""
    micro_batch: int
    """Windows per forward pass at the end: smaller than asked for if memory ran out."""
    kept_step: int | None
    """Steps done when the averaged weights that the run is evaluated with were taken; None without averaging."""
    kept_decay: float | None
    """Decay of that average; None without averaging."""

    def save(self, directory: Path) -> None:
        """Write ``training.json``, whole or not at all."""
        write_whole(directory / "training.json", strict_json.dumps(asdict(self), indent=1))


class MemoryMeter:
    """The most memory that a run takes on its device, from the moment this is made.

    On the CPU that is the growth of the resident process: what it imported and what earlier runs of a warm process left
    is given back first where it can be, and does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = gpu_of(device)
        self._before = 0
        if self._gpu is None:
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):  # not with every C library
                ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):  # Linux: the peak begins at what is resident now
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._before = _resident_bytes("VmRSS")

    def peak_bytes(self) -> int:
        """Return, on a GPU, the most that tensors took at once; on the CPU, the most that the process grew by."""
        if self._gpu is not None:
            return self._gpu.peak_bytes()
        return max(0, _resident_bytes("VmHWM") - self._before)


def _resident_bytes(field: str) -> int:
    """Return a field of this process's status in bytes; where there is none, the resident size."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    import psutil  # a machine that only runs the checks of its GPU need not have it

    return int(psutil.Process().memory_info().rss)
