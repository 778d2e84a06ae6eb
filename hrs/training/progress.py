"""What a run tells while it trains, and what it leaves when it is done."""

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
    """CUDA: the most its allocator had in use. CPU: the largest resident size of the whole process seen at a report,
    which in a process that did other work before includes what that left."""
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


def memory_in_use_bytes(device: torch.device) -> int:
    """Return, on a GPU, the most that tensors took at once; on the CPU, the resident size of this process."""
    gpu = gpu_of(device)
    if gpu is not None:
        return gpu.peak_bytes()
    import psutil  # a machine that only runs the checks of its GPU need not have it

    return int(psutil.Process().memory_info().rss)
