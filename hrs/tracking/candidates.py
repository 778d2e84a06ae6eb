"""Which run of a study is the one to promote, and what speaks against each of the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a worker that only logs must not import the report, which brings its plots
    from hrs.report.records import RunRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One run of a study and why it is, or is not, the one to promote."""

    record: "RunRecord"
    verdict: str
    """``taken``, or in a few words what speaks against it."""


def judge(records: "Sequence[RunRecord]") -> tuple[Candidate, ...]:
    """Every run with its verdict, the ranked ones first by bits per byte. At most one is taken: the finished run that
    passed the causality audit and has the fewest."""
    reasons = {id(r): _against(r) for r in records}
    ranked = sorted(records, key=lambda r: (bool(reasons[id(r)]), r.metrics.get("bits_per_byte", float("inf"))))
    return tuple(
        Candidate(record=r, verdict=reasons[id(r)] or ("taken" if index == 0 else "more bits per byte"))
        for index, r in enumerate(ranked)
    )


def _against(record: "RunRecord") -> str:
    if record.status != "finished":
        return record.status
    if record.causal is None:
        return "not audited"
    if not record.causal:
        return "not causal: it sees what it predicts"
    return "" if "bits_per_byte" in record.metrics else "not evaluated"


def format_candidates(candidates: Sequence[Candidate]) -> str:
    """A table, one line per run."""
    header = ("run", "bits/byte", "causal", "status", "verdict")
    rows = [header]
    for c in candidates:
        bits = c.record.metrics.get("bits_per_byte")
        causal = {None: "-", True: "yes", False: "NO"}[c.record.causal]
        label = f"{c.record.preset}/{c.record.seed}"
        rows.append((label, "-" if bits is None else f"{bits:.4f}", causal, c.record.status, c.verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
