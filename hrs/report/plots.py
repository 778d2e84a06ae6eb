"""The figures of a report: one small panel per preset, the baseline in grey behind it.

Small panels rather than one crowded axis: eleven curves on one axis need eleven colours and hide each other.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hrs.report.plot_style import BLUE, DPI, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, plain
from hrs.report.records import RunRecord
from hrs.report.schedule_plots import plot_schedule, schedules

__all__ = ["Plot", "draw_plots", "plot_loss_by_position", "plot_schedule"]

_TIER_COLOURS = (SKY, ORANGE, BLUE, PURPLE)
_COLUMNS = 4

Groups = Mapping[str, Sequence[RunRecord]]
Draw = Callable[[Axes, str, Sequence[RunRecord]], None]


class Plot(NamedTuple):
    """A figure on disk and what it shows."""

    path: Path
    caption: str


_CAPTIONS = {
    "loss": "Loss during training, nats per token. One line per seed.",
    "position": "Loss by position in the context, nats per token. A model that reads ahead is good where it has seen "
    "little, and worst at the end of the window, where there is nothing left to read.",
    "tiers": "Mean share of the routing weights each tier gets, block by block, on the validation split.",
    "schedule": "Learning rate over training, and the multiplier of every parameter group in each phase (0: at rest).",
}


def draw_plots(groups: Groups, directory: Path) -> list[Plot]:
    """Write every figure that the runs have data for, as PNGs in ``directory``."""
    figures = {
        "loss": loss_curves(groups),
        "position": loss_by_position(groups),
        "tiers": tier_shares(groups),
        "schedule": schedules(groups),
    }
    plots = []
    for name, figure in figures.items():
        if figure is not None:
            plots.append(Plot(directory / f"{name}.png", _CAPTIONS[name]))
            figure.savefig(plots[-1].path, dpi=DPI)
    return plots


def plot_loss_by_position(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """One small PNG of mean nats per token at each position of the context; ``curves`` by label, at most five."""
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for (label, values), colour in zip(curves.items(), (BLUE, VERMILION, ORANGE, SKY, PURPLE), strict=False):
        axes.plot(*_binned(values), color=colour, linewidth=1.3, label=label)
    plain(axes)
    axes.set_xlabel("position", fontsize=8)
    axes.set_ylabel("loss, nats per token", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI)


def loss_curves(groups: Groups) -> Figure | None:
    """Training and validation loss of every seed, the baseline's validation loss in grey."""
    groups = {p: runs for p, runs in groups.items() if any(r.history.get("train_loss") for r in runs)}
    if not groups:
        return None
    baseline = next(iter(groups))

    def draw(axes: Axes, preset: str, runs: Sequence[RunRecord]) -> None:
        if preset != baseline:
            _curves(axes, groups[baseline], "validation_loss", color=GREY, linewidth=1.0)
        _curves(axes, runs, "train_loss", color=SKY, linewidth=0.6, alpha=0.8)
        _curves(axes, runs, "validation_loss", color=BLUE, linewidth=1.2, marker="o", markersize=2.5)

    figure = _panels(groups, draw, x="step", y="loss", legend=[
        Line2D([], [], color=SKY, label="training"),
        Line2D([], [], color=BLUE, marker="o", markersize=3, label="validation"),
        Line2D([], [], color=GREY, label=f"validation, {baseline}"),
    ])  # fmt: skip
    losses = [v for runs in groups.values() for r in runs for name in ("train_loss", "validation_loss")
              for _, v in r.history.get(name, ())]  # fmt: skip
    # The first steps fall from ln V within a few percent of the run and would flatten everything after them.
    figure.axes[0].set_ylim(min(losses) - 0.1, float(np.quantile(losses, 0.97)) + 0.1)
    return figure


