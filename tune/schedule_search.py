"""Search space of the learning-rate schedule, and the trial that reports at equal fractions of it.

All trials have the same number of steps and are compared by validation loss at the same share of their own schedule.
Loss curves of different shapes cross late (a schedule that decays early looks better early), so an early stop is a bet
against late decays, and two schedules that end within each other's noise are a tie.

What was drawn and how it went is the study's list and the tracked runs (:mod:`hrs.report.search_table`). A search that
is continued gives all of it to the sampler and to the scheduler, runs first what was cut off, and draws only the rest.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from hrs import strict_json
from hrs.cluster.plan import Plan, lane_count
from hrs.cluster.progress import TrialProgress
from hrs.cluster.study import Run
from hrs.cluster.trial import TrialSpec, mark_stopped
from hrs.config import ExperimentConfig, PhaseConfig, override
from hrs.identity import run_key
from hrs.report.records import RunRecord
from hrs.report.search_table import final_loss, is_over, losses
from hrs.storage import Storage
from hrs.training import Runtime
from tune.progress import ProgressLines
from tune.sweep import Endings, experiment_folder, fit, run_config, trial_resources, trial_spec, tune_config
from tune.trainable import Trial

_SCHEDULE = "training.schedule."
_PHASE = "phase_multiplier."
_METRIC = "validation_loss"
_WORST_LOSS = 1e6
"""Nats per token that sampler and scheduler are told of a run without a finite loss: they reckon with what they get."""


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


def sample_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was drawn, of all of Tune's parameters."""
    return {name: value for name, value in parameters.items() if name.startswith((_SCHEDULE, _PHASE))}


def spec_of(config: Mapping[str, Any]) -> TrialSpec:
    """The trial of Tune's parameters: ``base`` (a :class:`TrialSpec` as JSON) changed by the sampled fields."""
    base = TrialSpec.from_json(config["base"])
    sampled = override(base.run.config, overrides_of(config, base.run.config))
    run = Run(
        key=run_key(sampled, base.run.data_fingerprint), config=sampled, data_fingerprint=base.run.data_fingerprint
    )
    return dataclasses.replace(base, run=run)


class ScheduleTrial(Trial):
    """A trial whose config is a base plus a sample; Tune sees it only where validation loss was taken."""

    def spec(self, config: Mapping[str, Any]) -> TrialSpec:
        return spec_of(config)

    def advance(self) -> TrialProgress:
        for progress in self._progress:
            if progress.is_last or math.isfinite(progress.validation_loss):
                return progress
        raise StopIteration

    def step(self) -> dict[str, Any]:
        result = super().step()
        if result["stage"] == "failed" or not math.isfinite(result[_METRIC]):
            result[_METRIC] = _WORST_LOSS
        return result


# ---- what is known already -------------------------------------------------------------------------------------------


class RememberingSearch(OptunaSearch):
    """TPE (Bergstra et al. 2011) that begins with the runs of an earlier session."""

    def __init__(self, known: Sequence[RunRecord], seed: int) -> None:
        """``known``: the runs that were drawn before. Those that are over are evaluated points; the others, which were
        cut off, are proposed first."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # With the seed of the session before, the first draws would be those that it made.
        super().__init__(metric=_METRIC, mode="min", seed=seed + 1000 * len(known))
        self._known = known

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        fresh = super().set_search_properties(metric, mode, config, **spec)
        for record in self._known if fresh else ():
            if record.sample.keys() == self._space.keys():
                if is_over(record):
                    self.add_evaluated_point(dict(record.sample), told_loss(record))
                else:
                    self._ot_study.enqueue_trial(dict(record.sample))
        return fresh


def told_loss(record: RunRecord) -> float:
    """Return the loss of a run that is over as the sampler is told it: at its end, or where it was stopped."""
    loss = final_loss(record)
    if record.status == "stopped" and losses(record):
        loss = losses(record)[-1][1]
    return loss if math.isfinite(loss) else _WORST_LOSS


class MarkingASHA(ASHAScheduler):
    """ASHA (Li et al. 2020) that knows the curves of an earlier session, and marks the runs that it stops."""

    def __init__(self, steps: int, known: Sequence[RunRecord], mark: Callable[[Any, int], None]) -> None:
        """``mark`` is called with the stopped trial and its step, before the trial is told."""
        # One step past the end: at max_t ASHA would end a trial before its evaluation.
        super().__init__(
            time_attr="step",
            metric=_METRIC,
            mode="min",
            grace_period=max(1, steps // 4),
            max_t=steps + 1,
            reduction_factor=2,
        )
        self._mark: Callable[[Any, int], None] = lambda trial, step: None
        for record in known:
            trial = SimpleNamespace(trial_id=record.key)
            self.on_trial_add(None, trial)
            for step, loss in losses(record):
                self.on_trial_result(None, trial, {"step": step, _METRIC: loss})
            self.on_trial_remove(None, trial)
        self._mark = mark

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self._mark(trial, result["step"])
        return decision


class _Listing(tune.Callback):
    """Writes down every run that was drawn before it starts."""

    def __init__(self, note: Callable[[Run, dict[str, Any]], None]) -> None:
        self._note = note

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note(spec_of(trial.config).run, sample_of(trial.config))


# ---- the search ------------------------------------------------------------------------------------------------------


def search_schedules(
    plan: Plan,
    study_id: str,
    storage: Storage,
    runtime: Runtime,
    *,
    samples: int,
    seed: int,
    known: Sequence[RunRecord],
    note: Callable[[Run, dict[str, Any]], None],
) -> bool:
    """Draw and run schedules of the plan's only run until ``samples`` of them are over.

    Args:
        known: the runs of this search so far; they count.
        note: called with every run that was drawn and its sample, before the run starts.

    Returns:
        True if the search came to its end, False if it was interrupted.
    """
    (trial,) = plan.trials
    config = trial.run.config
    base = trial_spec(trial, study_id, storage, runtime)
    endings = Endings(lambda sample: spec_of(sample).run)
    lines = ProgressLines(lambda sample: spec_of(sample).run.key, endings.add)

    def mark(stopped: Any, step: int) -> None:
        mark_stopped(storage, spec_of(stopped.config).run.key, step)

    with experiment_folder("schedule", storage) as name:
        tuner = tune.Tuner(
            tune.with_resources(ScheduleTrial, trial_resources(trial)),
            param_space={"base": base.to_json(), **search_space(config)},
            tune_config=tune_config(
                lambda sample: spec_of(sample).run.key,
                num_samples=samples - sum(map(is_over, known)),
                search_alg=RememberingSearch(known, seed),
                max_concurrent_trials=lane_count([trial], plan.hardware),
                scheduler=MarkingASHA(config.training.steps, known, mark),
            ),
            run_config=run_config(name, storage, [lines, _Listing(note)]),
        )
        completed = fit(tuner, storage)
    endings.record(study_id, storage)
    return completed
