"""The simulated queue: cores and shares are never exceeded, and GPUs are shared by turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrs.cluster.placement import Job, Place, choose_pools, simulate, spread

hundredths = st.integers(1, 100).map(lambda n: n / 100)
jobs_on_gpus = st.lists(
    st.builds(
        lambda minutes, share, busy: (minutes, share, busy), st.floats(0.1, 100), hundredths, st.floats(0.05, 1.0)
    ),
    min_size=1,
    max_size=8,
)


def job(key: str, minutes: float, gpu_frac: float = 0.0, busy_frac: float = 1.0) -> Job:
    return Job(key=key, minutes=minutes, cpus=1.0, gpu_frac=gpu_frac, busy_frac=busy_frac)


def ends(places: dict[str, Place]) -> list[float]:
    return [place.end_minutes for place in places.values()]


def test_two_that_compute_all_the_time_take_twice_as_long_on_one_gpu() -> None:
    jobs = [job("a", 10, 0.5), job("b", 10, 0.5)]
    assert ends(simulate(jobs, 1, 8)) == pytest.approx([20, 20])


def test_two_that_compute_half_of_the_time_do_not_wait_for_each_other() -> None:
    jobs = [job("a", 10, 0.5, 0.5), job("b", 10, 0.5, 0.5)]
    assert ends(simulate(jobs, 1, 8)) == pytest.approx([10, 10])


def test_one_that_is_left_alone_goes_on_at_full_speed() -> None:
    places = simulate([job("long", 30, 0.5), job("short", 10, 0.5)], 1, 8)
    assert places["short"].end_minutes == pytest.approx(20)
    assert places["long"].end_minutes == pytest.approx(40)


def test_ray_fills_one_gpu_before_it_takes_the_next() -> None:
    places = simulate([job("a", 10, 0.5), job("b", 10, 0.5), job("c", 10, 0.5)], 2, 8)
    assert [places[key].end_minutes for key in "abc"] == pytest.approx([20, 20, 10])


def test_cores_limit_the_queue_too() -> None:
    places = simulate([job(str(i), 10) for i in range(3)], 0, 2)
    assert sorted(p.start_minutes for p in places.values()) == pytest.approx([0, 0, 10])


@given(jobs_on_gpus, st.integers(1, 3), st.integers(1, 4))
def test_no_job_is_lost_and_none_is_faster_than_alone(
    drawn: list[tuple[float, float, float]], n_gpus: int, cpus: int
) -> None:
    jobs = [job(str(i), *values) for i, values in enumerate(drawn)]
    places = simulate(jobs, n_gpus, cpus)
    assert set(places) == {j.key for j in jobs}
    for j in jobs:
        assert places[j.key].end_minutes - places[j.key].start_minutes >= j.minutes * (1 - 1e-6)
    work = sum(j.minutes * j.busy_frac for j in jobs)
    assert max(p.end_minutes for p in places.values()) >= work / n_gpus * (1 - 1e-6), "no GPU computes twice at once"
    for moment in [p.start_minutes for p in places.values()]:
        alive = [j for j in jobs if places[j.key].start_minutes <= moment < places[j.key].end_minutes]
        assert len(alive) <= cpus
        assert sum(j.gpu_frac for j in alive) <= n_gpus + 1e-6
        assert len({places[j.key].slot for j in alive}) == len(alive)


@given(st.lists(hundredths, min_size=1, max_size=8), st.integers(1, 4))
def test_spreading_lowers_no_share(fractions: list[float], n_gpus: int) -> None:
    raised = spread(fractions, n_gpus)
    assert all(after >= before for before, after in zip(fractions, raised, strict=True))
    assert max(raised) <= 1.0


def test_spreading_leaves_alone_what_does_not_fit_at_once() -> None:
    assert spread([0.6, 0.6, 0.6], 2) == [0.6, 0.6, 0.6]
    assert spread([0.1] * 3, 2) == [0.5] * 3
    assert spread([0.6, 0.1, 0.1, 0.1], 1) == [0.6, 0.1, 0.1, 0.1]


def test_work_is_divided_by_speed() -> None:
    """A GPU that is three times as fast gets three times as many equal jobs."""
    options = {str(i): {0: job(str(i), 10, 1.0), 1: job(str(i), 30, 1.0)} for i in range(8)}
    chosen = choose_pools(options, gpus=[1, 1], lanes=[1, 1])
    assert sorted(chosen.values()) == [0] * 6 + [1] * 2


def test_a_job_that_fits_one_pool_goes_there() -> None:
    options = {"big": {1: job("big", 10, 1.0)}, "small": {0: job("small", 10, 0.2), 1: job("small", 10, 0.1)}}
    assert choose_pools(options, gpus=[1, 1], lanes=[5, 10]) == {"big": 1, "small": 0}
