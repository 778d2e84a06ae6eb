"""Model the speed of training and decoding steps on GPUs that are not at hand: kernels, bytes, and a roofline.

    python -m benchmarks.card_model                     # training steps, then decoding steps: an RTX 4080, an H100
    python -m benchmarks.card_model --scales small --presets dense_baseline,full_hrs

One step of the real training code runs on fake tensors (no memory, no arithmetic) under a dispatch mode that records
every operator which would launch a kernel: the bytes it reads and writes, its floating-point operations, and what it
depends on. Decoding runs on real tensors of a small model. From these records the time of a step is modelled twice:

- *eager*: every operator is a kernel; it takes the longer of its bytes over the memory bandwidth and its operations
  over the arithmetic peak, and the step cannot be faster than Python launches the kernels.
- *compiled*: element-wise operators and reductions that follow each other are fused as ``torch.compile`` does; what
  stays inside a fused kernel is not written to memory.

Each row is printed for the present loss and for the loss that is kept as the reference (logits of one chunk at a time,
computed a second time in the backward pass), so that the ratio of the two comes from one run. The figures are a model:
caches are ignored, so the bytes of small steps count too much, and no kernel is better than the efficiencies below.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

import hrs.training.step
from hrs.config import ExperimentConfig
from hrs.generation import ContinuousBatch, Sampling
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment
from hrs.training.lazy_adamw import lazy_parameters
from hrs.training.loss import GPU_CHUNKING
from hrs.training.memory_imitation import ImitateCuda
from hrs.training.memory_sparse import empty_gradient
from hrs.training.memory_step import context_of
from hrs.training.optimizer import build_optimizer, clip_gradients, gradient_norm
from hrs.training.step import Stepper


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU as its data sheet describes it, and the share of each peak that good kernels reach."""

    name: str
    half_flops: float
    """Dense bfloat16 products per second with float32 accumulation, times two."""
    single_flops: float
    """The same in float32, with TF32 tensor cores."""
    bytes_per_second: float
    efficiency: float = 0.75
    kernel_seconds: float = 2e-6
    """Shortest time of one kernel."""
    launch_seconds: float = 6e-6
    """Python and PyTorch's dispatcher, per eager operator."""
    compiled_launch_seconds: float = 2.5e-6


CARDS = (
    Card(name="RTX 4080", half_flops=97.5e12, single_flops=48.7e12, bytes_per_second=717e9),
    Card(name="H100 SXM", half_flops=989e12, single_flops=494e12, bytes_per_second=3350e9),
)


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


