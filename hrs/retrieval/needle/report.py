"""Tables, a heat map and a page about needles."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from hrs.report.plot_style import BLUE, DPI, GREY, INK
from hrs.report.statistics import Interval
from hrs.retrieval.needle.ranks import RANKERS
from hrs.retrieval.needle.result import NeedleResult

HEAT_MAP = "needle.png"
CUTOFFS = (1, 5)

Row = Sequence[str]


def retrieval_rows(result: NeedleResult) -> list[Row]:
    """A header and a row per number of distractors and ranker, all depths together; chance last."""
    rows: list[Row] = [("distractors", "segments", "sought by", "recall@1", "recall@5", "mean 1/rank")]
    for level, n in enumerate(result.plan.distractors):
        place = (str(n), str(result.n_segments(level)))
        for ranker in RANKERS:
            recalls = [percent(result.recall(ranker, level, k)) for k in CUTOFFS]
            rows.append((*place, ranker, *recalls, decimal(result.reciprocal_rank(ranker, level))))
        chances = [f"{100 * result.chance(level, k):.1f} %" for k in CUTOFFS]
        rows.append((*place, "chance", *chances, f"{result.chance_reciprocal_rank(level):.3f}"))
    return rows


def answer_rows(result: NeedleResult) -> list[Row]:
    """A header and a row per way of reading the memory; chance last."""
    n = result.plan.alternatives
    rows: list[Row] = [("memory", "value in the text", f"first of {n}", f"mean rank of {n}", "gain over none, nats")]
    for way in result.answers:
        gain = "-" if way == "none" else decimal(result.gain(way, "none"), signed=True)
        rates = (percent(result.found(way)), percent(result.first(way)))
        rows.append((way, *rates, decimal(result.mean_rank(way), digits=2), gain))
    rows.append(("chance", "as with shuffled", f"{100 / n:.1f} %", f"{(n + 1) / 2:.2f}", "0"))
    return rows


def differences(result: NeedleResult) -> list[str]:
    """What the right memory is worth against another needle's, a line per way of reading."""
    lines = []
    for kind, right, shuffled in (
        ("text", "text, right", "text, shuffled"),
        ("slots", "slots, right", "slots, shuffled"),
    ):
        if right in result.answers:
            gain = result.gain(right, shuffled)  # type: ignore[arg-type]
            lines.append(f"{kind}: the right memory makes the value {decimal(gain, signed=True)} nats likelier")
    return lines


def describe(result: NeedleResult) -> str:
    """One paragraph: what was measured."""
    plan = result.plan
    depths = ", ".join(f"{depth:g}" for depth in plan.depths)
    front = f" behind up to {plan.cut.previous} tokens" if plan.cut.previous else ""
    return (
        f"{plan.trials} needles at each of the depths {depths}, each in a haystack of its own: "
        f"{plan.haystack_segments} segments of {plan.cut.length} tokens of the {plan.split} split, "
        f"{plan.cut.condition}{front}. Every second distractor holds another needle. "
        f"Intervals are 95 %: Wilson's for shares, bootstrap over needles for means; seed {plan.seed}."
    )


def format_tables(result: NeedleResult) -> str:
    """Both tables as text."""
    parts = [describe(result), columns(retrieval_rows(result)), columns(answer_rows(result)), *differences(result)]
    return "\n\n".join(parts)


def page(result: NeedleResult, title: str, command: str) -> str:
    """The same as markdown, with the heat map and a few examples."""
    lines = [f"# {title}", "", f"    {command}", "", describe(result), ""]
    lines += ["## Is the segment found?", "", *markdown(retrieval_rows(result)), "", f"![recall]({HEAT_MAP})", ""]
    lines += [
        "`another question` seeks with the question of another needle: what it finds is found because segments with "
        "needles are like questions. `word counts` and `tf-idf` are cosines of words, without a model.",
        "",
        "## Is the value told?",
        "",
        *markdown(answer_rows(result)),
        "",
        "The value counts only in the continuation, and words of the question never. `shuffled` reads the segment of "
        "another needle with a value of the same kind: its rate is what luck is worth.",
        "",
        *(f"- {line}" for line in differences(result)),
        "",
        "## Examples",
        "",
    ]
    for example in result.examples:
        lines += [f"- **{name}**: {' '.join(text.split())}" for name, text in example.items()] + [""]
    return "\n".join(lines)


def draw_heat_map(result: NeedleResult, path: Path) -> None:
    """Recall at 1 and at 5 by depth and number of distractors, a panel per ranker, as a PNG."""
    plan = result.plan
    colours = LinearSegmentedColormap.from_list("share", ["#FFFFFF", BLUE])
    figure = Figure(figsize=(2.2 * len(RANKERS) + 0.8, 5.6), layout="constrained")
    grid = figure.subplots(len(CUTOFFS), len(RANKERS), sharex=True, sharey=True, squeeze=False)
    for k, panels in zip(CUTOFFS, grid, strict=True):
        for ranker, axes in zip(RANKERS, panels, strict=True):
            shares = np.array(
                [
                    [result.recall(ranker, level, k, depth).value for level in range(len(plan.distractors))]
                    for depth in range(len(plan.depths))
                ]
            )
            image = axes.imshow(shares, cmap=colours, vmin=0, vmax=1, aspect="auto")
            for (row, column), share in np.ndenumerate(shares):
                ink = "white" if share > 0.6 else INK
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink)
            axes.set_title(ranker if k == CUTOFFS[0] else "", fontsize=9, color=INK)
            axes.tick_params(labelsize=8, length=0)
            axes.spines[:].set_color(GREY)
        panels[0].set_ylabel(f"recall@{k}, %\ndepth", fontsize=9)
    chances = [f"{n}\n({100 * result.chance(level, 1):.1f})" for level, n in enumerate(plan.distractors)]
    grid[0][0].set_yticks(range(len(plan.depths)), [f"{depth:g}" for depth in plan.depths])
    grid[0][0].set_xticks(range(len(plan.distractors)), chances)
    figure.supxlabel(f"distractors (chance of recall@1 in %); {plan.trials} needles per cell", fontsize=9)
    figure.colorbar(image, ax=grid, shrink=0.6).ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=DPI)


def percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def decimal(value: Interval, digits: int = 3, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{value.value:{sign}.{digits}f} [{value.low:{sign}.{digits}f}, {value.high:{sign}.{digits}f}]"


def columns(rows: Sequence[Row]) -> str:
    """Aligned by spaces."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown(rows: Sequence[Row]) -> list[str]:
    """Lines of a table."""
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
