"""How much memory a training step will take, before it is run; and the largest micro-batch that fits a card.

The step is traced on fake tensors: shapes and lifetimes are those of the real code, no number is computed. For a CUDA
device :class:`hrs.training.memory_imitation.ImitateCuda` makes the fake tensors cost what the card's kernels would keep
(fused attention, byte masks of dropout, CUDA's autocast rules); storages are rounded up to the caching allocator's
blocks, and :data:`CUDA_OVERHEAD_BYTES` is added for everything that allocator does not hand out. Fragmentation is not
predicted, but :func:`reserved_bytes` leaves room for it. For the CPU the trace is exact up to the scratch space inside
kernels: where oneDNN multiplies (:mod:`hrs.nn.products`) that was 12 % of the growth with the micro-batch.

Every parameter is taken to learn: phases in which some rest only make a step smaller. A compiled step is predicted as
an eager one.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hrs.config import ExperimentConfig, ModelConfig, TrainingConfig
from hrs.errors import HRSError
from hrs.gpu import gpu_of, has_gpu
from hrs.training.memory_step import training_step_peak
from hrs.training.memory_trace import StorageCounter
from hrs.training.runtime import Runtime

CUDA_OVERHEAD_BYTES = 640 * 2**20
"""Room for the CUDA context with its loaded kernels (several hundred MiB, by driver and card), cuBLAS workspaces (at
most 32 MiB per stream) and half-used segments of the caching allocator. An allowance, not a prediction."""

CUDA_BLOCK_BYTES = 512
"""The caching allocator rounds every request up to a multiple of this."""

FRAGMENTATION_FRAC = 0.08
"""Room for what the allocator cannot use between tensors, as a share of the predicted peak. A replay of traced steps
through torch's growing segments (pages of 2 and 20 MiB) needs 2 to 5 % of the predicted peak beyond its tensors; the
rest is for what one step does not show: validation, evaluation, and steps that differ."""

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes at the highest point of one training step; ``peak_bytes`` is the sum of the others."""

    peak_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Everything else that a tensor holds: activations, inputs, temporaries of the backward pass."""
    average_bytes: int
    """Averages of the weights; on the CPU also the one that is kept, without its buffers."""
    overhead_bytes: int
    """The card's own; 0 on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """How one effective batch is cut so that it fits: ``micro_batch * accumulation`` windows per step."""

    micro_batch: int
    accumulation: int
    peak_bytes: int


def estimate_peak(config: ExperimentConfig, micro_batch: int, runtime: Runtime) -> MemoryEstimate:
    """The highest memory use of one training step of ``config`` at ``micro_batch`` windows per forward pass.

    A CUDA device need not be there: ``Runtime(device="cuda")`` plans for a card from a machine without one.

    Raises:
        HRSError: if ``micro_batch`` does not divide the effective batch.
    """
    step = _traced(config, micro_batch, runtime)
    n_averages = len(config.training.averaging.decays)
    n_kept = 0 if step.overhead_bytes else min(1, n_averages)
    average_bytes = (n_averages + n_kept) * step.parameter_bytes
    return replace(step, peak_bytes=step.peak_bytes + average_bytes, average_bytes=average_bytes)


def _traced(config: ExperimentConfig, micro_batch: int, runtime: Runtime) -> MemoryEstimate:
    batch = config.training.batch_sequences
    if micro_batch < 1 or batch % micro_batch:
        raise HRSError(f"micro_batch {micro_batch} must divide training.batch_sequences {batch}")
    on_cuda = _on_gpu(runtime)
    precision = config.training.precision
    half = precision in ("bf16", "fp16") or (precision == "auto" and on_cuda)
    # Only what shapes a step is left in the key, so that a whole study shares its traces.
    training = TrainingConfig(
        precision="bf16" if half else "fp32",  # fp16 takes as many bytes
        label_smoothing=config.training.label_smoothing,
        optimizer=config.training.optimizer,
    )
    n_micro_batches = batch // micro_batch
    if training.optimizer.expert_updates == "dense":
        n_micro_batches = min(2, n_micro_batches)
    return _trace(config.model, training, micro_batch, n_micro_batches, on_cuda, runtime.activation_checkpointing)


def predict_peak(config: ExperimentConfig, micro_batch: int, runtime: Runtime) -> int:
    """Bytes a device must have for one training step of ``config``; see :func:`estimate_peak`."""
    return estimate_peak(config, micro_batch, runtime).peak_bytes


def reserved_bytes(peak_bytes: int) -> int:
    """Return what a GPU must have for a process whose predicted peak is ``peak_bytes``: with room for fragmentation."""
    return peak_bytes + int(FRAGMENTATION_FRAC * peak_bytes)


def _on_gpu(runtime: Runtime) -> bool:
    """True if ``runtime`` means a GPU, here or elsewhere; opens none."""
    return runtime.device.startswith("cuda") or (runtime.device == "auto" and has_gpu())