@torch.library.custom_op("card_model::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    raise RuntimeError("for fake tensors only")


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("card_model::attention_backward", mutates_args=())
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
class Modelled:
    """One step on one GPU."""

    kernels: int
    gigabytes: float
    teraflops: float
    seconds: float


def model_step(kernels: Sequence[Kernel], card: Card, *, compiled: bool) -> Modelled:
    """Return the modelled time of a step: the longer of what the GPU computes and what the host launches."""
    if compiled:
        kernels = fuse(kernels)
    busy = n_bytes = flops = 0.0
    for kernel in kernels:
        moved = sum(kernel.reads.values()) + sum(kernel.writes.values())
        peak = card.half_flops if kernel.half else card.single_flops
        seconds = max(moved / card.bytes_per_second, kernel.flops / peak) / card.efficiency
        busy += max(seconds, card.kernel_seconds)
        n_bytes, flops = n_bytes + moved, flops + kernel.flops
    launching = len(kernels) * (card.compiled_launch_seconds if compiled else card.launch_seconds)
    return Modelled(kernels=len(kernels), gigabytes=n_bytes / 1e9, teraflops=flops / 1e12, seconds=max(busy, launching))


# ---- what is traced --------------------------------------------------------------------------------------------------


def reference_cross_entropy(
    unembed: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    chunk_logits: int = 2**24,
    **_: Any,
) -> Tensor:
    """Return the mean cross-entropy by the plain chunked loss: each chunk's logits are computed again going back."""
    rows, labels = hidden.flatten(0, 1), targets.flatten()

    def summed(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(unembed(rows).float(), labels, label_smoothing=label_smoothing, reduction="sum")

    size = max(1, chunk_logits // vocab_size)
    total = rows.new_zeros((), dtype=torch.float32)
    for part, ids in zip(rows.split(size), labels.split(size), strict=True):
        total = total + checkpoint(summed, part, ids, use_reentrant=False, preserve_rng_state=False)
    return total / len(rows)


def trace_training(config: ExperimentConfig, micro_batch: int, *, reference_loss: bool = False) -> KernelTrace:
    """Record one whole training step of ``config``: gradients of one micro-batch, clipping, AdamW."""
    trace = KernelTrace()
    training = dataclasses.replace(config.training, precision="bf16", batch_sequences=micro_batch)
    present = hrs.training.step.cross_entropy
    with FakeTensorMode():
        model = build_model(config.model).train()
        imitation = _OneKernelAttention()
        imitation.cover(model)
        optimizer = build_optimizer(model, training.optimizer)
        stepper = Stepper(model, optimizer, training, torch.device("cpu"), micro_batch, chunking=GPU_CHUNKING)
        windows = torch.zeros(micro_batch, config.model.max_seq_len + 1, dtype=torch.int64)
        context = context_of(model, micro_batch)
        _make_moments(model, optimizer)
        if reference_loss:
            hrs.training.step.cross_entropy = reference_cross_entropy  # type: ignore[assignment]
        try:
            with trace:
                with imitation:
                    stepper.accumulate(windows, context)
                clip_gradients(optimizer, training.optimizer.clip_norm, gradient_norm(optimizer))
                optimizer.step()
        finally:
            hrs.training.step.cross_entropy = present
    return trace


def _make_moments(model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer create its state, which only the first step of a run does."""
    tables = {id(p) for p in lazy_parameters(optimizer)}
    for parameter in model.parameters():
        parameter.grad = empty_gradient(parameter, lazy=id(parameter) in tables)
    optimizer.step()
    optimizer.zero_grad()


def trace_decoding(preset: str, scale: str, texts: int) -> tuple[KernelTrace, int]:
    """Record the decoding of ``texts`` texts by a real small model; the trace of one step and model calls in it."""
    torch.manual_seed(0)
    model = build_model(experiment(preset, scale).model).eval()
    batch = ContinuousBatch(model, n_slots=texts)
    for length in range(4, 4 + texts):  # of unequal length, as they are at an endpoint
        prompt = torch.randint(model.vocab_size, (length,)).tolist()
        batch.add(prompt, Sampling(temperature=0.9, top_k=50, max_new_tokens=16))
    while len(batch.step()) < texts:
        pass
    batch.step()
    calls = 0
    decode = model.decode

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return decode(*args, **kwargs)

    model.decode = counted  # type: ignore[method-assign]
    with KernelTrace() as trace:
        batch.step()
    return trace, calls


# ---- for people ------------------------------------------------------------------------------------------------------


def report_training(preset: str, scale: str, micro_batch: int) -> None:
    """Print one block of modelled training steps."""
    config = experiment(preset, scale)
    tokens = micro_batch * config.model.max_seq_len
    now = trace_training(config, micro_batch)
    before = trace_training(config, micro_batch, reference_loss=True)
    print(f"\n{preset} at {scale}, one training step of {micro_batch} windows, {tokens:,} tokens")
    print(
        f"{'GPU':10}{'loss':12}{'mode':10}{'kernels':>9}{'GB':>9}{'TFLOP':>8}{'ms':>9}{'tokens/s':>12}{'MFU':>6}{'ratio':>7}"
    )
    for card in CARDS:
        first: float | None = None
        for loss, mode, trace in (
            ("reference", "eager", before),
            ("present", "eager", now),
            ("present", "compiled", now),
        ):
            step = model_step(trace.kernels, card, compiled=mode == "compiled")
            first = first or step.seconds
            useful = model_step(now.kernels, card, compiled=False).teraflops * 1e12
            print(
                f"{card.name:10}{loss:12}{mode:10}{step.kernels:>9,}{step.gigabytes:>9.2f}{step.teraflops:>8.2f}"
                f"{1e3 * step.seconds:>9.2f}{tokens / step.seconds:>12,.0f}"
                f"{useful / step.seconds / card.half_flops:>6.2f}{step.seconds / first:>7.2f}"
            )
    print(f"operators for which the host waits in it: {', '.join(now.syncs) or 'none'}")


def report_decoding(presets: Sequence[str], scale: str, texts: int) -> None:
    """Print kernels and waits of one decoding step of several texts."""
    print(f"\none decoding step of {texts} texts at {scale}, sampling included")
    print(
        f"{'preset':24}{'kernels':>9}{'model calls':>13}{'waits':>7}" + "".join(f"{c.name + ', ms':>16}" for c in CARDS)
    )
    for preset in presets:
        trace, calls = trace_decoding(preset, scale, texts)
        times = [1e3 * model_step(trace.kernels, card, compiled=False).seconds for card in CARDS]
        print(
            f"{preset:24}{len(trace.kernels):>9,}{calls:>13}{len(trace.syncs):>7}"
            + "".join(f"{t:>16.2f}" for t in times)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="dense_baseline", help="comma-separated, of training")
    parser.add_argument("--scales", default="paper,small,tiny", help="comma-separated, of training")
    parser.add_argument("--micro-batch", type=int, default=48, help="windows per training step")
    parser.add_argument("--decode", default="dense_baseline,full_hrs,v17_peer_only", help="presets of decoding")
    parser.add_argument("--texts", type=int, default=8, help="texts that decode together")
    args = parser.parse_args()
    for scale in args.scales.split(","):
        for preset in args.presets.split(","):
            report_training(preset, scale, args.micro_batch)
    report_decoding(args.decode.split(","), "micro", args.texts)


if __name__ == "__main__":
    main()
