"""Trials on a real Ray: packed on logical GPUs, retried when they fail, never in each other's way."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from hrs.cluster.hardware import Hardware, described_node
from hrs.cluster.plan import Plan, plan_runs
from hrs.cluster.study import Run, Study
from hrs.cluster.workers import reserved_runtime
from hrs.gpu import Nvml
from hrs.report.records import RunRecord
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.training import Runtime
from tune.sweep import run_plan, trial_resources, trial_spec

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
    assert run_plan(plan, study_id, storage, Runtime(device="cpu"))  # where Ray's GPUs are only numbers
    return tracker.records([run.key for run in runs])


def test_small_trials_share_logical_gpus_and_finish(
    ray_local: ModuleType, run_of: Callable[..., Run], tmp_path: Path
) -> None:
    runs = [run_of(seed=seed) for seed in range(3)]
    hardware = Hardware(cpus=4, nodes=(described_node(2, 2.0, "logical", cpus=4),))
    plan = plan_runs(runs, set(), hardware, Storage(tmp_path), Runtime())
    (share,) = {t.gpu_frac for t in plan.trials}
    assert 0 < share < 1
    assert trial_resources(plan.trials[0]).bundles == [{"CPU": 1.0, "GPU": share}]
    records = execute(plan, Storage(tmp_path))
    assert [r.status for r in records] == ["finished"] * 3
    assert all(r.causal for r in records)
    assert len({r.metrics["bits_per_byte"] for r in records}) == 3, "seeds differ"


def test_trials_run_on_the_nodes_that_the_plan_names(
    ray_local: ModuleType, run_of: Callable[..., Run], tmp_path: Path
) -> None:
    node_id = ray_local.get_runtime_context().get_node_id()
    here = replace(described_node(2, 24.0, "here", cpus=4), node_id=node_id, announced=False)
    later = described_node(1, 2.0, "later", cpus=4)
    plan = plan_runs([run_of()], set(), Hardware(cpus=8, nodes=(here, later)), Storage(tmp_path), Runtime())
    assert plan.trials[0].nodes == f"in({node_id})"
    resources = trial_resources(plan.trials[0])
    group = resources.to_placement_group()
    assert group.wait(30)
    ray_local.util.remove_placement_group(group)
    elsewhere = trial_resources(replace(plan.trials[0], nodes=f"!in({node_id})")).to_placement_group()
    assert elsewhere != group and not elsewhere.wait(1), "no other node is alive"
    ray_local.util.remove_placement_group(elsewhere)


def test_who_reserves_no_gpu_uses_the_cpu(ray_local: ModuleType) -> None:
    def device() -> str:
        return reserved_runtime().device

    none, half = (ray_local.remote(num_cpus=1, num_gpus=gpus)(device).remote() for gpus in (0, 0.5))
    assert ray_local.get([none, half], timeout=120) == ["cpu", "auto"]
    assert reserved_runtime().device == "cpu", "the driver reserves none"


def test_planned_trials_carry_the_device_that_they_reserve(run_of: Callable[..., Run], tmp_path: Path) -> None:
    machines = Hardware(cpus=4), Hardware(cpus=4, nodes=(described_node(1, 24.0, "A10G", cpus=4),))
    storage = Storage(tmp_path)
    plans = (plan_runs([run_of()], set(), machine, storage, Runtime()) for machine in machines)
    without, gpu = (trial_spec(plan.trials[0], "s", storage, Runtime()) for plan in plans)
    assert (without.runtime.device, without.card_frac) == ("cpu", 0.0)
    assert gpu.runtime.device == "cuda"
    assert gpu.card_frac == pytest.approx(0.9), "a share of all memory, where the plan's is one of what is free"


@pytest.mark.skipif(Nvml().device_count() > 0, reason="the GPUs of this machine are more than numbers")
def test_a_cluster_of_logical_gpus_has_none(ray_local: ModuleType) -> None:
    hardware = Hardware.of_cluster(ray_local.cluster_resources())
    assert (hardware.cpus, hardware.nodes) == (4, ())


def test_a_trial_that_fails_by_itself_is_not_tried_again_and_stops_no_other(
    ray_local: ModuleType, run_of: Callable[..., Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    diverging = run_of(training__schedule__peak_lr="1e30", training__optimizer__clip_norm="0")
    healthy = run_of(preset="full_hrs")
    plan = plan_runs([diverging, healthy], set(), Hardware(cpus=2), Storage(tmp_path), Runtime())
    failed, finished = execute(plan, Storage(tmp_path))
    assert (failed.status, finished.status) == ("failed", "finished")
    assert "not finite" in failed.reason
    printed = capfd.readouterr().out
    assert "started again" not in printed
    assert printed.count("failed: ") == 1 and "not finite" in printed
    assert "Traceback" not in printed
