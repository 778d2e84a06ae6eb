"""What the optimiser was told: the learning rate over training, and who learns in which phase."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hrs.config import ExperimentConfig, to_dict
from hrs.report.plot_style import BLUE, DPI, GREY, INK, plain
from hrs.report.records import RunRecord

_LETTERS_ACROSS = 75
"""Letters of the small font that fit across one panel."""


def plot_schedule(config: ExperimentConfig, path: Path) -> None:
    """One PNG of the schedule that ``config`` asks for, before anything is trained."""
    from hrs.training.schedule import lr  # brings torch, which the report of a study does without

    steps = config.training.steps
    points = [(step, lr(config.training.schedule, step, steps)) for step in range(0, steps, max(1, steps // 500))]
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    rate, table = figure.subplots(2, 1, height_ratios=[2, 3])
    _schedule(rate, table, config.preset, points, to_dict(config.training))
    figure.savefig(path, dpi=DPI)


def schedules(groups: Mapping[str, Sequence[RunRecord]]) -> Figure | None:
    """One panel per distinct schedule: the learning rate above, multipliers by group and phase below."""
    distinct: dict[str, tuple[list[str], RunRecord]] = {}
    for preset, runs in groups.items():
        if run := next((r for r in runs if r.history.get("lr")), None):
            training = run.config.get("training", {})
            key = repr((training.get("schedule"), training.get("phases"), run.history["lr"][-1][0]))
            distinct.setdefault(key, ([], run))[0].append(preset)
    if not distinct:
        return None
    n_rows = -(-len(distinct) // 2)
    figure = Figure(figsize=(11, 3.6 * n_rows), layout="constrained")
    grid = figure.subplots(2 * n_rows, 2, squeeze=False, height_ratios=[2, 3] * n_rows)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (presets, run) in enumerate(distinct.values()):
        row, column = divmod(index, 2)
        title = textwrap.fill(", ".join(presets), 62)
        _schedule(
            grid[2 * row][column], grid[2 * row + 1][column], title, run.history["lr"], run.config.get("training", {})
        )
    return figure


def _schedule(
    rate: Axes, table: Axes, title: str, points: Sequence[tuple[int, float]], training: Mapping[str, Any]
) -> None:
    phases = training.get("phases") or [{"name": "one phase", "frac": 1.0, "multipliers": []}]
    steps, values = np.array(points).T
    total = training.get("steps", steps[-1])
    for axes in (rate, table):
        axes.set_axis_on()
        axes.set_xlim(0, total)
        plain(axes)
    rate.plot(steps, values, color=BLUE, linewidth=1.3)
    rate.set_ylim(bottom=0)
    rate.set_title(title, fontsize=9, loc="left", color=INK)
    rate.set_ylabel("learning rate", fontsize=8)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rate.yaxis.get_offset_text().set_fontsize(7)
    rate.set_xticklabels([])
    groups = list(dict.fromkeys(name for phase in phases for name, _ in phase["multipliers"])) or ["all groups"]
    start = 0.0
    for phase in phases:
        width, multipliers = phase["frac"] * total, dict(phase["multipliers"])
        rate.axvline(start, color=GREY, linewidth=0.5)
        for y, group in enumerate(groups):
            value = multipliers.get(group, 1.0)
            # From white at 0 over the decades to a blue that black text can still be read on.
            shade = 0.0 if value == 0 else 0.12 + 0.4 * max(0.0, 1 + np.log10(value) / 2)
            table.add_patch(Rectangle((start, y), width, 1, facecolor=(*to_rgb(BLUE), shade), edgecolor="white"))
            table.text(start + width / 2, y + 0.5, f"{value:g}", ha="center", va="center", fontsize=7, color=INK)
        n_letters = max(1, int(_LETTERS_ACROSS * phase["frac"]))
        table.text(start + width / 2, -0.25, phase["name"][:n_letters], ha="center", va="bottom", fontsize=7, color=INK)
        start += width
    table.set_ylim(max(len(groups), 8), -1.1)
    table.spines["left"].set_visible(False)
    table.set_yticks(np.arange(len(groups)) + 0.5, groups, fontsize=7)
    table.tick_params(axis="y", length=0)
    table.set_xlabel("step", fontsize=8)
