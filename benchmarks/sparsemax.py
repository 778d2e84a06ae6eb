"""Sparsemax by threshold search against the form that sorts, forward and backward, on the CPU or one GPU.

    python -m benchmarks.sparsemax --elements 524288 --threads 1

Both take the same scores in alternation, so that other load on the machine meets both alike. Scores are normal with
three spreads: the wider, the fewer entries have weight. Prints median milliseconds and sorted / searched.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hrs.gpu import synchronize
from hrs.nn.sparsemax import Sparsemax
from hrs.training import Runtime


def by_sorting(scores: Tensor) -> Tensor:
    """The formula of Martins & Astudillo (2016)."""
    ordered = scores.sort(dim=-1, descending=True).values
    sums = ordered.cumsum(dim=-1)
    ranks = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    size = (1 + ranks * ordered > sums).sum(dim=-1, keepdim=True)
    return (scores - (sums.gather(-1, size - 1) - 1) / size).clamp_min(0.0)


def seconds_of(form: Callable[[Tensor], Tensor], scores: Tensor, cotangent: Tensor | None) -> float:
    """Seconds of one forward pass; with a cotangent also of the backward pass."""
    scores = scores.detach().requires_grad_(cotangent is not None)
    synchronize(scores.device)
    start = time.perf_counter()
    weights = form(scores)
    if cotangent is not None:
        weights.backward(cotangent)
    synchronize(scores.device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="entries per row")
    parser.add_argument("--elements", type=int, default=2**19, help="entries in all")
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.1, 1.0, 5.0], help="deviations of the scores")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15, help="timed passes of each form")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = Runtime().torch_device()
    forms: dict[str, Callable[[Tensor], Tensor]] = {"sorted": by_sorting, "searched": Sparsemax()}
    print(f"elements={args.elements} device={device} threads={args.threads}, medians of {args.repeats}, milliseconds")
    print(f"{'entries':>7} {'spread':>6} {'pass':>16} {'sorted':>8} {'searched':>9} {'sorted/searched':>16}")
    for length in args.lengths:
        for spread in args.spreads:
            scores = spread * torch.randn(max(1, args.elements // length), length, device=device)
            torch.testing.assert_close(forms["searched"](scores), by_sorting(scores), atol=1e-5, rtol=0)
            for name, cotangent in (("forward", None), ("forward+backward", torch.randn_like(scores))):
                taken: dict[str, list[float]] = {form: [] for form in forms}
                for i in range(args.repeats + 2):
                    for form, function in forms.items():
                        elapsed = seconds_of(function, scores, cotangent)
                        if i >= 2:  # after the warm-up
                            taken[form].append(elapsed)
                slow, fast = (1000 * statistics.median(taken[form]) for form in ("sorted", "searched"))
                print(f"{length:7} {spread:6} {name:>16} {slow:8.1f} {fast:9.1f} {slow / fast:16.1f}")


if __name__ == "__main__":
    main()
