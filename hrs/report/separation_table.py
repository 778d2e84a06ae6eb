"""The tables of topic separation: one per task, a row per preset, with intervals over seeds and documents."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hrs.evaluation.separation import TASKS, Separation, Separations, Source, Task
from hrs.report.statistics import Floats, Interval, seed_weights
from hrs.report.table import WIDTH, with_bounds, with_sign

_HEADS = ("configuration", "seeds", "AUC [95%]", "difference [95%]", "untrained", "embeddings", "accuracy", "majority")
_KINDS = {"document": "segments of one document", "topic": "segments of two documents of one topic"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    preset: str
    scores: list[dict[Source, Separation]]
    """One per seed."""
    replicates: Floats
    """[R], the trained models' mean AUC of seeds and documents drawn with replacement."""

    def mean(self, source: Source, field: str = "auc") -> float:
        return float(np.mean([getattr(scores[source], field) for scores in self.scores]))


def separation_tables(runs: Sequence[tuple[str, int, Separations]]) -> str:
    """Plain text for a terminal of 120 columns, from preset, seed and separations of every measured run.

    The baseline is the preset of the first run. Differences are paired: the same documents for both, and the same seeds
    where both have the same ones.
    """
    presets = dict.fromkeys(preset for preset, _, _ in runs)
    tables = []
    for task in TASKS:
        rows = []
        for preset in presets:
            measured = {seed: found[task] for name, seed, found in runs if name == preset and task in found}
            if measured:
                drawn = np.array([scores["trained"].replicates for scores in measured.values()])  # [S, R]
                weights = seed_weights(tuple(measured), drawn.shape[1], 0)
                scores = list(measured.values())
                rows.append(_Row(preset=preset, scores=scores, replicates=(weights * drawn).sum(axis=0)))
        if rows:
            tables.append(_table(task, rows))
    return "\n".join(tables) or "no finished run, so no topic separation\n"


def _table(task: Task, rows: Sequence[_Row]) -> str:
    baseline = rows[0]
    body = [_cells(row, baseline) for row in rows]
    widths = [max(map(len, column)) for column in zip(_HEADS, *body, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in (_HEADS, *body)
    ]
    one = baseline.scores[0]["trained"]
    note = (
        f"topic separation, {task}: {one.n_same:,} pairs of {_KINDS[task]} against {one.n_different:,} others, from "
        f"{one.n_documents} documents of the validation split. AUC 0.5 is chance. Counts of tokens, without any model, "
        f"reach {baseline.mean('tokens'):.3f}. * the interval of the difference excludes 0."
    )
    if any(len(row.scores) == 1 for row in rows):
        note += " With one seed an interval covers documents alone."
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", *textwrap.wrap(note, WIDTH)]) + "\n"


def _cells(row: _Row, baseline: _Row) -> tuple[str, ...]:
    difference = "baseline"
    if row is not baseline:
        gap = _interval(row.mean("trained") - baseline.mean("trained"), row.replicates - baseline.replicates)
        difference = with_sign(gap)
    return (
        row.preset,
        str(len(row.scores)),
        with_bounds(_interval(row.mean("trained"), row.replicates)),
        difference,
        f"{row.mean('untrained'):.3f}",
        f"{row.mean('embeddings'):.3f}",
        f"{row.mean('trained', 'accuracy'):.1%}",
        f"{row.mean('trained', 'majority'):.1%}",
    )


def _interval(value: float, replicates: Floats) -> Interval:
    low, high = np.nanquantile(replicates, (0.025, 0.975))
    return Interval(value=value, low=float(low), high=float(high))
