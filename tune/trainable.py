"""A Tune trainable over :func:`hrs.cluster.trial.run_trial`, on actors that stay warm from trial to trial."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ray import tune

from hrs.cluster.progress import TrialProgress
from hrs.cluster.trial import TrialSpec, run_trial
from hrs.errors import reason_of


class Trial(tune.Trainable):
    """Drives one trial at a time; ``reset_config`` lets Tune reuse the process, which saves seconds of imports.

    Checkpoints are the trial's own business: Tune's are not used, so its trial ids, which change on a restart, name
    nothing.
    """

    def setup(self, config: Mapping[str, Any]) -> None:
        self._progress: Iterator[TrialProgress] = run_trial(self.spec(config))
        self._step = 0

    def spec(self, config: Mapping[str, Any]) -> TrialSpec:
        """The trial that Tune's parameters stand for."""
        return TrialSpec.from_json(config["trial"])

    def advance(self) -> TrialProgress:
        """The next report that Tune should see."""
        return next(self._progress)

    def step(self) -> dict[str, Any]:
        """Return the next report. What the trial itself raises is the last one: to do it again would end the same.

        Tune's own retries are left to trials that are lost: killed, or gone with their node.
        """
        try:
            progress = self.advance()
        except Exception as error:
            progress = TrialProgress(stage="failed", step=self._step, steps=self._step, reason=reason_of(error))
        self._step = progress.step
        return asdict(progress) | {"done": progress.is_last}

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self._progress.close()  # type: ignore[attr-defined]  # a generator: ends the tracked run if it was not done

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the trial's checkpoints lie below its own run directory."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, for the same reason."""
