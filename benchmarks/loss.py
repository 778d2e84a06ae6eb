"""Time and memory of the loss of a linear output layer: computed with its gradients, or recomputed going back.

    python -m benchmarks.loss                 # the shapes of micro, tiny and small
    python -m benchmarks.loss --device cuda --shapes 24576x50257x768

Both compute the same loss and gradients, in alternation in one process. Prints the median milliseconds of each, their
ratio, and the largest relative difference of a gradient's norm.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.gpu import open_gpu
from hrs.models.base import Unembedding
from hrs.training.loss import chunking_for, cross_entropy
from hrs.training.runtime import autocast

SHAPES = "256x512x32,512x2048x128,2048x8192x256"


def compare(rows: int, n_ids: int, width: int, device: torch.device, repeats: int) -> tuple[dict[str, float], float]:
    """Return the median seconds of both losses, and how far their gradients are apart."""
    torch.manual_seed(0)
    hidden = torch.randn(1, rows, width, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(n_ids, width, device=device)).requires_grad_()
    targets = torch.randint(n_ids, (1, rows), device=device)

    def loss(unembedding: Unembedding | None) -> Tensor:
        with autocast("auto", device):
            return cross_entropy(
                lambda states: F.linear(states, weight),
                hidden,
                targets,
                vocab_size=n_ids,
                unembedding=unembedding,
                chunking=chunking_for(device),
            )

    losses: dict[str, Callable[[], Tensor]] = {
        "recomputed": lambda: loss(None),
        "fused": lambda: loss(Unembedding(weight)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    gradients: dict[str, tuple[Tensor, ...]] = {}
    gpu = open_gpu(str(device))
    for _ in range(repeats + 2):
        for name, function in losses.items():
            if gpu is not None:
                gpu.synchronize()
            began = time.perf_counter()
            gradients[name] = torch.autograd.grad(function(), (hidden, weight))
            if gpu is not None:
                gpu.synchronize()
            seconds[name].append(time.perf_counter() - began)
    pairs = zip(gradients["fused"], gradients["recomputed"], strict=True)
    apart = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return {name: statistics.median(taken[2:]) for name, taken in seconds.items()}, apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="rows x ids x width, comma-separated")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15, help="timed repetitions of each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gpu = open_gpu(args.device)
    device = torch.device("cpu") if gpu is None else gpu.device
    print(f"{'rows x ids x width':>20}  {'recomputed, ms':>14}  {'fused, ms':>10}  {'ratio':>5}  gradients apart")
    for shape in args.shapes.split(","):
        seconds, apart = compare(*map(int, shape.split("x")), device, args.repeats)
        recomputed, fused = 1e3 * seconds["recomputed"], 1e3 * seconds["fused"]
        print(f"{shape:>20}  {recomputed:14.2f}  {fused:10.2f}  {fused / recomputed:5.2f}  {apart:.1e}")


if __name__ == "__main__":
    main()
