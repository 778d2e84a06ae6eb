"""Trials on a real Ray: packed on logical cards, retried when they fail, never in each other's way."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from hrs.cluster.hardware import Hardware
from hrs.cluster.plan import Plan, plan_runs
from hrs.cluster.study import Run, Study
from hrs.report.records import RunRecord
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.training import Runtime
from tune.sweep import RETRIES, run_plan, trial_resources

Overrides = dict[str, str]


@pytest.fixture
def run_of(small_corpus: Path) -> Callable[..., Run]:
    def make(preset: str = "dense_baseline", seed: int = 0, **changes: str) -> Run:
        overrides = {
            "data.corpus": f"jsonl:{small_corpus}",
            "data.tokenizer": "bpe:300",
            "training.steps": "12",
        } | {name.replace("__", "."): value for name, value in changes.items()}
        (run,) = Study(title="t", presets=(preset,), scale="micro", seeds=(seed,), overrides=overrides).runs()
        return run

    return make


def execute(plan: Plan, storage: Storage) -> list[RunRecord]:
    tracker = Tracker(storage)
    runs = [t.run for t in plan.trials]
    study_id = tracker.open_study("t", {run.key: run.config for run in runs})
    assert run_plan(plan, study_id, storage, Runtime())
    return tracker.records([run.key for run in runs])


def test_small_trials_share_logical_cards_and_finish(
    ray_local: ModuleType, run_of: Callable[..., Run], tmp_path: Path
) -> None:
    runs = [run_of(seed=seed) for seed in range(3)]
    hardware = Hardware(cpus=4, card_bytes=(2**31, 2**31))
    plan = plan_runs(runs, set(), hardware, Storage(tmp_path), Runtime())
    (share,) = {t.card_frac for t in plan.trials}
    assert 0 < share < 1
    assert trial_resources(plan.trials[0]).bundles == [{"CPU": 1.0, "GPU": share}]
    records = execute(plan, Storage(tmp_path))
    assert [r.status for r in records] == ["finished"] * 3
    assert all(r.causal for r in records)
    assert len({r.metrics["bits_per_byte"] for r in records}) == 3, "seeds differ"


def test_a_failing_trial_is_retried_then_reported_and_stops_no_other(
    ray_local: ModuleType, run_of: Callable[..., Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    diverging = run_of(training__schedule__peak_lr="1e30", training__optimizer__clip_norm="0")
    healthy = run_of(preset="full_hrs")
    plan = plan_runs([diverging, healthy], set(), Hardware(cpus=2), Storage(tmp_path), Runtime())
    failed, finished = execute(plan, Storage(tmp_path))
    assert (failed.status, finished.status) == ("failed", "finished")
    assert "not finite" in failed.reason
    printed = capfd.readouterr().out
    assert printed.count("tried again from its last checkpoint") == RETRIES
    assert printed.count("failed for good") == 1
    assert "Traceback" not in printed
