"""Predicted memory of every preset at the original's dimensions, and what fits a 16 GB card. Needs no GPU.

    OMP_NUM_THREADS=1 python -m benchmarks.runner_memory [--scale paper] [--card-gib 16]

Prints a Markdown table: the peak of one training step on CUDA at the original's micro-batch, then the largest
micro-batch that fits, its peak and its share of the card, each without and with activation checkpointing; and the time
of a trace (0.0: shared with a preset above, whose step has the same shape).
"""

import argparse
import time

from hrs.presets import PRESETS, experiment
from hrs.training.memory import GIB, card_fraction, fit_micro_batch, predict_peak
from hrs.training.runtime import Runtime

ORIGINAL_MICRO_BATCH = 24


def main() -> None:
    parser = argparse.ArgumentParser(description="predicted memory of every preset")
    parser.add_argument("--scale", default="paper")
    parser.add_argument("--card-gib", type=float, default=16.0)
    arguments = parser.parse_args()
    card_bytes = int(arguments.card_gib * GIB)
    print(
        f"| preset | checkpointing | peak at {ORIGINAL_MICRO_BATCH} (GiB) | fits | x | peak (GiB) | card | trace (s) |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for preset in PRESETS:
        config = experiment(preset, arguments.scale)
        micro_batch = min(ORIGINAL_MICRO_BATCH, config.training.batch_sequences)
        for checkpointing in (False, True):
            runtime = Runtime(device="cuda", activation_checkpointing=checkpointing)
            start = time.perf_counter()
            peak_bytes = predict_peak(config, micro_batch, runtime)
            seconds = time.perf_counter() - start
            plan = fit_micro_batch(config, card_bytes, runtime)
            fraction = card_fraction(plan.peak_bytes, card_bytes)
            print(
                f"| {preset} | {'yes' if checkpointing else 'no'} | {peak_bytes / GIB:.2f} | {plan.micro_batch} "
                f"| {plan.accumulation} | {plan.peak_bytes / GIB:.2f} | {fraction:.2f} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
