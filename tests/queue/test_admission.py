"""Stages start where their memory is free, no GPU is ever overfull, and large ones are not starved."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from queue_studies import stage

from hrs.queue.admission import Decision, Gpu, Host, Tenant, admit
from hrs.queue.records import Resources, RunSpec, StageSpec, StudySpec
from hrs.queue.simulator import simulate

GIB = 2**30
ONE = (Host(name="a", cpus=16, gpus=(Gpu(name="cuda:0", bytes=16 * GIB),)),)


def of(key: str, gib: float, minutes: float = 10.0, *, workers: int = 1, cpus: float = 1.0) -> StageSpec:
    resources = Resources(gpu_bytes=int(gib * GIB), minutes=minutes, workers=workers, cpus=cpus)
    return StageSpec(key=key, kind="train", label=key, function="a:b", resources=resources)


def tenant(gib: float, ends: float = float("inf"), gpu: str = "cuda:0") -> Tenant:
    return Tenant(host="a", gpu=gpu, cpus=1, gpu_bytes=int(gib * GIB), ends_minutes=ends)


def started(decision: Decision) -> list[str]:
    return [placement.stage.key for placement in decision.placements]


def test_what_fits_starts_in_order() -> None:
    decision = admit([of("x", 6), of("y", 6), of("z", 6)], ONE, [])
    assert started(decision) == ["x", "y"]
    assert decision.held_back == "z"


def test_cores_count_too() -> None:
    host = (Host(name="a", cpus=2, gpus=(Gpu(name="cuda:0", bytes=16 * GIB),)),)
    assert started(admit([of("x", 1), of("y", 1), of("z", 1)], host, [])) == ["x", "y"]
    assert started(admit([of("x", 0), of("y", 0), of("z", 1)], host, [])) == ["x", "y"]


def test_empty_gpus_come_first_and_then_the_one_that_is_filled_best() -> None:
    two = (Host(name="a", cpus=16, gpus=(Gpu(name="cuda:0", bytes=24 * GIB), Gpu(name="cuda:1", bytes=8 * GIB))),)
    decision = admit([of("x", 6), of("y", 6)], two, [])
    assert [placement.places for placement in decision.placements] == [(("a", "cuda:1"),), (("a", "cuda:0"),)]


def test_what_fits_no_gpu_is_told_apart_from_what_waits() -> None:
    decision = admit([of("x", 20), of("y", 6)], ONE, [tenant(12)])
    assert [spec.key for spec in decision.impossible] == ["x"]
    assert decision.held_back == "y"


def test_all_processes_of_a_stage_start_or_none() -> None:
    two = (Host(name="a", cpus=16, gpus=(Gpu(name="cuda:0", bytes=8 * GIB), Gpu(name="cuda:1", bytes=8 * GIB))),)
    (placement,) = admit([of("x", 6, workers=2)], two, []).placements
    assert sorted(placement.places) == [("a", "cuda:0"), ("a", "cuda:1")]
    decision = admit([of("x", 6, workers=2), of("y", 1)], two, [tenant(6)])
    assert started(decision) == ["y"]


@pytest.mark.parametrize(
    ("later", "starts"),
    [
        (of("short", 4, 5), True),  # over before the memory for the first one is free
        (of("long", 4, 30), False),  # would put the first one off
        (of("small", 1, 30), True),  # fits beside it
        (of("unknown", 4, 0), False),
    ],
)
def test_later_stages_do_not_put_off_the_first_that_waits(later: StageSpec, starts: bool) -> None:
    decision = admit([of("large", 14), later], ONE, [tenant(10, ends=8.0), tenant(1)])
    assert decision.held_back == "large"
    assert started(decision) == ([later.key] if starts else [])


def study_of(stages: list[StageSpec]) -> StudySpec:
    keys = tuple(spec.key for spec in stages)
    run = RunSpec(key="run", label="run", definition={}, stages=keys)
    return StudySpec(title="s", definition={}, runs=(run,), stages=tuple(stages))


def test_a_large_stage_is_not_starved_by_a_stream_of_small_ones() -> None:
    small = [of(f"s{i:02}", 4, 10) for i in range(40)]
    timeline = simulate([study_of([*small[:4], of("large", 14, 10), *small[4:]])], ONE, busy=dict.fromkeys(
        [spec.key for spec in small] + ["large"], 0.25))  # fmt: skip
    start = {entry.key: entry.start_minutes for entry in timeline.entries}
    assert start["large"] <= 20


@given(st.integers(0, 2**32), st.integers(1, 3))
@examples(50)
def test_no_gpu_and_no_host_is_ever_overfull(seed: int, n_gpus: int) -> None:
    draw = random.Random(seed)
    gpus = tuple(Gpu(name=f"cuda:{i}", bytes=draw.choice([8, 16, 24]) * GIB) for i in range(n_gpus))
    hosts = (Host(name="a", cpus=draw.randint(2, 8), gpus=gpus),)
    stages = [
        of(f"s{i}", draw.choice([0, 1, 3, 7, 15, 30]), draw.uniform(1, 20), workers=draw.choice([1, 1, 1, 2]))
        for i in range(12)
    ]
    actual = {spec.key: spec.resources.minutes * draw.uniform(0.5, 2) for spec in stages}
    timeline = simulate([study_of(stages)], hosts, minutes=actual)
    done = {entry.key for entry in timeline.entries}
    assert done | set(timeline.impossible) == {spec.key for spec in stages}
    assert not done & set(timeline.impossible)
    resources = {spec.key: spec.resources for spec in stages}
    for moment in sorted({entry.start_minutes for entry in timeline.entries}):
        alive = [e for e in timeline.entries if e.start_minutes <= moment < e.end_minutes - 1e-9]
        assert sum(resources[e.key].cpus for e in alive) <= hosts[0].cpus
        for gpu in gpus:
            assert sum(resources[e.key].gpu_bytes for e in alive if e.gpu == gpu.name) <= gpu.bytes
    for entry in timeline.entries:
        assert entry.end_minutes - entry.start_minutes >= actual[entry.key] - 1e-6


def test_stages_that_share_a_gpu_slow_each_other_down() -> None:
    timeline = simulate([study_of([of("x", 6, 10), of("y", 6, 10)])], ONE, busy={"x": 1.0, "y": 1.0})
    assert timeline.makespan_minutes == pytest.approx(20)
    light = simulate([study_of([of("x", 6, 10), of("y", 6, 10)])], ONE, busy={"x": 0.5, "y": 0.5})
    assert light.makespan_minutes == pytest.approx(10)


def test_a_gpu_that_computes_all_the_time_gets_no_further_tenant() -> None:
    two = (Host(name="a", cpus=16, gpus=(Gpu(name="cuda:0", bytes=48 * GIB), Gpu(name="cuda:1", bytes=8 * GIB))),)
    full = [
        replace(one, resources=replace(one.resources, busy_frac=1.0)) for one in (of("x", 2), of("y", 2), of("z", 2))
    ]
    decision = admit(full, two, [])
    assert started(decision) == ["x", "y"]
    assert {place for placement in decision.placements for _, place in placement.places} == {"cuda:0", "cuda:1"}
    assert decision.held_back == "z"


def test_inputs_and_arrivals_are_waited_for() -> None:
    first, second = of("x", 6, 10), stage("y", "x", minutes=5)
    timeline = simulate([study_of([first, second])], ONE, arrivals=[3.0])
    assert {e.key: (e.start_minutes, e.end_minutes) for e in timeline.entries} == {"x": (3, 13), "y": (13, 18)}
