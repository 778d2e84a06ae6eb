"""A sampled schedule is exactly what is run and exactly what is printed."""

import dataclasses

import pytest
from ray.tune.search.sample import Domain

from hrs.cluster.study import Run
from hrs.cluster.trial import TrialSpec
from hrs.config import override
from hrs.presets import experiment
from hrs.training import Runtime
from tune.schedule_search import Outcome, Sampled, overrides_of, search_space, spec_of

SAMPLE = {
    "training.schedule.peak_lr": 0.00123456,
    "training.schedule.warmup_frac": 0.1,
    "training.schedule.shape": "wsd",
    "training.schedule.floor_frac": 0.05,
    "training.schedule.decay_frac": 0.3,
    "training.schedule.hold_frac": 0.2,
    "phase_multiplier.expert": 2.0,
}


def test_every_sample_of_the_space_is_a_valid_config() -> None:
    config = experiment("full_hrs", "micro")
    space = search_space(config)
    for _ in range(50):
        sample = {name: domain.sample() for name, domain in space.items() if isinstance(domain, Domain)}
        override(config, overrides_of(sample, config))


def test_presets_without_phases_have_no_phase_factors() -> None:
    assert not [name for name in search_space(experiment("dense_baseline", "micro")) if name.startswith("phase")]


def test_overrides_round_trip_through_the_command_line() -> None:
    """What lr_search prints can be pasted into --set, and gives the run that was measured."""
    config = experiment("full_hrs", "micro")
    changes = overrides_of(SAMPLE, config)
    assert override(config, changes) == override(config, {name: str(value) for name, value in changes.items()})
    changed = override(config, changes).training
    assert changed.schedule.peak_lr == 0.00123
    before = dict(config.training.phases[2].multipliers)
    assert dict(changed.phases[2].multipliers) == before | {"expert": 2 * before["expert"]}


def test_a_sampled_trial_is_known_by_its_own_content() -> None:
    config = experiment("full_hrs", "micro")
    base = TrialSpec(
        run=Run(key="base", config=config, data_fingerprint="f"), study_id="s", storage_root="/tmp", runtime=Runtime()
    )
    spec = spec_of({"base": base.to_json(), **SAMPLE})
    assert spec.run.key not in {
        "base",
        spec_of({"base": base.to_json(), **SAMPLE, "phase_multiplier.expert": 1.0}).run.key,
    }
    assert dataclasses.replace(spec, run=base.run) == base


def test_finished_trials_rank_before_stopped_ones() -> None:
    config = experiment("dense_baseline", "micro")

    def sampled(loss: float, finished: bool) -> Sampled:
        return Sampled(key=str(loss), config=config, overrides={}, validation_loss=loss, step=1, finished=finished)

    assert Outcome(trials=(sampled(2.0, True), sampled(1.0, False))).best == sampled(2.0, True)
    assert Outcome(trials=(sampled(1.0, False),)).best is None


def test_a_trial_spec_survives_its_journey() -> None:
    run = Run(key="k", config=experiment("full_hrs_refined_legacy", "tiny", seed=4), data_fingerprint="f")
    spec = TrialSpec(
        run=run,
        study_id="s",
        storage_root="/tmp",
        runtime=Runtime(micro_batch=4),
        card_frac=0.25,
        stop_outcome="stopped",
    )
    assert TrialSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("bad", ["cosinus", ""])
def test_a_wrong_shape_is_refused(bad: str) -> None:
    from hrs.errors import HRSError

    config = experiment("dense_baseline", "micro")
    with pytest.raises(HRSError, match="must be one of"):
        override(config, overrides_of({"training.schedule.shape": bad}, config))
