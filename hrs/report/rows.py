"""From run records to the rows of a comparison: one row per preset, whatever it is printed on.

A row is ranked only if every one of its evaluated runs passed the causality audit. A model that can see the token it
predicts has a number, but not one about language modelling: it stands below the line and is compared with nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import pyarrow as pa

from hrs.errors import HRSError
from hrs.report.records import RunRecord
from hrs.report.statistics import Estimate, Interval, Scores, bootstrap


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One preset. Numbers are None where no run gave any."""

    preset: str
    seeds_done: int
    seeds_asked: int
    parameters: int | None
    bits_per_byte: Interval | None
    perplexity: Interval | None
    difference: Interval | None
    """Bits per byte minus the baseline's, paired; only between ranked rows."""
    tokens_per_second: float | None
    """Mean over seeds."""
    peak_memory_bytes: int | None
    """Highest of the seeds."""
    causal: bool | None
    """None if a run was not audited."""
    is_baseline: bool
    engram_content: float | None = None
    """Bits per byte lost when every window reads the engrams of another text, mean over seeds; None without engrams."""
    is_best: bool = False
    """The lowest bits per byte of two or more ranked rows."""
    remark: str = ""
    """Why runs are missing, or why the row is not ranked."""

    @property
    def is_ranked(self) -> bool:
        return self.causal is True and self.bits_per_byte is not None

    @property
    def is_below_the_line(self) -> bool:
        return self.causal is False or (self.bits_per_byte is not None and not self.is_ranked)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The rows of a table in the study's order, and the facts its notes need."""

    rows: tuple[Row, ...]
    n_documents: int
    n_bytes: int
    """UTF-8 bytes of the text of all documents."""
    validation_overlap: float = 0.0
    """Share of these documents that the training text holds as well, exactly or nearly; the largest of all runs."""

    @property
    def baseline(self) -> Row:
        return self.rows[0]

    @property
    def above(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.is_below_the_line)

    @property
    def below(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.is_below_the_line)


