"""Search space of the learning-rate schedule, and the trial that reports at equal fractions of it.

All trials have the same number of steps and are compared by validation loss at the same share of their own schedule.
Loss curves of different shapes cross late (a schedule that decays early looks better early), so an early stop is a bet
against late decays, and two schedules that end within each other's noise are a tie.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from hrs import strict_json
from hrs.cluster.plan import Plan, lane_count
from hrs.cluster.progress import TrialProgress
from hrs.cluster.study import Run
from hrs.cluster.trial import TrialSpec
from hrs.config import ExperimentConfig, PhaseConfig, override
from hrs.identity import run_key
from hrs.storage import Storage
from hrs.training import Runtime
from tune.progress import ProgressLines
from tune.sweep import interruptible, run_config, trial_resources, trial_spec, tune_config
from tune.trainable import Trial

_SCHEDULE = "training.schedule."
_PHASE = "phase_multiplier."


def search_space(config: ExperimentConfig) -> dict[str, Any]:
    """Peak, warm-up, shape and floor around the config's own schedule; a factor per group where there are phases."""
    peak = config.training.schedule.peak_lr
    groups = sorted({group for phase in config.training.phases for group, _ in phase.multipliers})
    return {
        _SCHEDULE + "peak_lr": tune.loguniform(peak / 10, peak * 3),
        _SCHEDULE + "warmup_frac": tune.uniform(0.01, 0.2),
        _SCHEDULE + "shape": tune.choice(["cosine", "wsd", "cosine_hold_linear"]),
        _SCHEDULE + "floor_frac": tune.uniform(0.0, 0.3),
        _SCHEDULE + "decay_frac": tune.uniform(0.1, 0.4),
        _SCHEDULE + "hold_frac": tune.uniform(0.0, 0.3),
        **{_PHASE + group: tune.loguniform(0.25, 4.0) for group in groups if group != "backbone"},
    }


def overrides_of(sample: Mapping[str, Any], config: ExperimentConfig) -> dict[str, Any]:
    """Config fields that a sample stands for. Floats keep three digits, so that what is printed is what was run."""
    changes = {name: _rounded(value) for name, value in sample.items() if name.startswith(_SCHEDULE)}
    factors = {name.removeprefix(_PHASE): _rounded(v) for name, v in sample.items() if name.startswith(_PHASE)}
    if factors:
        phases = [dataclasses.asdict(_scaled(phase, factors)) for phase in config.training.phases]
        changes["training.phases"] = strict_json.dumps(phases, separators=(",", ":"))
    return changes


def _scaled(phase: PhaseConfig, factors: Mapping[str, float]) -> PhaseConfig:
    multipliers = tuple((group, _rounded(value * factors.get(group, 1.0))) for group, value in phase.multipliers)
    return dataclasses.replace(phase, multipliers=multipliers)


def _rounded(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


class ScheduleTrial(Trial):
    """A trial whose config is a base plus a sample; Tune sees it only where validation loss was taken."""

    _validation_loss = math.nan

    def spec(self, config: Mapping[str, Any]) -> TrialSpec:
        return spec_of(config)

    def advance(self) -> TrialProgress:
        for progress in self._progress:
            if math.isfinite(progress.validation_loss):
                self._validation_loss = progress.validation_loss
            if progress.stage == "done" or math.isfinite(progress.validation_loss):
                return dataclasses.replace(progress, validation_loss=self._validation_loss)
        raise StopIteration

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        self._validation_loss = math.nan
        return super().reset_config(new_config)


def spec_of(config: Mapping[str, Any]) -> TrialSpec:
    """The trial of Tune's parameters: ``base`` (a :class:`TrialSpec` as JSON) changed by the sampled fields."""
    base = TrialSpec.from_json(config["base"])
    sampled = override(base.run.config, overrides_of(config, base.run.config))
    run = Run(
        key=run_key(sampled, base.run.data_fingerprint), config=sampled, data_fingerprint=base.run.data_fingerprint
    )
    return dataclasses.replace(base, run=run)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One schedule that was tried."""

    key: str
    config: ExperimentConfig
    overrides: Mapping[str, Any]
    validation_loss: float
    """Nats per token, the last that was taken."""
    step: int
    """Where it was taken."""
    finished: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """All schedules, best first: those that came to their end, then those that were stopped."""

    trials: tuple[Sampled, ...]

    @property
    def best(self) -> Sampled | None:
        """The lowest validation loss at the end of a schedule; None if no trial came to its end."""
        return next((t for t in self.trials if t.finished), None)

    def table(self) -> str:
        """One line per trial: validation loss, the step it was taken at, and the sampled fields."""
        head = ("nats/token", "at step", "schedule")
        rows = [
            (
                f"{t.validation_loss:.4f}",
                f"{t.step}{'' if t.finished else ' (stopped)'}",
                " ".join(f"{k.removeprefix(_SCHEDULE)}={v}" for k, v in t.overrides.items() if k.startswith(_SCHEDULE)),
            )
            for t in self.trials
        ]
        return "\n".join(f"{a:<11} {b:<15} {c}" for a, b, c in (head, *rows))


def search_schedules(
    plan: Plan, study_id: str, storage: Storage, runtime: Runtime, *, samples: int, seed: int
) -> Outcome:
    """Let TPE (Bergstra et al. 2011) propose and ASHA (Li et al. 2020) stop schedules of the plan's only run."""
    (trial,) = plan.trials
    config = trial.run.config
    steps = config.training.steps
    base = dataclasses.replace(trial_spec(trial, study_id, storage, runtime), stop_outcome="stopped")
    tuner = tune.Tuner(
        tune.with_resources(ScheduleTrial, trial_resources(trial)),
        param_space={"base": base.to_json(), **search_space(config)},
        tune_config=tune_config(
            lambda sample: spec_of(sample).run.key,
            metric="validation_loss",
            mode="min",
            num_samples=samples,
            search_alg=OptunaSearch(seed=seed),
            max_concurrent_trials=lane_count([trial], plan.hardware),
            # One step past the end: at max_t ASHA would end a trial before its evaluation.
            scheduler=ASHAScheduler(
                time_attr="step", grace_period=max(1, steps // 4), max_t=steps + 1, reduction_factor=2
            ),
        ),
        run_config=run_config("schedule", storage, ProgressLines(lambda sample: spec_of(sample).run.key)),
    )
    with interruptible():
        results = tuner.fit()
    sampled = [_sampled(r, config) for r in results if r.metrics and "validation_loss" in r.metrics]
    return Outcome(trials=tuple(sorted(sampled, key=lambda s: (not s.finished, s.validation_loss))))


def _sampled(result: tune.Result, config: ExperimentConfig) -> Sampled:
    assert result.config is not None and result.metrics is not None
    run = spec_of(result.config).run
    return Sampled(
        key=run.key,
        config=run.config,
        overrides=overrides_of(result.config, config),
        validation_loss=result.metrics["validation_loss"],
        step=result.metrics["step"],
        finished=result.metrics["stage"] == "done",
    )
