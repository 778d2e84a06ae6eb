"""How long a training step takes on a GPU, from its kernels: a roofline model (Williams et al. 2009).

One step of the real training code runs on fake tensors (no memory, no arithmetic) under a dispatch mode that records
every operator which would launch a kernel: the bytes it reads and writes, its floating-point operations, and what it
depends on. From these records the time of a step is modelled in two ways:

- *eager*: every operator is a kernel; it takes the longer of its bytes over the memory bandwidth and its operations
  over the arithmetic peak, and the step cannot be faster than Python launches the kernels.
- *compiled*: element-wise operators and reductions that follow each other are fused as ``torch.compile`` does; what
  stays inside a fused kernel is not written to memory.

Caches are ignored, so the bytes of small steps count too much, and no kernel is better than the efficiencies of
:class:`GpuSpeed`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from hrs.config import ExperimentConfig, ModelConfig, TrainingConfig
from hrs.models import LanguageModel, build_model
from hrs.training.activations import checkpoint_activations
from hrs.training.lazy_adamw import lazy_parameters
from hrs.training.loss import GPU_CHUNKING
from hrs.training.memory_imitation import ImitateCuda
from hrs.training.memory_sparse import empty_gradient
from hrs.training.memory_step import context_of
from hrs.training.optimizer import build_optimizer, clip_gradients, gradient_norm
from hrs.training.step import Stepper


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuSpeed:
    """A GPU as its data sheet describes it, and the share of each peak that good kernels reach."""

    half_flops: float
    """Dense half-precision products per second with float32 accumulation, times two."""
    single_flops: float
    """The same in float32, with TF32 tensor cores where there are any."""
    bytes_per_second: float
    arithmetic_efficiency: float = 0.6
    bandwidth_efficiency: float = 0.75
    kernel_seconds: float = 2e-6
    """Shortest time from the start of one kernel to the start of the next."""
    launch_seconds: float = 6e-6
    """Python and PyTorch's dispatcher, per eager operator."""
    compiled_launch_seconds: float = 2.5e-6


# ---- recording -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Kernel:
    """One operator that launches a kernel."""

    name: str
    flops: int
    half: bool
    """True if its products are computed in half precision."""
    fusible: bool
    reads: dict[int, int] = field(default_factory=dict)
    """Bytes by storage."""
    writes: dict[int, int] = field(default_factory=dict)


_FREE = {
    "_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided",
    "promote_types", "set_",
}  # fmt: skip
"""Operators besides views that launch nothing."""
_FUSED_BY_COMPILERS = {
    "_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data", "_to_copy", "amax", "argmax",
    "cat", "clone", "copy_", "cumsum", "embedding", "fill_", "full", "gather", "index", "index_select", "logsumexp",
    "masked_fill", "masked_fill_", "mean", "native_dropout", "native_dropout_backward", "native_layer_norm",
    "native_layer_norm_backward", "new_zeros", "nll_loss_backward", "nll_loss_forward", "ones_like", "stack", "sum",
    "zeros", "zeros_like",
}  # fmt: skip
"""Operators besides the element-wise ones that ``torch.compile`` fuses with their neighbours."""
_LOOK_UPS = {"embedding", "gather", "index", "index_select", "nll_loss_forward"}
"""Operators that read chosen rows of a table, not all of it."""
_SYNCS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_unique2", "unique_consecutive"}
"""Operators for which the host waits."""


class _Waits(TorchFunctionMode):
    """Record the calls that read a tensor's values on the host, which on the CPU never reach the dispatcher."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "cpu", "__array__"):
            self._found.append(name)
        return func(*args, **(kwargs or {}))


class KernelTrace(TorchDispatchMode):
    """Record the operators that would launch kernels, and those that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.syncs: list[str] = []
        self._alive: list[Any] = []  # so that no storage's address is used twice
        self._waits = _Waits(self.syncs)

    def __enter__(self) -> "KernelTrace":
        self._waits.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._waits.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if name in _SYNCS:
            self.syncs.append(name)
        if launches_kernel(func):
            self._record(func, name, args, kwargs or {}, result)
        return result

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(result))
        written = outputs or [t for t, a in zip(args, func._schema.arguments, strict=False) if a.alias_info]
        formula = flop_registry.get(func.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=result)) if formula else _attention_flops(name, args)
        kernel = Kernel(
            name=name,
            flops=flops,
            half=any(t.dtype in (torch.bfloat16, torch.float16) for t in inputs),
            fusible=torch.Tag.pointwise in func.tags or name in _FUSED_BY_COMPILERS,
        )
        for tensor in inputs:
            kernel.reads[self._storage(tensor)] = _bytes(tensor, rows=_rows_read(name, tensor, outputs))
        for tensor in _tensors(written):
            kernel.writes[self._storage(tensor)] = _bytes(tensor)
        self.kernels.append(kernel)

    def _storage(self, tensor: Tensor) -> int:
        if tensor.layout is not torch.strided:
            self._alive.append(tensor)
            return id(tensor)
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        return int(storage._cdata)


