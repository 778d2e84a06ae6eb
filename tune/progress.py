"""One line per running trial, at a pace a person can read, on a terminal and in a job's log alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ray import tune

from hrs.cluster.progress import Pace, TrialProgress
from hrs.tracking import Outcome


class ProgressLines(tune.Callback):
    """Prints where every trial stands, and each loss of a worker and each failure."""

    def __init__(
        self,
        label: Callable[[Mapping[str, Any]], str],
        on_end: Callable[[Mapping[str, Any], Outcome, str], None] = lambda parameters, outcome, reason: None,
        every_seconds: float = 10.0,
    ) -> None:
        """``on_end`` is told of every trial that does not finish: its parameters, how it ended, and why."""
        self._label = label
        self._on_end = on_end
        self._pace = Pace(every_seconds)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        progress = TrialProgress(**{f.name: result[f.name] for f in fields(TrialProgress)})
        label = self._label(trial.config)
        if self._pace.lets_through(label, progress, time.monotonic()):
            print(progress.line(label), flush=True)
        if progress.stage == "failed":
            self._on_end(trial.config, "failed", progress.reason)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        print(f"{self._label(trial.config):<28} lost: started again from its last checkpoint", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        reason = why_lost(trial.get_error())
        print(f"{self._label(trial.config):<28} lost {trial.num_failures} times, given up: {reason}", flush=True)
        self._on_end(trial.config, "killed", reason)


def why_lost(error: BaseException | None) -> str:
    """Return one line on why Ray lost a trial, from what Ray says."""
    text = " ".join(str(error).split())
    if "OutOfMemoryError" in type(error).__name__ or "memory pressure" in text or "running low on memory" in text:
        return "the memory of its node was full, and Ray ended its process"
    if "node" in text and ("died" in text or "dead" in text) and "Worker exit" not in text:
        return "its node went away"
    return "its process was killed, or crashed"
