"""Which GPU a replica runs on: planned by the process that starts the endpoint, obeyed by the replica.

Who reserves no GPU uses the CPU: Ray hides no GPU from a process that asked for none, so the reservation decides, not
what torch finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hrs.errors import HRSError
from hrs.export.opening import OpenedModel
from hrs.gpu import GpuProperties, open_gpu, probe_gpus
from hrs.models import LanguageModel
from hrs.training.memory import CUDA_OVERHEAD_BYTES, GIB
from serve.settings import Settings

_SHARE_STEPS = 10_000
"""Ray counts fractions of a GPU in steps of 0.0001."""
_LOGIT_BYTES = 2 * 4 * 2**24
"""Logits of a piece of a prompt and their copy in float32, see :mod:`hrs.generation.batching`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What every replica reserves."""

    gpus: tuple[int, ...]
    """The GPUs that replicas may use, by index among those of this process; none for the CPU."""
    share: float
    """Of a GPU, for each replica; as many as run on one GPU fit into it exactly. 0 for the CPU."""


def place(n_replicas: int, replica_bytes: int, gpus: Sequence[GpuProperties]) -> Placement:
    """Spread replicas over GPUs: as few on each as possible, and only on those with room for that many.

    Args:
        replica_bytes: what one replica needs of a GPU's free memory.

    Raises:
        HRSError: if there is not room for all replicas.
    """
    rooms = {gpu.index: gpu.free_bytes // replica_bytes for gpu in gpus}
    for tenants in range(1, n_replicas + 1):
        roomy = tuple(index for index, room in rooms.items() if room >= tenants)
        if len(roomy) * tenants >= n_replicas:
            return Placement(gpus=roomy, share=_SHARE_STEPS // tenants / _SHARE_STEPS)
    free = ", ".join(f"{gpu.free_bytes / GIB:.1f}" for gpu in gpus)
    what = "a replica of this model" if n_replicas == 1 else f"each of {n_replicas} replicas of this model"
    raise HRSError(
        f"{what} needs about {replica_bytes / GIB:.1f} GiB of a GPU, and {free} GiB are free: give fewer --replicas or "
        "--slots, end what else uses the GPUs, or say --device cpu"
    )


def place_replicas(settings: Settings, opened: OpenedModel) -> Placement:
    """Plan for the GPUs of this machine, which are looked at by another process: this one opens no CUDA.

    Raises:
        HRSError: if a GPU is asked for and there is none, torch cannot use those there are, or the replicas do not fit.
    """
    gpus = () if settings.device == "cpu" else probe_gpus()
    if gpus:
        n_bytes = estimate_replica_bytes(opened.model, opened.config.model.n_layers, settings.slots)
        return place(settings.max_replicas, n_bytes, gpus)
    if settings.device == "cuda":
        raise HRSError("there is no GPU on this machine that torch can use: leave --device away, or say --device cpu")
    return Placement(gpus=(), share=0.0)


def estimate_replica_bytes(model: LanguageModel, n_layers: int, slots: int) -> int:
    """Estimate what a replica takes of a GPU: weights, keys and values of full slots, logits, and CUDA's own.

    Keys and values are counted as wide as the model for every layer and in the weights' type, which is no less than any
    model of this library keeps for attention.
    """
    tensors = (*model.parameters(), *model.buffers())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    width = next(model.parameters()).element_size()
    cache = 2 * slots * n_layers * model.max_seq_len * model.d_model * width
    return weights + cache + _LOGIT_BYTES + CUDA_OVERHEAD_BYTES


def visible_devices(placement: Placement, visible: str | None) -> str:
    """Return ``CUDA_VISIBLE_DEVICES`` for a Ray that shall use the placement's GPUs only.

    Args:
        visible: the variable in this process, which numbers the GPUs of the placement; None if it is not set.
    """
    names = None if visible is None else [name.strip() for name in visible.split(",")]
    return ",".join(str(index) if names is None else names[index] for index in placement.gpus)


def replica_device(settings: Settings) -> torch.device:
    """Return the device of this replica: the GPU that it reserved, within its share of the memory, or the CPU.

    Ray lets a replica see only the GPU that it reserved, so that is the first one. Where Ray's GPUs are only numbers,
    on a machine without any, ``auto`` is the CPU.

    Raises:
        HRSError: if the GPU cannot be used.
    """
    if not settings.reserves_gpu:
        return torch.device("cpu")
    gpu = open_gpu(settings.device)
    if gpu is None:
        return torch.device("cpu")
    if settings.gpus_per_replica < 1:
        share_bytes = int(settings.gpus_per_replica * gpu.properties.total_bytes)
        gpu.cap_memory(share_bytes - CUDA_OVERHEAD_BYTES)
    return gpu.device