def _required_bytes(config: ExperimentConfig, micro_batch: int, runtime: Runtime) -> int:
    peak_bytes = predict_peak(config, micro_batch, runtime)
    return reserved_bytes(peak_bytes) if _on_gpu(runtime) else peak_bytes


@cache
def _trace(
    model_config: ModelConfig,
    training: TrainingConfig,
    micro_batch: int,
    n_micro_batches: int,
    on_cuda: bool,
    activation_checkpointing: bool,
) -> MemoryEstimate:
    counter = StorageCounter(block_bytes=CUDA_BLOCK_BYTES if on_cuda else 1)
    with FakeTensorMode(), counter:
        top = training_step_peak(
            counter,
            model_config,
            training,
            micro_batch,
            n_micro_batches,
            activation_checkpointing=activation_checkpointing,
            imitate_cuda=on_cuda,
        )
    overhead_bytes = CUDA_OVERHEAD_BYTES if on_cuda else 0
    return MemoryEstimate(
        peak_bytes=top.bytes + overhead_bytes,
        parameter_bytes=top.by_category["parameters"],
        gradient_bytes=top.by_category["gradients"],
        optimizer_bytes=top.by_category["optimizer"],
        activation_bytes=top.by_category["activations"],
        average_bytes=0,  # told apart by the caller, so that runs with and without them share a trace
        overhead_bytes=overhead_bytes,
    )


def fit_micro_batch(config: ExperimentConfig, limit_bytes: int, runtime: Runtime) -> MemoryPlan:
    """Return the largest divisor of the effective batch whose step fits ``limit_bytes``, on a GPU with room for
    fragmentation (:func:`reserved_bytes`).

    Raises:
        HRSError: if not even one window at a time fits.
    """
    whole = config.training.batch_sequences
    batch = whole // config.training.sharing.workers  # no micro-batch reaches over the border of a worker's part
    # The undivided batch is apart: its gradients need not outlive a micro-batch, so it may fit where its half does not.
    if _required_bytes(config, batch, runtime) <= limit_bytes:
        peak_bytes = predict_peak(config, batch, runtime)
        return MemoryPlan(micro_batch=batch, accumulation=whole // batch, peak_bytes=peak_bytes)
    divisors = [n for n in range(1, batch) if batch % n == 0]
    low, high = 0, len(divisors)  # divisors[:low] fit, divisors[high:] do not
    while low < high:
        middle = (low + high) // 2
        if _required_bytes(config, divisors[middle], runtime) <= limit_bytes:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        raise HRSError(_too_large(config, limit_bytes, runtime))
    fitting = divisors[low - 1]
    peak_bytes = predict_peak(config, fitting, runtime)
    return MemoryPlan(micro_batch=fitting, accumulation=whole // fitting, peak_bytes=peak_bytes)


def _too_large(config: ExperimentConfig, limit_bytes: int, runtime: Runtime) -> str:
    needed = _required_bytes(config, 1, runtime) / GIB
    where = "GPU" if _on_gpu(runtime) else "machine"
    fact = (
        f"{config.preset} at scale {config.scale} needs {needed:.2f} GiB at micro-batch 1 "
        f"and the {where} has {limit_bytes / GIB:.2f} GiB free"
    )
    if runtime.activation_checkpointing:
        return f"{fact}: choose a smaller scale"
    checkpointed = _required_bytes(config, 1, replace(runtime, activation_checkpointing=True))
    if checkpointed > limit_bytes:
        return (
            f"{fact}: choose a smaller scale (activation checkpointing would still need {checkpointed / GIB:.2f} GiB)"
        )
    return (
        f"{fact}: choose a smaller scale, or turn on activation checkpointing (would need {checkpointed / GIB:.2f} GiB)"
    )


def card_fraction(peak_bytes: int, card_bytes: int) -> float:
    """Return the share of a GPU to reserve for a trial, in hundredths: :func:`reserved_bytes`, rounded up, so that
    shares which sum to 1 fit; at most 1."""
    hundredths = -(-100 * reserved_bytes(peak_bytes) // card_bytes)
    return min(max(hundredths, 1), 100) / 100


class AllocatorLimit(StorageCounter):
    """Context manager that gives the CPU a memory limit: an operator that goes beyond it raises torch.OutOfMemoryError.

    Counts the tensors that operators touch inside it, in forward, backward and optimiser, so that handling of
    out-of-memory errors can be tested without a card.
    """

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes=limit_bytes)


def cap_process_memory(card_frac: float, device: torch.device) -> None:
    """Keep this process to its share of the GPU ``device``; what goes beyond raises torch.OutOfMemoryError.

    Only PyTorch's allocator can be capped. The CUDA context and libraries allocate outside of it, so
    :data:`CUDA_OVERHEAD_BYTES` of the share are left to them. Does nothing for the CPU.
    """
    gpu = gpu_of(device)
    if gpu is not None:
        gpu.cap_memory(int(card_frac * gpu.properties.total_bytes) - CUDA_OVERHEAD_BYTES)
