"""How a run is executed: device, micro-batch, threads. Nothing here belongs to the run's identity."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from hrs.errors import HRSError


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """Execution of one training run in one process. Which of several workers that is, and that there are others, says
    :class:`hrs.training.sharing.Workers`."""

    device: str = "auto"
    """``auto`` is the first CUDA card if there is one, else the CPU; or a torch device such as ``cuda:1``."""
    micro_batch: int | None = None
    """Windows per forward pass. None starts from the whole batch (with ``training.sharing.workers`` from one worker's
    part, which it must divide), or from what fits ``memory_limit_bytes``."""
    threads: int = 1
    """CPU threads of torch."""
    compile: bool = False
    """Compile the model with ``torch.compile``."""
    activation_checkpointing: bool = False
    """Recompute every block in the backward pass: less memory, about a third more time."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between progress reports."""
    memory_limit_bytes: int | None = None
    """Memory the micro-batch is chosen for when ``micro_batch`` is None."""

    def __post_init__(self) -> None:
        for name in ("micro_batch", "threads", "checkpoint_every", "log_every", "memory_limit_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HRSError(f"runtime.{name} must be at least 1, got {value}")

    def torch_device(self) -> torch.device:
        """The device meant by ``device``.

        Raises:
            HRSError: if it is not a device of this machine.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise HRSError(f"unknown device '{self.device}': choose auto, cpu, cuda or cuda:N") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise HRSError(f"device {self.device} is not there: there are {torch.cuda.device_count()} CUDA cards")
        return device


DEFAULT_RUNTIME = Runtime()


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision of a forward pass: ``fp32``, ``bf16``, or ``auto`` (bf16 on CUDA, fp32 elsewhere)."""
    enabled = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
