"""Attention kernels fused against the same kernels by explicit scores, forward and backward, on the CPU or one GPU.

    python -m benchmarks.kernel_attention --length 512 --threads 1

One layer per kernel (and ALiBi with the dot product) takes both ways in alternation on the same input, so that other
load on the machine meets both alike. Prints median milliseconds, explicit / fused, and fused against the fused dot
product. Kernels that cannot run fused are shown by scores alone.
"""

import argparse
import statistics
import time
from typing import get_args, get_type_hints

import torch

from hrs.config import AttentionConfig, ModelConfig
from hrs.gpu import synchronize
from hrs.nn.attention import Attention
from hrs.training import Runtime


def layer_of(kernel: str, positions: str, args: argparse.Namespace) -> Attention:
    """One attention layer of the asked shape."""
    torch.manual_seed(0)
    attention = AttentionConfig(kernel=kernel, positions=positions)  # type: ignore[arg-type]
    config = ModelConfig(d_model=args.d_model, n_heads=args.heads, dropout=0.0, attention=attention)
    return Attention(config, n_positions=args.length)


def seconds_of(layer: Attention, x: torch.Tensor, *, fused: bool) -> float:
    """Seconds of one forward and backward pass."""
    layer.fused = fused
    positions = torch.arange(x.shape[1], device=x.device)
    synchronize(x.device)
    start = time.perf_counter()
    layer(x, positions).sum().backward()
    synchronize(x.device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--d-model", type=int, default=256, help="width")
    parser.add_argument("--heads", type=int, default=4, help="heads")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15, help="timed passes of each way")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = Runtime().torch_device()
    x = torch.randn(args.batch, args.length, args.d_model, device=device, requires_grad=True)
    cases = [(kernel, "rotary") for kernel in get_args(get_type_hints(AttentionConfig)["kernel"])] + [("dot", "alibi")]
    ways: dict[tuple[str, str, bool], Attention] = {}
    for kernel, positions in cases:
        layer = layer_of(kernel, positions, args).to(device)
        ways |= {(kernel, positions, fused): layer for fused in (True, False) if layer.fused or not fused}
    taken: dict[tuple[str, str, bool], list[float]] = {way: [] for way in ways}
    for i in range(args.repeats + 2):
        for way, layer in ways.items():
            elapsed = seconds_of(layer, x, fused=way[2])
            if i >= 2:  # after the warm-up
                taken[way].append(elapsed)
    median = {way: 1000 * statistics.median(times) for way, times in taken.items()}
    shape = f"batch={args.batch} length={args.length} d_model={args.d_model} heads={args.heads}"
    print(f"{shape} device={device} threads={args.threads}, medians of {args.repeats}, milliseconds")
    print(f"{'kernel':18} {'positions':10} {'fused':>8} {'scores':>8} {'scores/fused':>13} {'fused/dot':>10}")
    for kernel, positions in cases:
        slow, fast = median[kernel, positions, False], median.get((kernel, positions, True))
        head = f"{kernel:18} {positions:10}"
        if fast is None:
            print(f"{head} {'-':>8} {slow:8.1f} {'-':>13} {'-':>10}")
        else:
            print(f"{head} {fast:8.1f} {slow:8.1f} {slow / fast:13.2f} {fast / median['dot', 'rotary', True]:10.2f}")


if __name__ == "__main__":
    main()
