"""The table of gated retrieval: bits per byte with the right memories, with another text's, and with none."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hrs.errors import HRSError
from hrs.report.statistics import Estimate, Interval, Scores, bootstrap
from hrs.report.table import ABSENT, WIDTH, aligned, fixed, with_bounds, with_sign

Shown = Literal["right", "shuffled", "off"]

_HEADS = (
    "memories",
    "bits/byte [95%]",
    "minus off [95%]",
    "minus shuffled [95%]",
    "read",
    "fired",
    "used",
    "cosine",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """How much of a text was read with retrieval."""

    n_tokens: int
    share_injected: float
    """Of the tokens."""
    n_events: int
    """Firings of the gate."""
    n_used: int
    """Those after which something retrieved was read."""
    similarity: float | None
    """Mean cosine of the best memory with its query; None if none was found."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GatedReading:
    """One model in one mode. D documents."""

    preset: str
    mode: str
    seed: int
    causal: bool | None
    """None if it was not audited."""
    threshold_bits: float
    share_fired: float
    """Of the validation tokens, without retrieval."""
    n_bytes: NDArray[np.int64]
    """[D]"""
    bits: Mapping[Shown, NDArray[np.float64]]
    """[D]"""
    use: Mapping[Shown, Use]


def gated_table(readings: Sequence[GatedReading], split: str) -> str:
    """Plain text for a terminal; the models of one preset and mode make one group of rows.

    Args:
        readings: in the order of the rows, all on the same documents.
        split: what the documents are called in the notes.

    Raises:
        HRSError: if the readings are of different documents, or two of one preset and mode have one seed.
    """
    if not readings:
        return "no model was measured, so no gated retrieval\n"
    if any(not np.array_equal(reading.n_bytes, readings[0].n_bytes) for reading in readings):
        raise HRSError("the models were measured on different documents: measure those of one corpus at a time")
    groups: dict[tuple[str, str], list[GatedReading]] = {}
    for reading in readings:
        groups.setdefault((reading.preset, reading.mode), []).append(reading)
    body: list[tuple[str, ...]] = []
    for (preset, mode), runs in groups.items():
        if len({run.seed for run in runs}) < len(runs):
            raise HRSError(f"two models of {preset} have one seed: measure each of them by itself")
        body.append((f"{preset}, {mode}, causal {_causal(runs)}",))
        body += _rows(runs)
    lines = aligned([_HEADS, *body])
    gates = [line for runs in groups.values() for line in _gate(runs)]
    notes = [line for note in _notes(readings, groups, split) for line in textwrap.wrap(note, WIDTH)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", *gates, "", *notes]) + "\n"


def _rows(runs: Sequence[GatedReading]) -> list[tuple[str, ...]]:
    """One row per condition."""
    shown: tuple[Shown, ...] = get_args(Shown)
    scores = [_scores(runs, name) for name in shown]
    to_off, to_shuffled = (bootstrap(scores, baseline=shown.index(name)) for name in ("off", "shuffled"))  # type: ignore[arg-type]
    rows: list[tuple[str, ...]] = []
    for i, name in enumerate(shown):
        uses = [run.use[name] for run in runs]
        n_events = sum(use.n_events for use in uses)
        similarities = [use.similarity for use in uses if use.similarity is not None]
        against_shuffled = _gap(to_shuffled[i]) if name == "right" else ABSENT
        told = (f"  {name}", with_bounds(to_off[i].score), _gap(to_off[i]), against_shuffled)
        if name == "off":
            rows.append((*told, ABSENT, ABSENT, ABSENT, ABSENT))
            continue
        rows.append(
            (
                *told,
                f"{np.mean([use.share_injected for use in uses]):.1%}",
                fixed(float(np.mean([1000 * use.n_events / use.n_tokens for use in uses])), 1),
                f"{sum(use.n_used for use in uses) / n_events:.0%}" if n_events else ABSENT,
                fixed(float(np.mean(similarities)), 3) if similarities else ABSENT,
            )
        )
    return rows


def _scores(runs: Sequence[GatedReading], name: Shown) -> Scores:
    """Bits by document, over bytes."""
    return Scores(
        seeds=tuple(run.seed for run in runs),
        numerators=np.stack([run.bits[name] for run in runs]),
        denominators=runs[0].n_bytes.astype(np.float64),
    )


def _gap(estimate: Estimate) -> str:
    gap: Interval | None = estimate.difference
    return ABSENT if gap is None else with_sign(gap)


def _causal(runs: Sequence[GatedReading]) -> str:
    if any(run.causal is False for run in runs):
        return "NO"
    return "yes" if all(run.causal for run in runs) else "unknown"


def _gate(runs: Sequence[GatedReading]) -> list[str]:
    """The gate of a group: of each seed its own threshold."""
    seeds = ", ".join(str(run.seed) for run in runs)
    bits = ", ".join(f"{run.threshold_bits:.3f}" for run in runs)
    fired = ", ".join(fixed(1000 * run.share_fired, 1) for run in runs)
    text = (
        f"{runs[0].preset}, {runs[0].mode}: seed{'s' * (len(runs) > 1)} {seeds}; the gate opens above {bits} bits, "
        f"which on validation text without retrieval is {fired} firings per 1,000 tokens"
    )
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")


def _notes(
    readings: Sequence[GatedReading], groups: Mapping[tuple[str, str], Sequence[GatedReading]], split: str
) -> list[str]:
    n_bytes, shares = readings[0].n_bytes, readings[0].use["off"].n_tokens
    notes = [
        f"bits/byte: all text of {len(n_bytes)} documents of the {split} split ({int(n_bytes.sum()):,} bytes, "
        f"{shares:,} tokens of {readings[0].preset}), read as if the model had written it, also where nothing was "
        "retrieved. right: memories sought with the text so far. shuffled: the same gate, memories sought with another "
        "document's text. off: no retrieval. No document is given memories of its own text.",
        "minus off: what retrieval adds; below 0 it helps. minus shuffled: what finding the right memories adds to it. "
        "Differences are paired by document and seed; * the interval excludes 0.",
        "read: share of the tokens predicted while something retrieved is read. fired: firings of the gate per 1,000 "
        "tokens. used: share of the firings after which something is read; the others found no memory that is similar "
        "enough. cosine: mean similarity of the best memory found to what it was sought with.",
    ]
    n_seeds = {len(runs) for runs in groups.values()}
    if 1 in n_seeds:
        notes.append("With one seed an interval covers documents alone and says nothing about another seed.")
    if n_seeds - {1}:
        notes.append("With several seeds an interval covers documents and seeds, as far as so few seeds can tell.")
    if any(reading.causal is False for reading in readings):
        notes.append("causal NO: the model sees what it predicts, so its bits/byte are not about language modelling.")
    return notes
