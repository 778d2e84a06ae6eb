"""The table of retrieved memories: what each model scores with the right memory, another's, and none."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hrs.errors import HRSError
from hrs.report.statistics import Estimate, Scores, bootstrap
from hrs.report.table import ABSENT, WIDTH, aligned, fixed, with_bounds, with_sign

_HEADS = ("configuration", "seeds", "reads", "bits/byte", "minus its own right", "minus no memory", "causal")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One model, given one kind of memory in evaluation."""

    preset: str
    shown: str
    """``right``, ``shuffled`` or ``none``; empty for a model that reads none."""
    documents: Mapping[int, pa.Table]
    """By seed: the evaluation's table of documents."""
    causal: bool


def retrieval_table(
    readings: Sequence[Reading], control: str, split: str = "validation", leaves_out: NDArray[np.bool_] | None = None
) -> str:
    """Plain text for a terminal of 120 columns.

    Args:
        readings: in the order of the rows, all on the same documents.
        control: the preset that trained as long without memory; every row is compared with it.
        split: what the readings are of, for the note.
        leaves_out: [D], documents that are not counted; None counts all.

    Raises:
        HRSError: if the readings are of different documents, or none are counted.
    """
    if not readings:
        return "no finished run, so no retrieved memories\n"
    counted = np.ones(_n_documents(readings), dtype=bool) if leaves_out is None else ~leaves_out
    scores = [_scores(reading, counted) for reading in readings]
    own = [_index(readings, reading.preset, "right") for reading in readings]
    against = next((i for i, reading in enumerate(readings) if reading.preset == control), None)
    by_baseline = {i: bootstrap(scores, baseline=i) for i in {*own, against} if i is not None}
    plain = bootstrap(scores, baseline=None)
    body = []
    for i, reading in enumerate(readings):
        gaps = [
            ABSENT if b is None or (gap := by_baseline[b][i].difference) is None else with_sign(gap)
            for b in (own[i], against)
        ]
        row = (
            reading.preset,
            str(len(reading.documents)),
            reading.shown or ABSENT,
            fixed(plain[i].score.value, 4),
            *gaps,
        )
        body.append((*row, "yes" if reading.causal else "NO"))
    lines = aligned([_HEADS, *body])
    notes = _notes(readings, control, split, counted, plain[0])
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", *notes]) + "\n"


def _notes(
    readings: Sequence[Reading], control: str, split: str, counted: NDArray[np.bool_], plain: Estimate
) -> list[str]:
    note = (
        f"{int(counted.sum())} of {len(counted)} documents of the {split} split; without pairing, bits/byte of "
        f"{readings[0].preset} has a 95% interval of {with_bounds(plain.score)}. minus its own right: what the same "
        "weights lose when every window is given another window's memory (shuffled) or nothing (none); above 0 the "
        f"right memory helps. minus no memory: against {control}, which trained as many steps from the same weights. "
        "Differences are paired; * the interval excludes 0."
    )
    if any(len(reading.documents) == 1 for reading in readings):
        note += " With one seed an interval covers documents alone."
    return textwrap.wrap(note, WIDTH)


def _n_documents(readings: Sequence[Reading]) -> int:
    return next(iter(readings[0].documents.values())).num_rows


def _index(readings: Sequence[Reading], preset: str, shown: str) -> int | None:
    return next((i for i, r in enumerate(readings) if (r.preset, r.shown) == (preset, shown)), None)


def _scores(reading: Reading, counted: NDArray[np.bool_]) -> Scores:
    """Bits by document, over bytes."""
    tables = list(reading.documents.values())
    if any(len(counted) != table.num_rows or not table["bytes"].equals(tables[0]["bytes"]) for table in tables):
        raise HRSError("the models were evaluated on different documents: use one corpus per study")
    nats = np.array([table["text_nats"].to_numpy()[counted] for table in tables])
    return Scores(
        seeds=tuple(reading.documents),
        numerators=nats / log(2),
        denominators=tables[0]["bytes"].to_numpy()[counted].astype(np.float64),
    )
