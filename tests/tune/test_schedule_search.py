"""A sampled schedule is exactly what is run and exactly what is printed."""

import dataclasses
import math
import shlex
from types import SimpleNamespace

import pytest
from ray.tune.search.sample import Domain

from hrs.cluster.study import Run
from hrs.cluster.trial import TrialSpec
from hrs.config import override, parse_assignments, to_dict
from hrs.presets import experiment
from hrs.report import RunRecord
from hrs.report.search_table import as_overrides, best_of, ranked, search_table
from hrs.training import Runtime
from tune.schedule_search import MarkingASHA, RememberingSearch, overrides_of, search_space, spec_of

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


def drawn(key: str, status: str, *curve: tuple[int, float], peak_lr: float = 1e-3) -> RunRecord:
    """A run of 40 steps that a search drew."""
    config = experiment("dense_baseline", "micro", overrides={"training.steps": 40})
    sample = {name: value for name, value in SAMPLE.items() if not name.startswith("phase")}
    return RunRecord(
        key=key,
        preset="dense_baseline",
        scale="micro",
        seed=0,
        status=status,
        sample=sample | {"training.schedule.peak_lr": peak_lr},
        config=to_dict(config),
        history={"validation_loss": list(curve)},
    )


def test_only_a_finite_loss_at_the_end_of_a_schedule_competes() -> None:
    records = [
        drawn("diverged", "finished", (20, 0.5), (40, math.nan)),
        drawn("cut", "killed", (20, 0.1)),
        drawn("stopped", "stopped", (20, 1.0)),
        drawn("good", "finished", (20, 3.0), (40, 2.0)),
        drawn("short", "finished", (20, 0.2)),
        drawn("failed", "failed", (10, 0.3)),
    ]
    best = best_of(records)
    assert best is not None and best.key == "good"
    assert [r.key for r in ranked(records)[:2]] == ["good", "stopped"]
    assert best_of(records[:3]) is None
    lines = search_table(records).splitlines()
    assert "not finite at the end" in next(line for line in lines if "diverged" in line)
    assert not any("nan" in line.split()[0] for line in lines)


def test_what_a_search_prints_to_paste_is_what_was_run() -> None:
    config = experiment("full_hrs", "micro")
    run = override(config, overrides_of(SAMPLE, config))
    record = dataclasses.replace(drawn("k", "finished"), config=to_dict(run), sample=SAMPLE)
    pasted = parse_assignments(shlex.split(as_overrides(record))[1::2])
    assert experiment("full_hrs", "micro", overrides=pasted) == run


def test_a_continued_search_knows_what_was_drawn_and_runs_first_what_was_cut_off() -> None:
    known = [
        drawn("a", "finished", (40, 2.0), peak_lr=1e-3),
        drawn("b", "finished", (40, math.nan), peak_lr=2e-3),
        drawn("c", "stopped", (20, 5.0), peak_lr=4e-4),
        drawn("d", "killed", (20, 4.0), peak_lr=7e-4),
    ]
    space = search_space(experiment("dense_baseline", "micro"))
    fresh, continued = RememberingSearch([], 0), RememberingSearch(known, 0)
    for search in (fresh, continued):
        assert search.set_search_properties(None, None, dict(space))
    trials = continued._ot_study.get_trials()
    assert [t.value for t in trials if t.state.is_finished()] == [2.0, 1e6, 5.0]
    first = continued.suggest("1")
    assert first["training.schedule.peak_lr"] == 7e-4, "the one that was cut off"
    drawn_before = {fresh.suggest(str(i))["training.schedule.peak_lr"] for i in range(4)}
    assert continued.suggest("2")["training.schedule.peak_lr"] not in drawn_before


def test_a_continued_scheduler_judges_by_the_curves_of_the_session_before() -> None:
    stopped: list[tuple[str, int]] = []
    scheduler = MarkingASHA(
        40,
        [drawn("a", "finished", (10, 1.0), (40, 0.5)), drawn("b", "stopped", (10, 2.0))],
        lambda trial, step: stopped.append((trial.trial_id, step)),
    )
    assert stopped == [], "what an earlier session decided is not decided again"
    worse, better = SimpleNamespace(trial_id="worse"), SimpleNamespace(trial_id="better")
    for trial in (worse, better):
        scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, worse, {"step": 10, "validation_loss": 3.0}) == "STOP"
    assert scheduler.on_trial_result(None, better, {"step": 10, "validation_loss": 0.9}) == "CONTINUE"
    assert stopped == [("worse", 10)]


def test_a_trial_spec_survives_its_journey() -> None:
    run = Run(key="k", config=experiment("full_hrs_refined_legacy", "tiny", seed=4), data_fingerprint="f")
    spec = TrialSpec(
        run=run,
        study_id="s",
        storage_root="/tmp",
        runtime=Runtime(micro_batch=4),
        card_frac=0.25,
    )
    assert TrialSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("bad", ["cosinus", ""])
def test_a_wrong_shape_is_refused(bad: str) -> None:
    from hrs.errors import HRSError

    config = experiment("dense_baseline", "micro")
    with pytest.raises(HRSError, match="must be one of"):
        override(config, overrides_of({"training.schedule.shape": bad}, config))
