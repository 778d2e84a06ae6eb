"""Requests of unequal length decoded together by ContinuousBatch, against ``generate`` one after the other, on the CPU.

    python -m benchmarks.batching --scales tiny,small --threads 1

Random weights, temperature 0.9 and top-k 50. Prompts of 8 tokens up to half the context, at equal distances; all
requests come at once, and each asks for as many new tokens as a quarter of the context has. Both ways take turns in one
process, so that other load on the machine meets both alike. Prints medians of new tokens/s, prefill included, and their
ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from hrs.generation import Sampling, generate
from hrs.generation.batching import ContinuousBatch
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment

SHORTEST = 8


def prompts(model: LanguageModel, n: int) -> list[list[int]]:
    """``n`` prompts of unequal length, in an order without a trend."""
    longest = model.max_seq_len // 2
    lengths = [SHORTEST + (longest - SHORTEST) * i // max(n - 1, 1) for i in range(n)]
    order = torch.randperm(n).tolist()
    return [torch.randint(model.vocab_size, (lengths[i],)).tolist() for i in order]


def together(model: LanguageModel, texts: list[list[int]], sampling: Sampling) -> int:
    """New tokens of all requests at once."""
    batch, n = ContinuousBatch(model, n_slots=len(texts)), 0
    for text in texts:
        batch.add(text, sampling)
    while batch.n_active:
        n += len(batch.step())
    return n


def one_by_one(model: LanguageModel, texts: list[list[int]], sampling: Sampling) -> int:
    """New tokens of all requests, each on its own."""
    return sum(len(step) for text in texts for step in generate(model, [text], sampling))


def compare(model: LanguageModel, n: int, repeats: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Medians of new tokens/s of ``n`` requests together and one by one."""
    texts, sampling = prompts(model, n), Sampling(temperature=0.9, top_k=50, max_new_tokens=model.max_seq_len // 4)
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for taken, run in zip(seconds, (together, one_by_one), strict=True):
            start = clock()
            made = run(model, texts, sampling)
            if repeat > 0:  # the first round warms up
                taken.append(clock() - start)
            assert made == n * sampling.max_new_tokens
    made = n * sampling.max_new_tokens
    return made / statistics.median(seconds[0]), made / statistics.median(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="dense_baseline,v17_peer_only", help="comma-separated")
    parser.add_argument("--scales", default="tiny", help="comma-separated, of micro, tiny, small and paper")
    parser.add_argument("--requests", default="1,8,32", help="comma-separated numbers of requests at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: seconds this process computed, for a machine that is busy with other work; use with --threads 1",
    )
    args = parser.parse_args()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for scale in args.scales.split(","):
        for preset in args.presets.split(","):
            model = build_model(experiment(preset, scale).model).eval()
            for n in map(int, args.requests.split(",")):
                fast, slow = compare(model, n, args.repeats, clock)
                print(
                    f"{scale:6} {preset:16} {n:3} requests   together {fast:7.0f} tokens/s   "
                    f"one by one {slow:7.0f} tokens/s   ratio {fast / slow:5.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
