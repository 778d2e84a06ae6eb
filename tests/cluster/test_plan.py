"""The plan: what fits, what is done, what runs beside what."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from hrs.cluster.hardware import Hardware
from hrs.cluster.plan import Plan, TrialPlan, format_plan, lane_count, plan_runs
from hrs.cluster.study import Run, Study
from hrs.config import canonical_json
from hrs.errors import HRSError
from hrs.storage import Storage
from hrs.training import Runtime


@pytest.fixture
def runs(small_corpus: Path) -> list[Run]:
    overrides = {"data.corpus": f"jsonl:{small_corpus}", "data.tokenizer": "bpe:300"}
    study = Study(title="t", presets=("dense_baseline", "full_hrs"), scale="micro", seeds=(0, 1), overrides=overrides)
    return study.runs()


def test_runs_are_presets_times_seeds_with_distinct_keys(runs: list[Run]) -> None:
    assert [run.label for run in runs] == ["dense_baseline/0", "dense_baseline/1", "full_hrs/0", "full_hrs/1"]
    assert len({run.key for run in runs}) == 4


def test_a_changed_corpus_changes_every_key(runs: list[Run], small_corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(small_corpus.read_text().replace("sea 0", "sea zero"))
    overrides = {"data.corpus": f"jsonl:{other}", "data.tokenizer": "bpe:300"}
    changed = Study(title="t", presets=("dense_baseline",), scale="micro", seeds=(0,), overrides=overrides).runs()
    assert changed[0].data_fingerprint != runs[0].data_fingerprint
    assert changed[0].key != runs[0].key


def test_overridden_studies_have_names_of_their_own() -> None:
    plain = Study(title="v1", presets=("dense_baseline",), scale="tiny", seeds=(0,))
    changed = dataclasses.replace(plain, overrides={"training.steps": "7"})
    assert plain.name == "v1-tiny"
    assert changed.name.startswith("v1-tiny-")
    assert changed.name == dataclasses.replace(plain, overrides={"training.steps": "7"}).name


def test_an_empty_study_is_refused() -> None:
    with pytest.raises(HRSError, match="at least one preset and one seed"):
        Study(title="t", presets=("dense_baseline",), scale="tiny", seeds=())


def test_finished_started_and_new_runs_are_told_apart(runs: list[Run], tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    (storage.run(runs[1].key) / "checkpoints").mkdir(parents=True)
    plan = plan_runs(runs, {runs[0].key}, Hardware(cpus=2), storage, Runtime())
    assert [t.state for t in plan.trials] == ["finished", "resumes", "new", "new"]
    assert {t.run.key for t in plan.missing} == {run.key for run in runs[1:]}
    assert "1 of 4 finished before" in format_plan(plan)


def test_minutes_are_measured_once_a_run_of_that_shape_was(runs: list[Run], tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    directory = storage.run(runs[0].key)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(canonical_json(runs[0].config))
    (directory / "training.json").write_text(json.dumps({"tokens_per_second": 100.0}))
    plan = plan_runs(runs, set(), Hardware(cpus=2), storage, Runtime())
    tokens = runs[0].config.tokens_per_step * runs[0].config.training.steps
    same_shape, other_shape = plan.trials[1], plan.trials[2]
    assert same_shape.timing == "measured"
    assert same_shape.minutes == pytest.approx(1.2 * tokens / 100 / 60)
    assert other_shape.timing == "estimated"
    assert math.isfinite(other_shape.minutes)


def trial(run: Run, minutes: float, card_frac: float = 0.0) -> TrialPlan:
    return TrialPlan(
        run=run, state="new", micro_batch=1, accumulation=1, peak_bytes=0, cpus=1.0, card_frac=card_frac,
        minutes=minutes, timing="estimated",
    )  # fmt: skip


def test_cards_are_shared_by_as_many_trials_as_fit(runs: list[Run]) -> None:
    two_cards = Hardware(cpus=16, card_bytes=(2**34, 2**34))
    assert lane_count([trial(runs[0], 1, card_frac=0.3)], two_cards) == 6
    assert lane_count([trial(runs[0], 1, card_frac=0.51)], two_cards) == 2
    assert lane_count([trial(runs[0], 1, card_frac=0.3)], Hardware(cpus=4, card_bytes=(2**34,) * 2)) == 4
    assert lane_count([trial(runs[0], 1)], Hardware(cpus=3)) == 3


def test_longest_trials_come_first(runs: list[Run]) -> None:
    plan = Plan(hardware=Hardware(cpus=2), trials=tuple(trial(r, m) for r, m in zip(runs, (1, 4, 2, 3), strict=True)))
    assert [t.minutes for t in plan.missing] == [4, 3, 2, 1]


def test_the_makespan_is_that_of_the_simulated_queue(runs: list[Run], tmp_path: Path) -> None:
    plan = plan_runs(runs, set(), Hardware(cpus=2), Storage(tmp_path), Runtime())
    lanes: dict[int, float] = {}
    for t in sorted(plan.trials, key=lambda t: t.start_minutes):
        assert lanes.get(t.slot, 0.0) == pytest.approx(t.start_minutes)
        lanes[t.slot] = t.start_minutes + t.minutes
    assert plan.makespan_minutes == pytest.approx(max(lanes.values()))


def test_a_card_that_is_too_small_is_one_sentence(runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(HRSError, match=r"the GPU has 0\.50 GiB free") as caught:
        plan_runs(runs, set(), Hardware(cpus=2, card_bytes=(2**29,)), Storage(tmp_path), Runtime())
    assert "\n" not in str(caught.value)
