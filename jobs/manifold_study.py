#!/usr/bin/env python3
"""Does the geometry of tokens help? The manifold-guided network with the corpus's, a permuted, a random one and none.

    ray job submit --working-dir . -- python jobs/manifold_study.py --scale tiny --seeds 3
    python jobs/manifold_study.py --legacy --scale micro --dry-run

The first table is that of any study: the network with the corpus's geometry is the baseline, its controls and a
transformer stand below. The second is bits per byte by position in the window, where a model that reads ahead shows
itself: docs/manifold.md says how to read both. Submitting the same study again runs only what is missing.
"""

import argparse
import itertools
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs.files import write_whole
from hrs.report.records import RunRecord
from hrs.report.rows import by_preset
from hrs.report.table import ABSENT, WIDTH
from hrs.storage import open_storage
from hrs.tracking import Tracker
from jobs import ablation_sweep
from jobs.entry import run_entry
from jobs.options import Parser

PRESETS = (
    "manifold_v18",
    "manifold_permuted",
    "manifold_random",
    "manifold_none",
    "dense_wide_manifold",
    "dense_baseline",
)
"""The baseline of the differences is the corpus's geometry: its controls tell what it is worth."""
LEGACY = "manifold_v18_legacy"
TITLE = "manifold_controls"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    parser = Parser(prog="jobs/manifold_study.py", description="Compare the manifold-guided network with its controls.")
    parser.add_argument("--legacy", action="store_true", help=f"add {LEGACY}, the original, which sees the future")
    ablation_sweep.add_study_options(parser)
    return parser.parse_args(arguments)


def sweep_arguments(options: argparse.Namespace) -> list[str]:
    """The command line of jobs/ablation_sweep.py for this study."""
    presets = [*PRESETS, LEGACY] if options.legacy else PRESETS
    title = f"{TITLE}_with_legacy" if options.legacy else TITLE
    return ablation_sweep.sweep_arguments(options, presets, title)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and show its runs by position; 0 if every run is finished, 1 if some are not."""
    options = parse(arguments)
    sweep = sweep_arguments(options)
    if options.dry_run:
        return ablation_sweep.main(sweep)
    study, storage = ablation_sweep.study_of(ablation_sweep.parse(sweep)), open_storage()
    status = ablation_sweep.main(sweep)
    tracker = Tracker(storage)
    records = tracker.study_records(study.name, with_history=False)
    lines = position_lines(records)
    folder = storage.report(study.name)
    write_whole(folder / "positions.txt", table := position_table(lines))
    if lines:
        plot_positions(lines, folder / "positions.png")
    study_id = tracker.open_study(study.name, {})
    tracker.log_study_artifact(study_id, folder)
    unfinished = sum(record.status != "finished" for record in records)
    tracker.close_study(study_id, "failed" if status else "finished", f"{unfinished} runs unfinished")
    print(f"\n{table}\nby position: {folder / 'positions.txt'}", flush=True)
    return status


# ---- bits per byte by position ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLine:
    """One preset by position, mean over its finished runs."""

    preset: str
    n_seeds: int
    causal: bool | None
    """False if any run failed the audit, None if one had none."""
    bits: list[float]
    """[T], mean loss at each position in bits, over the mean bytes of a token of the split."""


def position_lines(records: Sequence[RunRecord]) -> list[PositionLine]:
    """The presets that have finished runs, in the study's order.

    A position's own bytes are not known, but windows start everywhere in the text, so tokens are as long at one
    position as at another and one factor turns nats per token into bits per byte.
    """
    lines = []
    for preset, runs in by_preset(records).items():
        curves = [_bits(run) for run in runs if run.status == "finished" and run.loss_by_position]
        if curves:
            verdicts = {run.causal for run in runs if run.status == "finished"}
            causal = False if False in verdicts else None if None in verdicts else True
            bits = [fmean(at_position) for at_position in zip(*curves, strict=True)]
            lines.append(PositionLine(preset=preset, n_seeds=len(curves), causal=causal, bits=bits))
    return lines


def _bits(run: RunRecord) -> list[float]:
    assert run.documents is not None and run.loss_by_position is not None  # a finished run was evaluated
    bytes_per_token = sum(run.documents["bytes"].to_pylist()) / sum(run.documents["tokens"].to_pylist())
    return [nats / (log(2) * bytes_per_token) for nats in run.loss_by_position]


def by_stretch(bits: Sequence[float]) -> dict[str, float]:
    """Means over positions 0, 1, 2-3, 4-7 and so on, and the last one by itself: there a leak has nothing to read."""
    last, means = len(bits) - 1, {"0": bits[0]}
    for start in itertools.takewhile(lambda start: start < last, (2**k for k in itertools.count())):
        name = str(start) if start == 1 else f"{start}-{2 * start - 1}"
        means[name] = fmean(bits[start : min(2 * start, last)])
    return means | {"last": bits[last]}


def _columns(lines: Sequence[PositionLine]) -> list[str]:
    """Of the longest window: the original's is shorter than the others' at paper scale."""
    return list(by_stretch(max((line.bits for line in lines), key=len)))


def position_table(lines: Sequence[PositionLine]) -> str:
    """Bits per byte by position as plain text for a terminal of 120 columns, models that read ahead marked."""
    if not lines:
        return "no finished run, so no bits per byte by position\n"
    columns = _columns(lines)
    heads = ["configuration", "seeds", *columns, "causal"]
    words = {True: "yes", False: "NO", None: ABSENT}
    body = []
    for line in lines:
        means = by_stretch(line.bits)
        cells = [f"{means[name]:.3f}" if name in means else ABSENT for name in columns]
        body.append([line.preset, str(line.n_seeds), *cells, words[line.causal]])
    widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]
    rows = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        for cells in (heads, *body)
    ]
    note = (
        "bits per byte by position in the window, mean over seeds. Position 0 is predicted from one token. A causal "
        "model falls from left to right and stays down; one that reads ahead is good where it has seen little, and "
        "rises at the last position, which no other column counts and whose target lies outside of the window."
    )
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:], "", *textwrap.wrap(note, WIDTH)]) + "\n"


def plot_positions(lines: Sequence[PositionLine], path: Path) -> None:
    """A PNG of the same numbers: one curve per preset, dashed if it is not causal."""
    from matplotlib.figure import Figure

    from hrs.report.plot_style import BLUE, DPI, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, plain

    columns = _columns(lines)
    colours = (BLUE, ORANGE, SKY, PURPLE, GREY, VERMILION, INK)
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for line, colour in zip(lines, colours, strict=False):
        dashes, remark = ("--", " (not causal)") if line.causal is False else ("-", "")
        style = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.3}
        means = by_stretch(line.bits)
        places = [columns.index(name) for name in means]
        axes.plot(places, list(means.values()), dashes, label=line.preset + remark, **style)
    plain(axes)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlabel("position in the window", fontsize=8)
    axes.set_ylabel("bits per byte", fontsize=8)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=DPI)


if __name__ == "__main__":
    run_entry(main)
