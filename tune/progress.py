"""One line per running trial, at a pace a person can read, on a terminal and in a job's log alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ray import tune

from hrs.cluster.progress import Pace, TrialProgress


class ProgressLines(tune.Callback):
    """Prints where every trial stands, and each loss of a worker and each failure."""

    def __init__(self, label: Callable[[Mapping[str, Any]], str], every_seconds: float = 10.0) -> None:
        self._label = label
        self._pace = Pace(every_seconds)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        progress = TrialProgress(**{f.name: result[f.name] for f in fields(TrialProgress)})
        label = self._label(trial.config)
        if self._pace.lets_through(label, progress, time.monotonic()):
            print(progress.line(label), flush=True)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        print(f"{self._label(trial.config):<28} failed: tried again from its last checkpoint", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        print(f"{self._label(trial.config):<28} failed for good", flush=True)
