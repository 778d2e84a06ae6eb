"""The global random state of a run: every noise that training draws comes from torch's global generators."""

import torch
from torch import Tensor


def get_rng(device: torch.device) -> dict[str, Tensor]:
    """States of the CPU's generator and, on CUDA, of the card's, by device type; uint8 tensors on the CPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what :func:`get_rng` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
