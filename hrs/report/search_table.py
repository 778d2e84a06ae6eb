"""A search's record: the runs that it drew, which of them compete, and the best one.

Runs are compared by the validation loss at the end of their schedules. One that was stopped early, failed, or ended
with a loss that is not finite stands in the table and competes with nothing.
"""

import math
from collections.abc import Sequence

from hrs import strict_json
from hrs.errors import HRSError
from hrs.report.records import RunRecord
from hrs.report.table import aligned

LOSS = "validation_loss"
_SCHEDULE = "training.schedule."
_OVER = ("finished", "stopped", "failed")


def is_search(records: Sequence[RunRecord]) -> bool:
    """Return True if a search drew these runs."""
    return any(record.sample for record in records)


def losses(record: RunRecord) -> list[tuple[int, float]]:
    """Return the finite validation losses (step, nats per token) of a run, in order of steps."""
    return [(step, loss) for step, loss in record.history.get(LOSS, ()) if math.isfinite(loss)]


def final_loss(record: RunRecord) -> float:
    """Return the validation loss at the end of a finished run's schedule in nats per token; NaN if there is none."""
    curve, steps = record.history.get(LOSS, []), record.config.get("training", {}).get("steps")
    return curve[-1][1] if record.status == "finished" and curve and curve[-1][0] == steps else math.nan


def is_over(record: RunRecord) -> bool:
    """Return True if a run needs no further work; one that was killed, or never ran, does."""
    return record.status in _OVER


def ranked(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs in the order of the table: those that compete, those that were stopped, and the rest."""

    def place(record: RunRecord) -> tuple[int, float]:
        if math.isfinite(loss := final_loss(record)):
            return 0, loss
        last = losses(record)[-1][1] if losses(record) else math.inf
        return (1 if record.status == "stopped" else 2), last

    return sorted(records, key=place)


def best_of(records: Sequence[RunRecord]) -> RunRecord | None:
    """Return the run with the lowest finite validation loss at the end of its schedule; None if there is none."""
    competing = [record for record in records if math.isfinite(final_loss(record))]
    return min(competing, key=final_loss, default=None)


def search_table(records: Sequence[RunRecord]) -> str:
    """Return one line per run: its last validation loss, the step it was taken at, its key, and what was drawn.

    Raises:
        HRSError: if there are no runs.
    """
    if not records:
        raise HRSError("there are no runs to report: the search has drawn none yet")
    return "\n".join(aligned([("nats/token", "at step", "run", "drawn"), *map(_row, ranked(records))]))


def _row(record: RunRecord) -> tuple[str, ...]:
    curve = losses(record)
    step, loss = (str(curve[-1][0]), f"{curve[-1][1]:.4f}") if curve else ("-", "-")
    if not math.isfinite(final_loss(record)):
        step += f" ({'not finite at the end' if record.status == 'finished' else record.status})"
    drawn = " ".join(f"{name.removeprefix(_SCHEDULE)}={_short(value)}" for name, value in record.sample.items())
    return loss, step, record.key, f"{drawn}  {record.reason}" if record.status == "failed" else drawn


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def as_overrides(record: RunRecord) -> str:
    """Return what was drawn for a run as ``--set`` arguments to paste into a shell."""
    training = record.config["training"]
    values = {n: training["schedule"][n.removeprefix(_SCHEDULE)] for n in record.sample if n.startswith(_SCHEDULE)}
    if any(not name.startswith(_SCHEDULE) for name in record.sample):
        values["training.phases"] = strict_json.dumps(training["phases"], separators=(",", ":"))
    return " ".join(f"--set '{name}={value}'" for name, value in values.items())
