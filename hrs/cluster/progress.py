"""Where a trial stands, as plain data and as one line a person can read."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialProgress:
    """One report of a running trial."""

    stage: Literal["waiting", "train", "evaluate", "audit", "done", "failed"]
    """``waiting``: another process has this run; ``done`` and ``failed`` are the last report."""
    step: int
    steps: int
    loss: float = math.nan
    """Mean training cross-entropy since the last report, in nats."""
    validation_loss: float = math.nan
    """Nats per token, if it was taken just now; with ``done`` the one of the last step, NaN if none was taken."""
    tokens_per_second: float = math.nan
    seconds_left: float = math.nan
    """Of the training, not of evaluation and audit."""
    reason: str = ""
    """With ``failed``, the sentence that says why; with ``waiting``, what for."""

    @property
    def is_last(self) -> bool:
        return self.stage in ("done", "failed")

    def line(self, label: str) -> str:
        """``full_hrs/0   120/300  40%  loss 4.123  7,310 tokens/s  1m02s left``, or the stage after training."""
        if self.stage != "train":
            stage = {"done": "finished"}.get(self.stage, self.stage)
            return f"{label:<28} {stage}: {self.reason}" if self.reason else f"{label:<28} {stage}"
        return (
            f"{label:<28} {self.step:>6}/{self.steps} {self.step / self.steps:>4.0%}  loss {self.loss:.3f}  "
            f"{self.tokens_per_second:,.0f} tokens/s  {format_seconds(self.seconds_left)} left"
        )


_DAYS_FROM_SECONDS = 4 * 86400
"""Hours say little of what takes longer."""


def format_seconds(seconds: float) -> str:
    """``12 days``, ``1h02m``, ``3m05s`` or ``12s``."""
    if not math.isfinite(seconds):
        return "?"
    if seconds >= _DAYS_FROM_SECONDS:
        return f"{seconds / 86400:,.0f} days"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Pace:
    """Lets one line per label through every so many seconds, and every line that reports more than going on."""

    def __init__(self, every_seconds: float = 10.0) -> None:
        self.every_seconds = every_seconds
        self._printed_at: dict[str, float] = {}

    def lets_through(self, label: str, progress: TrialProgress, now: float) -> bool:
        """Whether to print now (a monotonic time in seconds)."""
        if progress.stage in ("train", "waiting") and now - self._printed_at.get(label, -math.inf) < self.every_seconds:
            return False
        self._printed_at[label] = now
        return True
