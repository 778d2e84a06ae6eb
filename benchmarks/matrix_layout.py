"""Products of few rows with a weight stored as [out, in], as layers keep it, and as [in, out].

    OMP_NUM_THREADS=1 python -m benchmarks.matrix_layout

Shapes of ``dense_baseline`` at ``small``: projection to queries, keys and values, both feed-forward layers, output.
Both layouts take turns, over several weights of each shape, so that none stays in the nearest cache. Prints the median
time of [in, out] over that of [out, in]: below 1, decoding on the CPU gains by a copy
(``hrs.nn.cache.SlotTable.matrix``).
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ((256, 768), (256, 1024), (1024, 256), (256, 8192))
WEIGHTS = 4


def measure(rows: int, d_in: int, d_out: int, repeats: int) -> tuple[float, float]:
    """Median seconds of processor time of a product as [out, in] and as [in, out]."""
    x = torch.randn(rows, d_in)
    stored = [torch.randn(d_out, d_in) for _ in range(WEIGHTS)]
    layouts: list[list[Tensor]] = [stored, [weight.t().contiguous().t() for weight in stored]]
    seconds: list[list[float]] = [[], []]
    calls = max(1, 2_000_000 // (d_in * d_out))
    for _ in range(repeats + 1):
        for weights, taken in zip(layouts, seconds, strict=True):
            start = time.process_time()
            for _ in range(calls):
                for weight in weights:
                    F.linear(x, weight)
            taken.append((time.process_time() - start) / (calls * WEIGHTS))
    first, second = (statistics.median(taken[1:]) for taken in seconds)  # the first round warms up
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,3,4,6,8,16", help="comma-separated numbers of rows")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("rows" + "".join(f"{f'{d_in} x {d_out}':>14}" for d_in, d_out in SHAPES))
    with torch.inference_mode():
        for rows in map(int, args.rows.split(",")):
            pairs = [measure(rows, d_in, d_out, args.repeats) for d_in, d_out in SHAPES]
            print(f"{rows:4}" + "".join(f"{second / first:14.2f}" for first, second in pairs), flush=True)


if __name__ == "__main__":
    main()