def launches_kernel(func: Any) -> bool:
    """True if an ATen operator computes something: views and allocations cost nothing on a GPU."""
    namespace, name = func._schema.name.split("::")
    if name in _FREE or name.startswith("sym_") or namespace in ("prim", "profiler"):
        return False
    returns = func._schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return not is_view


def _tensors(values: Any) -> Iterable[Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, Tensor))


def _bytes(tensor: Tensor, rows: int | None = None) -> int:
    if tensor.layout is not torch.strided:
        return sum(_bytes(part) for part in (tensor._indices(), tensor._values()))
    # An expanded tensor has fewer bytes than elements.
    elements = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    if rows is not None and tensor.ndim:
        elements = min(elements, rows * math.prod(tensor.shape[1:]))
    return elements * tensor.element_size()


def _rows_read(name: str, tensor: Tensor, outputs: Sequence[Tensor]) -> int | None:
    """Rows of a table that a look-up reads; None for all."""
    if name not in _LOOK_UPS or not tensor.is_floating_point() or not outputs:
        return None
    return max(1, math.prod(outputs[0].shape[:-1])) if name != "nll_loss_forward" else 1


def _attention_flops(name: str, args: Any) -> int:
    if name not in ("attention", "attention_backward"):
        return 0
    query, key = (args[1], args[2]) if name == "attention_backward" else (args[0], args[1])
    causal = args[-1]
    products = 4 * query.numel() * key.shape[-2] // (2 if causal else 1)
    return products if name == "attention" else products * 5 // 2


# ---- attention as one kernel -----------------------------------------------------------------------------------------


@torch.library.custom_op("hrs_gpu_time::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    raise RuntimeError("for fake tensors only")


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("hrs_gpu_time::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum_exp: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    raise RuntimeError("for fake tensors only")


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum_exp: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, _, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, *output)


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.causal), None, None


_attention.register_autograd(_gradient, setup_context=_save)


class _OneKernelAttention(ImitateCuda):
    """CUDA's rules for fake CPU tensors, with attention recorded as the one kernel that it is there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return _attention(query, key, value, attn_mask, is_causal)[0]


# ---- modelling -------------------------------------------------------------------------------------------------------


def fuse(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Merge fusible kernels as a compiler would.

    A fusible kernel joins the group of a producer if all its other inputs existed before that group began, so that the
    whole group can run at its place. What only the group itself reads is not written.
    """
    born: dict[int, int] = {}  # storage -> index of the kernel that wrote it last
    group_of: dict[int, int] = {}  # index of a kernel -> first kernel of its group
    members: dict[int, list[int]] = {}
    for index, kernel in enumerate(kernels):
        home = index
        if kernel.fusible:
            makers = sorted({group_of[born[s]] for s in kernel.reads if s in born}, reverse=True)
            for group in makers:
                fits = kernels[group].fusible and all(
                    born[s] < group or group_of[born[s]] == group for s in kernel.reads if s in born
                )
                if fits:
                    home = group
                    break
        group_of[index] = home
        members.setdefault(home, []).append(index)
        for storage in kernel.writes:
            born[storage] = index
    readers: dict[int, set[int]] = {}
    for index, kernel in enumerate(kernels):
        for storage in kernel.reads:
            readers.setdefault(storage, set()).add(group_of[index])
    return [_merged(kernels, home, indices, readers) for home, indices in sorted(members.items())]


