"""The separation tables: what a row says, and that differences are paired."""

import dataclasses
import re
from typing import cast, get_args

import numpy as np

from hrs.evaluation.separation import RESAMPLES, Separation, Separations, Source, Task
from hrs.report.separation_table import separation_tables


def scored(auc: float, noise: np.ndarray) -> Separation:
    replicates = auc + noise
    return Separation(
        auc=auc,
        low=float(replicates.min()),
        high=float(replicates.max()),
        accuracy=0.91,
        majority=0.9,
        n_documents=20,
        n_same=60,
        n_different=1700,
        replicates=tuple(replicates.tolist()),
    )


def separations(auc: float, tasks: tuple[str, ...] = ("document", "topic")) -> Separations:
    """The same luck with documents for every model: whatever is drawn moves all of them alike."""
    noise = np.random.default_rng(0).normal(0, 0.05, RESAMPLES)
    score = scored(auc, noise)
    controls = {"untrained": 0.61, "embeddings": 0.62, "tokens": 0.63}
    sources = {s: dataclasses.replace(score, auc=controls.get(s, auc)) for s in get_args(Source)}
    return {cast(Task, task): dict(sources) for task in tasks}


def test_a_row_holds_the_mean_over_seeds_its_controls_and_a_paired_difference() -> None:
    runs = [("dense_baseline", 0, separations(0.70)), ("dense_baseline", 1, separations(0.72))]
    runs += [("kernel_l1", 0, separations(0.71)), ("kernel_l1", 1, separations(0.73))]
    document, topic = separation_tables(runs).split("\n\n", 2)[0::2]
    heads, _, baseline, other = document.splitlines()
    assert heads.split()[:3] == ["configuration", "seeds", "AUC"]
    assert baseline.split()[:3] == ["dense_baseline", "2", "0.71"]
    assert "baseline  " in baseline and baseline.split()[-4:] == ["0.610", "0.620", "91.0%", "90.0%"]
    # Documents move both rows by ten times the gap, and by the same: only the gap is left of it.
    assert other.split()[:3] == ["kernel_l1", "2", "0.72"]
    assert "+0.010* [+0.010,+0.010]" in other
    assert "reach 0.630" in topic


def test_seeds_widen_the_interval_and_one_seed_is_said_to() -> None:
    alike = separation_tables([("dense_baseline", s, separations(0.7)) for s in range(3)])
    apart = separation_tables([("dense_baseline", s, separations(0.7 + 0.3 * (s - 1))) for s in range(3)])
    narrow, wide = (float(high) - float(low) for low, high in re.findall(r"\[([\d.]+),([\d.]+)\]", alike + apart)[::2])
    assert 0.18 < narrow < 0.22, "four standard deviations of documents"
    assert wide > 0.5
    assert "one seed" not in alike
    assert "one seed" in separation_tables([("dense_baseline", 0, separations(0.7))])


def test_tasks_without_pairs_and_presets_without_runs_are_left_out() -> None:
    text = separation_tables([("dense_baseline", 0, separations(0.7, ("document",)))])
    assert text.count("configuration") == 1
    assert "topic separation, topic" not in text
    assert separation_tables([]) == "no finished run, so no topic separation\n"
