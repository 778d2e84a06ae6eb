"""The plan: what fits, what is done, what runs beside what."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from hrs.cluster import timing
from hrs.cluster.hardware import (
    GpuNode,
    Hardware,
    announced_nodes,
    offers_gpus,
    parse_gpus,
    with_announced,
)
from hrs.cluster.plan import Plan, TrialPlan, format_plan, lane_count, plan_runs
from hrs.cluster.study import Run, Study
from hrs.cluster.timing import DEVICE_FILE, gpu_speed, time_on_gpu
from hrs.config import canonical_json
from hrs.errors import HRSError
from hrs.gpu import GpuProperties
from hrs.presets import experiment
from hrs.storage import Storage
from hrs.training import Runtime
from hrs.training.memory import predict_peak
from hrs.training.runtime import DEFAULT_RUNTIME
from jobs.ablation_sweep import parse, study_of
from tests.simulated_gpu import SimulatedGpu, simulated_gpus


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


def test_the_key_of_a_run_does_not_depend_on_where_its_text_lies(
    runs: list[Run], small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / small_corpus.name).write_bytes(small_corpus.read_bytes())
    monkeypatch.chdir(tmp_path)
    overrides = {"data.corpus": f"jsonl:{small_corpus.name}", "data.tokenizer": "bpe:300"}
    study = Study(title="t", presets=("dense_baseline",), scale="micro", seeds=(0,), overrides=overrides)
    (moved,) = study.runs()
    assert moved.key == runs[0].key
    assert moved.config.data.corpus == f"jsonl:{tmp_path / small_corpus.name}", "workers have other directories"
    tokenizer = dict(overrides, **{"data.tokenizer": "bpe:301"})
    assert dataclasses.replace(study, overrides=tokenizer).runs()[0].key != runs[0].key


def test_overridden_studies_have_names_of_their_own() -> None:
    plain = Study(title="v1", presets=("dense_baseline",), scale="tiny", seeds=(0,))
    changed = dataclasses.replace(plain, overrides={"training.steps": "7"})
    assert plain.name == "v1-tiny"
    assert changed.name.startswith("v1-tiny-")
    assert changed.name == dataclasses.replace(plain, overrides={"training.steps": "7"}).name


def test_studies_of_chosen_presets_have_names_of_their_own_unless_they_were_named() -> None:
    def name(*arguments: str) -> str:
        return study_of(parse(list(arguments))).name

    one, other = name("--presets", "dense_baseline,full_hrs"), name("--presets", "dense_baseline,dual_head")
    assert one != other and one.startswith("custom-tiny-")
    assert one == name("--presets", "dense_baseline,full_hrs", "--seeds", "3"), "more seeds are more of the same"
    assert name("--presets", "dense_baseline", "--name", "mine") == "mine-tiny"
    assert name("--study", "v1", "--seeds", "2") == "v1-tiny"


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
    assert same_shape.minutes == pytest.approx((tokens / 100 + timing.EVALUATION_SECONDS) / 60)
    assert other_shape.timing == "estimated"
    assert timing.EVALUATION_SECONDS / 60 < other_shape.minutes < math.inf, "a whole split is scored after few steps"

    (directory / DEVICE_FILE).write_text(json.dumps({"device": "cpu", "tenants": 1, "evaluation_seconds": 30.0}))
    timing._measured.cache_clear()
    again = plan_runs(runs, set(), Hardware(cpus=2), storage, Runtime()).trials[1]
    assert again.minutes == pytest.approx((tokens / 100 + 30) / 60)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", ""),
        ("config.json", '{"later_field": 1}'),
        ("training.json", '{"tokens_per'),
        ("training.json", "[]"),
        ("device.json", ""),
        ("device.json", "{}"),
    ],
)
def test_one_bad_file_of_an_old_run_is_named_and_blocks_no_plan(
    name: str, content: str, runs: list[Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(tmp_path)
    for run, speed in zip(runs[:2], (100.0, 50.0), strict=True):
        directory = storage.run(run.key)
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(canonical_json(run.config))
        (directory / "training.json").write_text(json.dumps({"tokens_per_second": speed}))
    (storage.run(runs[0].key) / name).write_text(content)
    plan = plan_runs(runs[:1], set(), Hardware(cpus=2), storage, Runtime())
    tokens = runs[0].config.tokens_per_step * runs[0].config.training.steps
    assert plan.trials[0].minutes == pytest.approx(1.2 * tokens / 50 / 60), "the other run's speed counts"
    assert f"the speed of run {runs[0].key} is not known" in caplog.text


def trial(run: Run, minutes: float, gpu_frac: float = 0.0) -> TrialPlan:
    return TrialPlan(
        run=run, state="new", micro_batch=1, accumulation=1, peak_bytes=0, cpus=1.0, gpu_frac=gpu_frac,
        minutes=minutes, timing="estimated",
    )  # fmt: skip


def machine(*gib: float, cpus: int = 16, name: str = "NVIDIA RTX 4080", used: float = 0.0) -> GpuNode:
    """Return a living node with GPUs of these sizes, of each of which ``used`` GiB are in use."""
    gpus = tuple(
        GpuProperties(
            index=i,
            name=name,
            total_bytes=int(size * 2**30),
            free_bytes=int((size - used) * 2**30),
            capability=(8, 9),
        )
        for i, size in enumerate(gib)
    )
    return GpuNode(gpus=gpus, cpus=cpus, node_id=f"{name}-{gib}-{used}".replace(" ", "").lower())


def test_gpus_are_shared_by_as_many_trials_as_fit(runs: list[Run]) -> None:
    two = Hardware(cpus=16, nodes=(machine(16, 16),))
    assert lane_count([trial(runs[0], 1, gpu_frac=0.3)], two) == 6
    assert lane_count([trial(runs[0], 1, gpu_frac=0.51)], two) == 2
    assert lane_count([trial(runs[0], 1, gpu_frac=0.3)], Hardware(cpus=4, nodes=(machine(16, 16, cpus=4),))) == 4
    assert lane_count([trial(runs[0], 1)], Hardware(cpus=3)) == 3


def test_longest_trials_come_first(runs: list[Run]) -> None:
    plan = Plan(hardware=Hardware(cpus=2), trials=tuple(trial(r, m) for r, m in zip(runs, (1, 4, 2, 3), strict=True)))
    assert [t.minutes for t in plan.missing] == [4, 3, 2, 1]


def test_the_makespan_is_that_of_the_simulated_queue(runs: list[Run], tmp_path: Path) -> None:
    plan = plan_runs(runs, set(), Hardware(cpus=2), Storage(tmp_path), Runtime())
    lanes: dict[int, float] = {}
    for t in sorted(plan.trials, key=lambda t: t.start_minutes):
        assert lanes.get(t.slot, 0.0) == pytest.approx(t.start_minutes)
        assert t.end_minutes == pytest.approx(t.start_minutes + t.minutes)
        lanes[t.slot] = t.end_minutes
    assert plan.makespan_minutes == pytest.approx(max(lanes.values()))


def test_a_gpu_that_is_too_small_is_one_sentence(runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(HRSError, match=r"needs \d\.\d\d GiB at micro-batch 1 and .* has 0\.50 GiB") as caught:
        plan_runs(runs, set(), Hardware(cpus=2, nodes=(machine(0.5),)), Storage(tmp_path), Runtime())
    assert "\n" not in str(caught.value)


def test_a_run_that_fits_nowhere_stops_no_other_and_says_why(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = runs[0], runs[2]
    peaks = [predict_peak(run.config, 1, Runtime(device="cpu")) for run in (small, large)]
    assert peaks[0] < peaks[1]
    memory = SimpleNamespace(available=2 * sum(peaks) // 2)  # for two cores
    monkeypatch.setattr("hrs.cluster.plan.psutil.virtual_memory", lambda: memory)
    storage = Storage(tmp_path)
    plan = plan_runs([small, large], set(), Hardware(cpus=2), storage, Runtime())
    assert [t.run for t in plan.missing] == [small]
    ((refused, reason),) = plan.refused
    assert refused == large and "at micro-batch 1" in reason
    assert f"{large.label}  left out: {reason}" in format_plan(plan)
    with pytest.raises(HRSError, match="at micro-batch 1"):
        plan_runs([large], set(), Hardware(cpus=2), storage, Runtime())
    done = plan_runs([small, large], {large.key}, Hardware(cpus=2), storage, Runtime())
    assert not done.refused and [t.state for t in done.trials] == ["new", "finished"]


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def plan_of(runs: list[Run], tmp_path: Path, *nodes: GpuNode, runtime: Runtime = DEFAULT_RUNTIME) -> Plan:
    return plan_runs(runs, set(), Hardware(cpus=sum(n.cpus for n in nodes), nodes=nodes), Storage(tmp_path), runtime)


def test_a_plan_packs_the_memory_that_is_free(runs: list[Run], tmp_path: Path) -> None:
    empty, busy = machine(2), machine(2, used=1.0)
    alone, beside = plan_of(runs[:1], tmp_path, empty).trials[0], plan_of(runs[:1], tmp_path, busy).trials[0]
    assert beside.peak_bytes == alone.peak_bytes <= 2**30
    four = [plan_of(runs, tmp_path, node).trials[0] for node in (empty, busy)]
    assert four[1].gpu_frac > four[0].gpu_frac, "a larger share of what is left"
    for trial, node in zip(four, (empty, busy), strict=True):
        assert trial.tenants * trial.memory_frac * 2 * 2**30 <= node.limit_bytes
        assert trial.memory_frac * 2 * 2**30 >= trial.peak_bytes
    assert "GPU 0: NVIDIA RTX 4080, 2 GiB, 1.0 GiB free" in format_plan(plan_of(runs, tmp_path, busy))


def test_each_run_goes_to_a_kind_of_gpu_that_it_fits(runs: list[Run], tmp_path: Path) -> None:
    """A small GPU neither shrinks the plan for a large one nor is left idle."""
    small, large = machine(1.5, name="NVIDIA T1000"), machine(16, name="NVIDIA RTX 4090")
    plan = plan_of(runs, tmp_path, small, large)
    assert {t.nodes for t in plan.trials} <= {f"in({small.node_id})", f"in({large.node_id})"}
    assert len({t.pool for t in plan.trials}) == 2
    for t in plan.trials:
        pool = plan.hardware.pools[t.pool]
        assert t.peak_bytes <= pool.limit_bytes
        assert t.nodes == f"in({pool.nodes[0].node_id})"
    assert "of NVIDIA RTX 4090 16 GiB" in format_plan(plan)


def test_a_run_that_fits_one_kind_alone_waits_for_it(runs: list[Run], tmp_path: Path) -> None:
    small, large = machine(0.5, 0.5, 0.5), machine(16, name="NVIDIA RTX 4090")
    plan = plan_of(runs[:2], tmp_path, small, large)
    assert {plan.hardware.pools[t.pool].kind for t in plan.trials} == {"NVIDIA RTX 4090 16 GiB"}


def test_ray_cannot_choose_within_a_node_so_the_smallest_gpu_counts(runs: list[Run], tmp_path: Path) -> None:
    mixed = plan_of(runs, tmp_path, machine(2, 16))
    smallest = plan_of(runs, tmp_path, machine(2, 2))
    assert [(t.micro_batch, t.gpu_frac) for t in mixed.trials] == [(t.micro_batch, t.gpu_frac) for t in smallest.trials]
    with pytest.raises(HRSError, match=r"It fits GPU 1, but Ray cannot choose .* CUDA_VISIBLE_DEVICES=1"):
        plan_of(runs, tmp_path, machine(0.5, 16))


def test_equal_machines_are_one_pool_and_any_of_them_will_do(runs: list[Run], tmp_path: Path) -> None:
    plan = plan_of(runs, tmp_path, machine(16, used=0.2), machine(16, used=0.9))
    (pool,) = plan.hardware.pools
    assert (pool.count, pool.cpus) == (2, 32)
    assert pool.limit_bytes == int(15.1 * 2**30)
    assert {t.nodes for t in plan.trials} == {""}


def test_few_runs_are_spread_over_the_gpus(runs: list[Run], tmp_path: Path) -> None:
    """Ray fills one GPU before it takes the next."""
    assert {t.gpu_frac for t in plan_of(runs[:2], tmp_path, machine(16, 16)).trials} == {1.0}
    assert {t.gpu_frac for t in plan_of(runs, tmp_path, machine(16, 16)).trials} == {0.5}


def test_copies_of_a_search_share_gpus(runs: list[Run], tmp_path: Path) -> None:
    hardware = Hardware(cpus=16, nodes=(machine(16),))
    one, many = (
        plan_runs(runs[:1], set(), hardware, Storage(tmp_path), Runtime(), copies=copies).trials[0] for copies in (1, 8)
    )
    assert one.gpu_frac == 1.0
    assert many.gpu_frac <= 1 / 8


def test_runs_on_one_gpu_take_turns_in_the_makespan(runs: list[Run], tmp_path: Path) -> None:
    one, two = (plan_of(runs, tmp_path, machine(*[16] * n)) for n in (1, 2))
    busy = sum(t.minutes * t.busy_frac for t in one.trials)
    assert one.makespan_minutes >= busy
    assert all(t.start_minutes == 0 for t in one.trials), "they fit side by side"
    assert two.makespan_minutes <= one.makespan_minutes
    assert all(t.end_minutes >= t.start_minutes + t.minutes - 1e-9 for t in one.trials)


def test_with_device_cpu_the_gpus_are_left_alone(runs: list[Run], tmp_path: Path) -> None:
    plan = plan_of(runs, tmp_path, machine(16), runtime=Runtime(device="cpu"))
    assert {t.gpu_frac for t in plan.trials} == {0.0}
    assert not plan.hardware.nodes


def test_speeds_count_only_for_the_device_they_were_measured_on(runs: list[Run], tmp_path: Path) -> None:
    hardware = {"cpu": Hardware(cpus=2), "gpu": Hardware(cpus=2, nodes=(machine(16, cpus=2),))}

    def timings(folder: str, device: dict[str, object] | None) -> dict[str, str]:
        storage = Storage(tmp_path / folder)
        directory = storage.run(runs[0].key)
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(canonical_json(runs[0].config))
        (directory / "training.json").write_text(json.dumps({"tokens_per_second": 100.0}))
        if device is not None:
            (directory / DEVICE_FILE).write_text(json.dumps(device))
        plans = {name: plan_runs(runs[1:2], set(), it, storage, Runtime()) for name, it in hardware.items()}
        return {name: plan.trials[0].timing for name, plan in plans.items()}

    kind = hardware["gpu"].pools[0].kind
    assert timings("unsaid", None) == {"cpu": "measured", "gpu": "estimated"}
    assert timings("cpu", {"device": "cpu", "tenants": 1}) == {"cpu": "measured", "gpu": "estimated"}
    assert timings("gpu", {"device": kind, "tenants": 1}) == {"cpu": "estimated", "gpu": "measured"}
    assert timings("other", {"device": "NVIDIA T4 15 GiB", "tenants": 1}) == {"cpu": "estimated", "gpu": "estimated"}
    assert timings("shared", {"device": kind, "tenants": 3}) == {"cpu": "estimated", "gpu": "estimated"}


def test_a_speed_measured_by_as_many_tenants_gives_that_speed_again(runs: list[Run], tmp_path: Path) -> None:
    storage, hardware = Storage(tmp_path), Hardware(cpus=8, nodes=(machine(16, cpus=8),))
    directory = storage.run(runs[0].key)
    directory.mkdir(parents=True)
    tenants = plan_runs(runs[:2], set(), hardware, storage, Runtime()).trials[0].tenants
    assert tenants == 2
    (directory / "config.json").write_text(canonical_json(runs[0].config))
    (directory / "training.json").write_text(json.dumps({"tokens_per_second": 1000.0}))
    (directory / DEVICE_FILE).write_text(json.dumps({"device": hardware.pools[0].kind, "tenants": tenants}))
    timing._measured.cache_clear()
    plan = plan_runs(runs[:2], set(), hardware, storage, Runtime())
    tokens = runs[0].config.tokens_per_step * runs[0].config.training.steps
    assert {t.timing for t in plan.trials} == {"measured"}
    training_seconds = tokens / 1000
    evaluation_seconds = max(timing.EVALUATION_SECONDS, timing.EVALUATION_FRAC * training_seconds)
    assert plan.makespan_minutes == pytest.approx((training_seconds + evaluation_seconds) / 60)


def test_a_study_of_weeks_on_the_cpu_is_said_to_need_a_gpu(runs: list[Run]) -> None:
    weeks = dataclasses.replace(trial(runs[0], 180 * 24 * 60), end_minutes=180 * 24 * 60)
    said = format_plan(Plan(hardware=Hardware(cpus=2), trials=(weeks,)))
    assert "needs a GPU: about 180 days on this CPU" in said
    assert "180 days: needs a GPU" in said.splitlines()[1]
    assert "GPU" not in said.replace("no GPU", "").replace("needs a GPU", "").split("\n", 1)[1]


def test_the_plan_lists_trials_in_the_order_of_their_starts(runs: list[Run]) -> None:
    starts = {0: 30.0, 1: 0.0, 2: 10.0}
    trials = [
        dataclasses.replace(trial(runs[i], 10), start_minutes=start, end_minutes=start + 10)
        for i, start in starts.items()
    ]
    trials.append(dataclasses.replace(trials.pop(0), state="finished"))
    waiting = dataclasses.replace(trials[0], start_minutes=5.0, run=runs[3])
    said = format_plan(Plan(hardware=Hardware(cpus=2), trials=(trials[1], waiting, trials[0], trials[2])))
    assert [line.split()[0] for line in said.splitlines()[1:5]] == [runs[i].label for i in (0, 1, 3, 2)]


# ---- autoscaler ------------------------------------------------------------------------------------------------------


def test_gpus_that_an_autoscaler_brings_are_planned_for(runs: list[Run], tmp_path: Path) -> None:
    nodes = announced_nodes(AUTOSCALER)
    assert [len(node.gpus) for node in nodes] == [1] * 4
    plan = plan_of(runs, tmp_path, *nodes)
    assert {t.gpu_frac for t in plan.trials} == {1.0}
    assert {t.nodes for t in plan.trials} == {""}
    assert plan.trials[0].memory_frac == pytest.approx(0.9)
    assert "4 x A10G 24 GiB, not running yet" in format_plan(plan)


AUTOSCALER = {
    "max_workers": 4,
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "gpu": {
            "resources": {"CPU": 8, "GPU": 1, "accelerator_type:A10G": 1, "gpu_gib": 24},
            "min_workers": 0,
            "max_workers": 4,
        },
    },
}


def test_living_nodes_of_an_announced_type_are_not_counted_twice() -> None:
    alive = machine(22.1, name="NVIDIA A10G", used=0.1)
    announced = announced_nodes(AUTOSCALER, [alive])
    assert len(announced) == 3
    (pool,) = Hardware(cpus=32, nodes=(alive, *announced)).pools
    assert pool.count == 4


def test_announced_nodes_beside_another_kind_are_chosen_by_exclusion() -> None:
    alive = machine(80, name="NVIDIA H100")
    hardware = Hardware(cpus=64, nodes=(alive, *announced_nodes(AUTOSCALER, [alive])))
    large, small = hardware.pools
    assert hardware.selector(large) == f"in({alive.node_id})"
    assert hardware.selector(small) == f"!in({alive.node_id})"


def test_an_autoscaler_that_does_not_say_its_memory_is_asked_for_it() -> None:
    with pytest.raises(HRSError, match=r"node type 'gpu' has GPUs of unknown memory: add `gpu_gib: 24`"):
        announced_nodes({"available_node_types": {"gpu": {"resources": {"GPU": 1}, "max_workers": 2}}})


def test_the_launcher_file_is_read_where_the_environment_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(json.dumps(AUTOSCALER))  # JSON is YAML
    monkeypatch.setenv("HRS_CLUSTER_CONFIG", str(file))
    hardware = Hardware.of_cluster({})  # a head with CPU 0 and no worker
    assert (hardware.cpus, len(hardware.nodes)) == (32, 4)
    assert with_announced({"CPU": 1.0}) == {"CPU": 33.0, "GPU": 4.0}
    assert offers_gpus({})
    file.unlink()
    with pytest.raises(HRSError, match="cannot be read"):
        Hardware.of_cluster({})


@pytest.mark.parametrize("text", ["", "24", "0x24", "2x0", "2y24", "1x24,"])
def test_descriptions_of_gpus_that_describe_none_are_refused(text: str) -> None:
    with pytest.raises(HRSError, match="COUNTxGIB"):
        parse_gpus(text)


def test_gpus_of_another_machine_are_described_in_a_word(runs: list[Run], tmp_path: Path) -> None:
    first, second = parse_gpus("2x24:A10G, 1x8")
    assert ([g.name for g in first.gpus], second.gpus[0].name, first.cpus) == (["A10G", "A10G"], "GPU", 16)
    assert first.limit_bytes == int(0.9 * 24 * 2**30)
    plan_of(runs, tmp_path, first, second)


# ---- this machine ----------------------------------------------------------------------------------------------------


def test_planning_asks_a_process_that_ends_and_opens_no_gpu(runs: list[Run], tmp_path: Path) -> None:
    with simulated_gpus(SimulatedGpu(used_bytes=5 * 2**30), SimulatedGpu()) as cuda:
        hardware = Hardware.of_this_machine()
        plan = plan_runs(runs, set(), hardware, Storage(tmp_path), Runtime())
        assert cuda.calls == []
    assert [gpu.free_bytes for gpu in hardware.nodes[0].gpus] == [11 * 2**30, 16 * 2**30]
    assert "GPU 0: NVIDIA RTX 4080, 16 GiB, 11.0 GiB free" in format_plan(plan)
    assert all(t.gpu_frac for t in plan.trials)


def test_a_gpu_that_torch_cannot_use_stops_the_plan() -> None:
    with simulated_gpus(SimulatedGpu(), old_driver=True), pytest.raises(HRSError, match="make setup"):
        Hardware.of_this_machine()


@pytest.mark.parametrize(
    ("name", "tera_flops"),
    [
        ("NVIDIA GeForce RTX 4080", 97),
        ("NVIDIA GeForce RTX 4080 SUPER", 104),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("A10G", 70),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("Quadro RTX 6000", 65),
        ("NVIDIA H100 PCIe", 756),
        ("GeForce-RTX-5090", 209),
        ("NVIDIA Something New", 30),
    ],
)
def test_peaks_are_found_by_name_or_generation(name: str, tera_flops: float) -> None:
    gpu = GpuProperties(index=0, name=name, total_bytes=1, free_bytes=1, capability=(8, 9))
    assert gpu_speed(gpu).half_flops == tera_flops * 1e12


def test_the_estimate_knows_of_compiling_and_of_micro_batches(tmp_path: Path) -> None:
    """Tiny runs wait for launches, of which a compiled model makes fewer and ever smaller micro-batches more."""
    config = experiment("dense_baseline", "tiny", overrides={"training.steps": 100_000})  # evaluation takes no time
    pool, storage = Hardware(cpus=8, nodes=(machine(16, cpus=8),)).pools[0], Storage(tmp_path)

    def minutes(micro_batch: int, runtime: Runtime) -> float:
        return time_on_gpu(config, micro_batch, runtime, pool, 1, storage).minutes

    compiled, eager = minutes(4, Runtime()), minutes(4, Runtime(compile=False))
    assert compiled < 0.5 * eager
    assert 2 * eager < minutes(1, Runtime(compile=False)) < 4 * eager
