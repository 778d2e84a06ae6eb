"""How a run is executed: device, micro-batch, threads. Nothing here belongs to the run's identity."""

import importlib.util
import logging
import math
import os
import shutil
import sysconfig
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hrs.errors import HRSError, shown
from hrs.gpu import gpu_of, open_gpu

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """Execution of one training run in one process. Which of several workers that is, and that there are others, says
    :class:`hrs.training.sharing.Workers`."""

    device: str = "auto"
    """``auto`` is the first GPU if there is one, else the CPU; or a torch device such as ``cuda:1``."""
    micro_batch: int | None = None
    """Windows per forward pass, whatever an earlier session found to fit. None starts from the whole batch (with
    ``training.sharing.workers`` from one worker's part, which it must divide), or from what fits the limits below."""
    micro_batch_limit: int | None = None
    """Most windows per forward pass: what a plan predicts to fit. An earlier session's smaller micro-batch is kept."""
    threads: int = 1
    """CPU threads of torch."""
    compile: bool | None = None
    """Compile the model with ``torch.compile``. None compiles on a GPU, if there is Triton and a C compiler and the
    config allows it, and trains uncompiled after a warning if compiling fails."""
    activation_checkpointing: bool = False
    """Recompute every block in the backward pass: less memory, about a third more time."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints. None chooses by their size, between 10 seconds and 10 minutes: one second for every
    megabyte. One that is due while the one before is still being written follows when that is done."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, instead of minutes: each one due is written, and is on the disk before the next
    report."""
    log_every: int = 10
    """Steps between progress reports."""
    check_every: int | None = None
    """Steps between looks at whether losses and gradients were finite. Each look waits for the device; a step that was
    not finite changes nothing either way. None looks at every step on the CPU, at every tenth on a GPU, and before
    every report and checkpoint."""
    memory_limit_bytes: int | None = None
    """Memory the micro-batch is chosen for when neither ``micro_batch`` nor ``micro_batch_limit`` is given."""

    def __post_init__(self) -> None:
        for name in (
            "micro_batch",
            "micro_batch_limit",
            "threads",
            "checkpoint_every",
            "log_every",
            "check_every",
            "memory_limit_bytes",
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**63:
                raise HRSError(f"runtime.{name} must be at least 1 and fit 64 bits, got {shown(value)}")
        if self.checkpoint_minutes is not None and not 0 < self.checkpoint_minutes < math.inf:
            raise HRSError(f"runtime.checkpoint_minutes must be above 0 and finite, got {self.checkpoint_minutes}")
        if self.checkpoint_minutes is not None and self.checkpoint_every is not None:
            raise HRSError("checkpoints are written by minutes or by steps: set checkpoint_minutes or checkpoint_every")

    def compiles(self, device: torch.device, *, lazy_experts: bool = False) -> bool:
        """Return whether to compile a model on ``device``; the log says why one on a GPU is not.

        Args:
            lazy_experts: whether the optimiser needs sparse gradients, which a compiled model does not have.
        """
        if self.compile is not None:
            return self.compile
        if device.type != "cuda":
            return False
        missing = "lazily updated experts need sparse gradients" if lazy_experts else missing_compiler()
        if missing:
            _log.info("training uncompiled: %s", missing)
        return missing is None

    def reserving(self, gpu_frac: float) -> "Runtime":
        """Return this runtime for work that reserved ``gpu_frac`` of a GPU from a scheduler.

        Who reserves none uses the CPU: Ray hides no GPU from a worker that asked for none, and nothing would limit the
        memory that many such workers take of the first GPU.
        """
        return self if gpu_frac else replace(self, device="cpu")

    def torch_device(self) -> torch.device:
        """Return the device that ``device`` means; a GPU is opened and its device carries an index.

        Raises:
            HRSError: if it is not a device of this machine.
        """
        gpu = open_gpu(self.device)
        if gpu is not None:
            return gpu.device
        return torch.device("cpu" if self.device == "auto" else self.device)


DEFAULT_RUNTIME = Runtime()


def missing_compiler() -> str | None:
    """Return what ``torch.compile`` lacks here to make code for a GPU; None if nothing is known to be missing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or any(shutil.which(name) for name in ("cc", "gcc", "clang"))):
        return "there is no C compiler (cc, gcc or clang) on PATH"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.exists() else f"Python's header {header} is missing: install Python's development files"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return a context manager for a forward pass in ``training.precision``; see :func:`half_type`."""
    dtype = half_type(precision, device)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def half_type(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the half-precision type that ``training.precision`` means on ``device``; None for float32.

    Raises:
        HRSError: for ``fp16`` on the CPU, whose products of float16 matrices are slow and overflow.
    """
    gpu = gpu_of(device)
    if precision == "auto":
        precision = "fp32" if gpu is None else "bf16" if gpu.bf16 else "fp16"
    if precision == "fp16" and gpu is None:
        raise HRSError("training.precision=fp16 needs a GPU: on the CPU choose auto, fp32 or bf16")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
