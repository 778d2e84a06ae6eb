"""One PEER layer, forward and backward: without copies of the chosen experts against with them, in time and memory.

    python -m benchmarks.peer --threads 1
    python -m benchmarks.peer --mode paper --threads 1 --steps 3

Defaults: 262,144 experts, width 1,024, 8 heads, top 16, 2,048 tokens, float32, CPU. Prints, for each variant, the
median seconds of alternating passes, and two peaks of memory, both without parameters and inputs, each measured in a
process of its own. ``tensors``: the most bytes of live tensors that are no gradients of parameters; scratch space
inside operators is not seen. ``resident``: the high-water mark of resident memory, scratch space and allocator's waste
included, and also gradients, because how many of them exist at that moment cannot be seen from outside.
Sparse gradients are no tensors of the kind that can be followed, so there only ``resident`` is known.
The reference is ``naive``, which gathers both layers of every chosen expert. Its projections are the fast layer's.

With ``--mode paper`` and PEER-pytorch installed (pip install peer-pytorch) that layer runs, too: the same width,
experts, heads and choices; its heads have keys of their own and its queries no normalisation. ``paper`` needs 16 GB.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from hrs.config import PeerConfig
from hrs.nn import recycled_memory
from hrs.nn.expert_retrieval import retrieve, retrieve_naive
from hrs.nn.peer import Peer
from hrs.training.memory_trace import StorageCounter, peak

REFERENCE, SPARSE = "naive", "sparse gradients"
THEIRS = "PEER-pytorch"
MIB = 2**20


def variants(args: argparse.Namespace) -> list[str]:
    names = ["fast", SPARSE, REFERENCE]
    if args.mode == "paper":
        if find_spec("PEER_pytorch"):
            names.append(THEIRS)
        else:
            print("PEER-pytorch is not installed: no comparison with it")
    return names


def build(variant: str, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    if variant == THEIRS:
        from PEER_pytorch import PEER  # type: ignore[import-not-found]

        theirs: nn.Module = PEER(
            args.d_model,
            heads=args.heads,
            num_experts=args.sub_keys**2,
            num_experts_per_head=args.top_k,
            dim_key=args.d_model // args.heads,
            non_competing_scores=False,
        )
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(std=0.02)
        return theirs
    config = PeerConfig(mode=args.mode, sub_keys=args.sub_keys, n_heads=args.heads, top_k=args.top_k)
    return Peer(config, args.d_model, dropout=0.0)


def one_pass(layer: nn.Module, variant: str, x: Tensor, direction: Tensor) -> Tensor:
    if isinstance(layer, Peer):
        layer.naive, layer.sparse_gradients = variant == REFERENCE, variant == SPARSE
    result = layer(x)
    output = result[0] if isinstance(result, tuple) else result
    output.backward(direction)
    return output.detach()


def inputs(args: argparse.Namespace, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, direction = (torch.randn(1, tokens, args.d_model, generator=generator) for _ in range(2))
    return x.requires_grad_(), direction


def gradients(layer: nn.Module) -> list[Tensor]:
    return [p.grad for p in layer.parameters() if p.grad is not None]


def high_water_mark() -> int:
    """Bytes of resident memory at their highest, on Linux. (getrusage would report the parent's, if that was more.)"""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def memory_of(variant: str, args: argparse.Namespace) -> tuple[int, int | None]:
    """Peak bytes of one pass above parameters and inputs: resident, and in tensors but gradients. Runs alone."""
    layer = build(variant, args)
    one_pass(layer, variant, *inputs(args, tokens=8))  # loads libraries and makes lasting buffers
    layer.zero_grad()
    recycled_memory.release()
    x, direction = inputs(args, args.tokens)
    before = psutil.Process().memory_info().rss
    one_pass(layer, variant, x, direction)
    resident = high_water_mark() - before
    if variant == SPARSE:
        return resident, None
    layer.zero_grad()
    counter = StorageCounter()
    with counter:
        counter.see([*layer.parameters(), x, direction])
        kept = {serial for serial, _ in counter.events}
        one_pass(layer, variant, x, direction)
        kept |= {counter.serial(g) for g in gradients(layer)}
    others = [(serial, change) for serial, change in counter.events if serial not in kept]
    return resident, peak(others, {}, "").bytes


def measured_memory(variant: str, args: argparse.Namespace) -> list[int]:
    shape = (f"--{name.replace('_', '-')}={getattr(args, name)}" for name in SHAPE)
    command = [sys.executable, "-m", "benchmarks.peer", f"--memory-of={variant}", *shape]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return [int(number) for number in printed if number != "None"]


def largest_difference(args: argparse.Namespace) -> tuple[float, int]:
    """Between fast and naive, over output and gradients, relative to the largest element of each tensor.

    Where the last of the chosen experts and the first of the others have the same score but for rounding, two ways of
    adding up may choose differently. Tokens where that happens are counted, and are not compared.
    """
    layer, results = build(REFERENCE, args), []
    assert isinstance(layer, Peer)
    with torch.no_grad():
        query = layer.queries(inputs(args, args.tokens)[0])
        chosen = [choose(query, layer.keys, args.top_k)[0].sort(-1).values for choose in (retrieve, retrieve_naive)]
    same = (chosen[0] == chosen[1]).flatten(1).all(1)
    for variant in ("fast", REFERENCE):
        x, direction = inputs(args, args.tokens)
        direction = direction * same[:, None]
        layer.zero_grad()
        output = one_pass(layer, variant, x, direction)
        results.append([output[:, same], x.grad, *gradients(layer)])
    pairs = zip(*results, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs), int((~same).sum())


def seconds_of(names: list[str], args: argparse.Namespace, clock: Callable[[], float]) -> dict[str, list[float]]:
    ours = build("fast", args)
    layers = {name: build(name, args) if name == THEIRS else ours for name in names}
    x, direction = inputs(args, args.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    warm_up = 1
    for i in range(warm_up + args.steps):
        for name in names if i % 2 else reversed(names):
            start = clock()
            one_pass(layers[name], name, x, direction)
            if i >= warm_up:
                seconds[name].append(clock() - start)
            layers[name].zero_grad()
            x.grad = None
    return seconds


SHAPE = ("mode", "d_model", "heads", "top_k", "sub_keys", "tokens", "threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("hrs", "paper"), default="hrs")
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=16, help="experts per head and token")
    parser.add_argument("--sub-keys", type=int, default=512, help="keys per side; the experts are its square")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=7, help="timed passes of each variant")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what a pass's seconds are")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(*memory_of(args.memory_of, args))
        return
    print(" ".join(f"{name}={getattr(args, name)}" for name in (*SHAPE, "clock")), f"load={os.getloadavg()[0]:.1f}")
    names = variants(args)
    difference, ties = largest_difference(args)
    print(f"largest difference of outputs and gradients to naive: {difference:.1e}, apart from {ties} tokens with ties")
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    seconds = {name: statistics.median(taken) for name, taken in seconds_of(names, args, clock).items()}
    memory = {name: measured_memory(name, args) for name in names}
    for name in names:
        line = f"{name:17} {seconds[name]:7.3f} s ({seconds[REFERENCE] / seconds[name]:4.1f}x)"
        for what, own, reference in zip(("resident", "tensors"), memory[name], memory[REFERENCE], strict=False):
            line += f"   {what} {own / MIB:6.0f} MiB (1/{reference / own:.1f})"
        print(line)
    print(f"load={os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
