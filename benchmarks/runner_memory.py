"""Predicted memory of every preset at the original's dimensions, and what fits a 16 GB card. Needs no GPU.

    OMP_NUM_THREADS=1 python -m benchmarks.runner_memory [PRESET ...] [--scale paper] [--card-gib 16]

Prints a Markdown table. For each preset: weights, gradients and moments alone; the peak of one training step on CUDA at
the micro-batch of the original's runs, and what the original reported for them; then the largest micro-batch that fits
the card, of those that divide the effective batch, with its peak and share of the card; the peaks also with activation
checkpointing. Micro-batches count windows, of 1024 tokens for two presets and 512 for all others. Presets whose steps
have the same shape share a trace.
"""

import argparse
from dataclasses import replace

from hrs.config import ExperimentConfig
from hrs.errors import HRSError
from hrs.models import count_parameters
from hrs.presets import PRESETS, Preset, experiment
from hrs.training.memory import GIB, card_fraction, estimate_peak, fit_micro_batch, predict_peak
from hrs.training.runtime import Runtime

EAGER = Runtime(device="cuda")
CHECKPOINTED = replace(EAGER, activation_checkpointing=True)
STATIC_BYTES_PER_PARAMETER = 16
"""Weight, gradient and two moments in fp32: no training step can take less."""
HEAD = (
    "preset", "parameters", "static", "original's micro-batch", "peak", "checkpointed", "reported (GB)", "fits", "peak",
    "card", "fits, checkpointed", "peak", "card",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="predicted memory of every preset")
    parser.add_argument("presets", nargs="*", default=list(PRESETS), metavar="PRESET", help="default: all")
    parser.add_argument("--scale", default="paper")
    parser.add_argument("--card-gib", type=float, default=16.0)
    arguments = parser.parse_args()
    print("| " + " | ".join(HEAD) + " |\n|---|" + "---:|" * (len(HEAD) - 1))
    for name in arguments.presets:
        cells = row(PRESETS[name], experiment(name, arguments.scale), int(arguments.card_gib * GIB))
        print("| " + " | ".join(cells) + " |", flush=True)


def row(preset: Preset, config: ExperimentConfig, card_bytes: int) -> list[str]:
    """One line of the table; peaks in GiB."""
    parameters = count_parameters(config.model)
    static = parameters * STATIC_BYTES_PER_PARAMETER / GIB
    cells = [f"`{preset.name}`", f"{parameters / 1e6:.1f} M", f"{static:.2f}"]
    micro_batch = original_micro_batch(preset, config)
    if micro_batch is None:
        cells += ["", "", ""]
    else:
        eager = estimate_peak(config, micro_batch, EAGER).peak_bytes
        checkpointed = predict_peak(config, micro_batch, CHECKPOINTED)
        cells += [str(micro_batch), f"{eager / GIB:.2f}", f"{checkpointed / GIB:.2f}"]
    cells.append(reported(preset, static))
    for runtime in (EAGER, CHECKPOINTED):
        try:
            plan = fit_micro_batch(config, card_bytes, runtime)
        except HRSError:
            cells += ["none", "", ""]
            continue
        fraction = card_fraction(plan.peak_bytes, card_bytes)
        cells += [f"{plan.micro_batch} x {plan.accumulation}", f"{plan.peak_bytes / GIB:.2f}", f"{fraction:.2f}"]
    return cells


def original_micro_batch(preset: Preset, config: ExperimentConfig) -> int | None:
    """Windows per pass in the original's runs, if they divide this row's batch; None for rows it did not have."""
    batch, original = config.training.batch_sequences, preset.original_micro_batch
    return None if original is None else max(n for n in range(1, original + 1) if batch % n == 0)


def reported(preset: Preset, static_gib: float) -> str:
    """The original's figure; one that is below what weights, gradients and moments take is not possible."""
    if preset.reported_gb is None:
        return ""
    possible = preset.reported_gb * 1e9 >= static_gib * GIB
    return f"{preset.reported_gb:g}" + ("" if possible else ", impossible")


if __name__ == "__main__":
    main()