def loss_by_position(groups: Groups) -> Figure | None:
    """The fingerprint of a leak: mean loss over seeds at each position, the baseline's in grey."""
    curves: dict[str, Any] = {}
    for preset, runs in groups.items():
        if lines := [r.loss_by_position for r in runs if r.loss_by_position]:
            curves[preset] = np.mean(lines, axis=0)
    if not curves:
        return None
    baseline = next(iter(curves))

    def draw(axes: Axes, preset: str, runs: Sequence[RunRecord]) -> None:
        if preset != baseline:
            axes.plot(*_binned(curves[baseline]), color=GREY, linewidth=1.0)
        colour = VERMILION if _leaks(runs) else BLUE
        axes.plot(*_binned(curves[preset]), color=colour, linewidth=1.3)

    return _panels({p: groups[p] for p in curves}, draw, x="position", y="loss", legend=[
        Line2D([], [], color=BLUE, label="causal"),
        Line2D([], [], color=VERMILION, label="not causal"),
        Line2D([], [], color=GREY, label=baseline),
    ])  # fmt: skip


def tier_shares(groups: Groups) -> Figure | None:
    """Stacked shares per block, mean over seeds."""
    known = {preset: [r.tier_share for r in runs if r.tier_share] for preset, runs in groups.items()}
    shares = {preset: np.mean(values, axis=0) for preset, values in known.items() if values}
    if not shares:
        return None
    names = {p: _tier_names(groups[p], shares[p].shape[1]) for p in shares}
    every_name = list(dict.fromkeys(name for tiers in names.values() for name in tiers))
    colours = {name: _TIER_COLOURS[i % len(_TIER_COLOURS)] for i, name in enumerate(every_name)}

    def draw(axes: Axes, preset: str, runs: Sequence[RunRecord]) -> None:
        blocks, bottom = np.arange(len(shares[preset])), np.zeros(len(shares[preset]))
        for name, share in zip(names[preset], shares[preset].T, strict=True):
            axes.bar(blocks, share, bottom=bottom, width=0.8, color=colours[name], edgecolor="white", linewidth=0.5)
            bottom += share
        axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))

    legend = [Patch(color=colour, label=name) for name, colour in colours.items()]
    return _panels({p: groups[p] for p in shares}, draw, x="block", y="share", legend=legend)


def _panels(groups: Groups, draw: Draw, *, x: str, y: str, legend: list[Any]) -> Figure:
    """A grid of panels with shared axes and one legend above them."""
    n_columns = min(_COLUMNS, len(groups))
    n_rows = -(-len(groups) // n_columns)
    figure = Figure(figsize=(11 * max(n_columns, 2) / _COLUMNS, 2.0 * n_rows + 0.6), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(groups) :]:
        axes.set_axis_off()
    for index, (axes, (preset, runs)) in enumerate(zip(grid.flat, groups.items(), strict=False)):
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        draw(axes, preset, runs)
        plain(axes)
        axes.set_title(preset, fontsize=9, loc="left", color=VERMILION if _leaks(runs) else INK)
        if index + n_columns >= len(groups):
            axes.set_xlabel(x, fontsize=8)
            axes.tick_params(axis="x", labelbottom=True)
        if index % n_columns == 0:
            axes.set_ylabel(y, fontsize=8)
    figure.legend(handles=legend, loc="outside upper left", ncols=len(legend), frameon=False, fontsize=8)
    return figure


def _curves(axes: Axes, runs: Sequence[RunRecord], name: str, **style: Any) -> None:
    for run in runs:
        if points := run.history.get(name):
            axes.plot(*zip(*points, strict=True), **style)


def _binned(values: Any) -> tuple[Any, Any]:
    """Positions and means of at most 128 equal stretches: enough for the shape, without the noise."""
    stretches = np.array_split(np.arange(len(values)), min(128, len(values)))
    return [s.mean() for s in stretches], [np.mean(np.asarray(values)[s]) for s in stretches]


def _leaks(runs: Sequence[RunRecord]) -> bool:
    return any(r.causal is False for r in runs)


def _tier_names(runs: Sequence[RunRecord], n_tiers: int) -> list[str]:
    names = next((r.config["model"]["tiers"]["names"] for r in runs if "tiers" in r.config.get("model", {})), ())
    return list(names) if len(names) == n_tiers else [f"tier {i}" for i in range(n_tiers)]
