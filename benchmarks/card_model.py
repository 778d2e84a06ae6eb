"""Model the speed of training and decoding steps on GPUs that are not at hand: kernels, bytes, and a roofline.

    python -m benchmarks.card_model                     # training steps, then decoding steps: an RTX 4080, an H100
    python -m benchmarks.card_model --scales small --presets dense_baseline,full_hrs

The model is that of the planner (:mod:`hrs.training.gpu_time`). Training steps are traced on fake tensors, decoding
steps on real tensors of a small model. Each row is printed for the present loss and for the loss that is kept as the
reference (logits of one chunk at a time, computed a second time in the backward pass), so that the ratio of the two
comes from one run.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hrs.training.step
from hrs.config import ExperimentConfig
from hrs.generation import ContinuousBatch, Sampling
from hrs.models import build_model
from hrs.presets import experiment
from hrs.training import gpu_time
from hrs.training.gpu_time import GpuSpeed, KernelTrace, TrainingTrace, model_step, trace_training

GPUS = {
    "RTX 4080": GpuSpeed(half_flops=97.5e12, single_flops=48.7e12, bytes_per_second=717e9),
    "H100 SXM": GpuSpeed(half_flops=989e12, single_flops=494e12, bytes_per_second=3350e9),
}


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


def trace_reference(config: ExperimentConfig, micro_batch: int) -> TrainingTrace:
    """Trace a training step with :func:`reference_cross_entropy`."""
    present = hrs.training.step.cross_entropy
    hrs.training.step.cross_entropy = reference_cross_entropy  # type: ignore[assignment]
    gpu_time._trace_training.cache_clear()
    try:
        return trace_training(config, micro_batch)
    finally:
        hrs.training.step.cross_entropy = present
        gpu_time._trace_training.cache_clear()


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
    before = trace_reference(config, micro_batch)
    print(f"\n{preset} at {scale}, one training step of {micro_batch} windows, {tokens:,} tokens")
    print(
        f"{'GPU':10}{'loss':12}{'mode':10}{'kernels':>9}{'GB':>9}{'TFLOP':>8}{'ms':>9}{'tokens/s':>12}{'MFU':>6}{'ratio':>7}"
    )
    for name, gpu in GPUS.items():
        first: float | None = None
        for loss, mode, trace in (
            ("reference", "eager", before),
            ("present", "eager", now),
            ("present", "compiled", now),
        ):
            step = model_step(trace.kernels, gpu, compiled=mode == "compiled")
            first = first or step.seconds
            useful = model_step(now.kernels, gpu, compiled=False).flops
            print(
                f"{name:10}{loss:12}{mode:10}{step.kernels:>9,}{step.bytes / 1e9:>9.2f}{step.flops / 1e12:>8.2f}"
                f"{1e3 * step.seconds:>9.2f}{tokens / step.seconds:>12,.0f}"
                f"{useful / step.seconds / gpu.half_flops:>6.2f}{step.seconds / first:>7.2f}"
            )
    print(f"operators for which the host waits in it: {', '.join(now.syncs) or 'none'}")


def report_decoding(presets: Sequence[str], scale: str, texts: int) -> None:
    """Print kernels and waits of one decoding step of several texts."""
    print(f"\none decoding step of {texts} texts at {scale}, sampling included")
    print(
        f"{'preset':24}{'kernels':>9}{'model calls':>13}{'waits':>7}" + "".join(f"{name + ', ms':>16}" for name in GPUS)
    )
    for preset in presets:
        trace, calls = trace_decoding(preset, scale, texts)
        times = [1e3 * model_step(trace.kernels, gpu, compiled=False).seconds for gpu in GPUS.values()]
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