def _merged(kernels: Sequence[Kernel], home: int, indices: Sequence[int], readers: dict[int, set[int]]) -> Kernel:
    if len(indices) == 1:
        return kernels[home]
    merged = Kernel(name="+".join(kernels[i].name for i in indices), flops=0, half=False, fusible=True)
    for index in indices:
        kernel = kernels[index]
        for storage, n_bytes in kernel.reads.items():
            if storage not in merged.writes:
                merged.reads[storage] = max(n_bytes, merged.reads.get(storage, 0))
        merged.writes |= kernel.writes
    inner = [s for s in merged.writes if readers.get(s, {-1}) == {home}]
    for storage in inner:
        del merged.writes[storage]
    return merged


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelledStep:
    """One step on one GPU."""

    kernels: int
    bytes: float
    flops: float
    seconds: float
    busy_seconds: float
    """How long the GPU computes."""


def model_step(kernels: Sequence[Kernel], gpu: GpuSpeed, *, compiled: bool) -> ModelledStep:
    """Return the modelled time of a step: the longer of what the GPU computes and what the host launches."""
    if compiled:
        kernels = fuse(kernels)
    busy = n_bytes = flops = 0.0
    for kernel in kernels:
        moved = sum(kernel.reads.values()) + sum(kernel.writes.values())
        peak = gpu.half_flops if kernel.half else gpu.single_flops
        moving = moved / (gpu.bytes_per_second * gpu.bandwidth_efficiency)
        busy += max(moving, kernel.flops / (peak * gpu.arithmetic_efficiency), gpu.kernel_seconds)
        n_bytes, flops = n_bytes + moved, flops + kernel.flops
    launching = len(kernels) * (gpu.compiled_launch_seconds if compiled else gpu.launch_seconds)
    return ModelledStep(
        kernels=len(kernels), bytes=n_bytes, flops=flops, seconds=max(busy, launching), busy_seconds=busy
    )


# ---- tracing ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class TrainingTrace:
    """The kernels of one training step with one micro-batch."""

    gradients: list[Kernel]
    """Of the forward and backward pass, which repeat with every micro-batch."""
    update: list[Kernel]
    """Of clipping and of the optimizer."""
    syncs: list[str]
    """Operators for which the host waits."""

    @property
    def kernels(self) -> list[Kernel]:
        """All kernels of a step of one micro-batch."""
        return self.gradients + self.update


def trace_training(
    config: ExperimentConfig, micro_batch: int, *, activation_checkpointing: bool = False
) -> TrainingTrace:
    """Record one whole training step: gradients of ``micro_batch`` windows, clipping, AdamW.

    Products are in bfloat16 unless the config asks for float32.
    """
    training = TrainingConfig(  # what shapes a step, so that a whole study shares its traces
        precision="fp32" if config.training.precision == "fp32" else "bf16",
        batch_sequences=micro_batch,
        label_smoothing=config.training.label_smoothing,
        optimizer=config.training.optimizer,
    )
    return _trace_training(config.model, training, activation_checkpointing)


@cache
def _trace_training(
    model_config: ModelConfig, training: TrainingConfig, activation_checkpointing: bool
) -> TrainingTrace:
    micro_batch = training.batch_sequences
    trace = KernelTrace()
    with FakeTensorMode():
        model = build_model(model_config).train()
        imitation = _OneKernelAttention()
        imitation.cover(model)
        if activation_checkpointing:
            checkpoint_activations(model)
        optimizer = build_optimizer(model, training.optimizer)
        stepper = Stepper(model, optimizer, training, torch.device("cpu"), micro_batch, chunking=GPU_CHUNKING)
        windows = torch.zeros(micro_batch, model_config.max_seq_len + 1, dtype=torch.int64)
        context = context_of(model, micro_batch)
        _make_moments(model, optimizer)
        with trace:
            with imitation:
                stepper.accumulate(windows, context)
            n_gradients = len(trace.kernels)
            clip_gradients(optimizer, training.optimizer.clip_norm, gradient_norm(optimizer))
            optimizer.step()
    return TrainingTrace(trace.kernels[:n_gradients], trace.kernels[n_gradients:], trace.syncs)


def _make_moments(model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer create its state, which only the first step of a run does."""
    tables = {id(p) for p in lazy_parameters(optimizer)}
    for parameter in model.parameters():
        parameter.grad = empty_gradient(parameter, lazy=id(parameter) in tables)
    optimizer.step()
    optimizer.zero_grad()