def by_preset(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Records grouped by preset in the given order, seeds ascending.

    Raises:
        HRSError: if the records cannot stand in one table: none at all, several scales, two runs of one preset and
            seed, or a preset whose runs differ in more than the seed.
    """
    if not records:
        raise HRSError("there are no runs to report: start the study first, or check its name")
    if len(scales := sorted({r.scale for r in records})) > 1:
        raise HRSError(f"one table compares one scale, these runs have {', '.join(scales)}: report each by itself")
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(record.preset, []).append(record)
    for preset, runs in groups.items():
        runs.sort(key=lambda r: r.seed)
        if len({r.seed for r in runs}) < len(runs):
            raise HRSError(f"{preset} has several runs with one seed: report one study or code version at a time")
        settings = [without_seed(r.config) for r in runs if r.config]
        if any(s != settings[0] for s in settings):
            raise HRSError(f"the runs of {preset} differ in more than their seed: report each setting by itself")
    return groups


def without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without its seed, the place where its text lies, and the run of that seed whose memories it reads."""
    settings = {name: value for name, value in config.items() if name != "seed"}
    if data := config.get("data"):
        kind = data.get("corpus", "").partition(":/")[0]  # its documents tell what the text is
        settings["data"] = data | {"corpus": kind}
    if retrieval := config.get("training", {}).get("retrieval"):
        retrieval = {k: v for k, v in retrieval.items() if k not in ("base", "fingerprint")}
        settings["training"] = config["training"] | {"retrieval": retrieval}
    return settings


def is_evaluated(record: RunRecord) -> bool:
    """Whether the run finished and has a finite score for every document."""
    return record.status == "finished" and record.documents is not None and _is_finite(record.documents)


def _is_finite(documents: pa.Table) -> bool:
    return all(bool(np.isfinite(documents[name].to_numpy()).all()) for name in ("nats", "text_nats"))


def compare_presets(records: Sequence[RunRecord]) -> Comparison:
    """The rows of the table; the first preset is the baseline of the paired differences.

    Raises:
        HRSError: see :func:`by_preset`; or if the runs were evaluated on different documents.
    """
    groups = by_preset(records)
    tables = [r.documents for runs in groups.values() for r in runs if r.documents is not None and is_evaluated(r)]
    if any(not t[name].equals(tables[0][name]) for t in tables for name in ("title", "bytes")):
        raise HRSError("the runs were evaluated on different documents: use one corpus per study")
    bits = {p: _map(e.score, _bits) for p, e in _estimates(groups, "text_nats", "bytes").items()}
    perplexity = {p: _map(e.score, np.exp) for p, e in _estimates(groups, "nats", "tokens").items()}
    ranked = [preset for preset in bits if _causal(groups[preset])]
    difference = {}
    if (baseline := next(iter(groups))) in ranked:
        paired = _estimates({p: groups[p] for p in ranked}, "text_nats", "bytes", baseline=0)
        difference = {p: _map(e.difference, _bits) for p, e in paired.items() if e.difference}
    best = min(ranked, key=lambda preset: bits[preset].value) if len(ranked) > 1 else None
    rows = tuple(
        Row(
            preset=preset,
            seeds_done=sum(map(is_evaluated, runs)),
            seeds_asked=len(runs),
            parameters=next((r.parameters for r in runs if r.parameters is not None), None),
            bits_per_byte=bits.get(preset),
            perplexity=perplexity.get(preset),
            difference=difference.get(preset),
            tokens_per_second=_mean(r.tokens_per_second for r in runs if is_evaluated(r)),
            peak_memory_bytes=max((r.peak_memory_bytes for r in runs if r.peak_memory_bytes is not None), default=None),
            causal=_causal(runs),
            is_baseline=preset == baseline,
            engram_content=_mean(_engram_content(r) for r in runs if is_evaluated(r)),
            is_best=preset == best,
            remark="; ".join(filter(None, (_audit_remark(runs), _status_remark(runs)))),
        )
        for preset, runs in groups.items()
    )
    n_documents, n_bytes = (tables[0].num_rows, int(tables[0]["bytes"].to_numpy().sum())) if tables else (0, 0)
    overlap = max((r.metrics.get("validation_overlap", 0.0) for runs in groups.values() for r in runs), default=0.0)
    return Comparison(rows=rows, n_documents=n_documents, n_bytes=n_bytes, validation_overlap=overlap)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _engram_content(run: RunRecord) -> float | None:
    shuffled, own = run.metrics.get("bits_per_byte_shuffled"), run.metrics.get("bits_per_byte")
    return None if shuffled is None or own is None else shuffled - own


def _causal(runs: Sequence[RunRecord]) -> bool | None:
    """False if one run failed its audit, True if all that are evaluated passed."""
    if any(r.causal is False for r in runs):
        return False
    evaluated = [r for r in runs if is_evaluated(r)]
    return True if evaluated and all(r.causal for r in evaluated) else None


def _audit_remark(runs: Sequence[RunRecord]) -> str:
    if _causal(runs) is None:
        return "not audited for causality" if any(map(is_evaluated, runs)) else ""
    failures = audit_failures(runs)
    if not failures:
        return ""
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return f"not causal: {failures[0].rstrip('.')}{more}"


def audit_failures(runs: Sequence[RunRecord]) -> list[str]:
    """Failed audit tests of all runs, each once."""
    failures = list(dict.fromkeys(f for r in runs for f in r.audit_failures))
    return failures or (["the audit failed"] if any(r.causal is False for r in runs) else [])


def _status_remark(runs: Sequence[RunRecord]) -> str:
    """``seed 1 failed: out of memory; seeds 2, 3 missing``."""
    seeds_of: dict[str, list[int]] = {}
    for run in runs:
        if not is_evaluated(run):
            seeds_of.setdefault(describe_status(run), []).append(run.seed)
    if len(seeds_of) == 1 and not any(map(is_evaluated, runs)):
        return next(iter(seeds_of))
    return "; ".join(f"seed{'s' * (len(s) > 1)} {', '.join(map(str, s))} {state}" for state, s in seeds_of.items())


def describe_status(record: RunRecord) -> str:
    """``finished``, or ``failed: the reason``."""
    if record.status == "finished" and record.documents is None:
        return "finished, but never evaluated"
    if record.status == "finished" and not is_evaluated(record):
        return "finished, but its loss is not finite"
    return f"{record.status}: {record.reason}" if record.reason else record.status


def _estimates(
    groups: Mapping[str, Sequence[RunRecord]], numerator: str, denominator: str, baseline: int | None = None
) -> dict[str, Estimate]:
    """Ratios of the presets that have any evaluated run."""
    scores = {}
    for preset, runs in groups.items():
        tables = {r.seed: r.documents for r in runs if r.documents is not None and is_evaluated(r)}
        if tables:
            scores[preset] = Scores(
                seeds=tuple(tables),
                numerators=np.stack([t[numerator].to_numpy() for t in tables.values()]).astype(np.float64),
                denominators=next(iter(tables.values()))[denominator].to_numpy().astype(np.float64),
            )
    return dict(zip(scores, bootstrap(list(scores.values()), baseline=baseline), strict=True))


def _map(interval: Interval, function: Callable[[float], float]) -> Interval:
    """An increasing function of an interval; percentiles go through it unchanged."""
    value, low, high = (float(function(x)) for x in (interval.value, interval.low, interval.high))
    return Interval(value=value, low=low, high=high)


def bits_per_byte(documents: pa.Table) -> float:
    """One run's score on its documents."""
    return _bits(documents["text_nats"].to_numpy().sum() / documents["bytes"].to_numpy().sum())


def _bits(nats: float) -> float:
    return nats / log(2)
