"""The global random state of a run: every noise that training draws comes from torch's global generators."""

import torch
from torch import Tensor

from hrs.gpu import gpu_of


def get_rng(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the CPU's generator (``cpu``) and of the GPU's (``cuda``); uint8 tensors on the CPU."""
    states = {"cpu": torch.get_rng_state()}
    gpu = gpu_of(device)
    if gpu is not None:
        states["cuda"] = gpu.get_rng_state()
    return states


def set_rng(states: dict[str, Tensor], device: torch.device) -> None:
    """Restore what :func:`get_rng` returned; a GPU's generator keeps its state if ``states`` are of a run without."""
    torch.set_rng_state(states["cpu"])
    gpu = gpu_of(device)
    if gpu is not None and "cuda" in states:
        gpu.set_rng_state(states["cuda"])
