import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrs.config import ScheduleConfig
from hrs.training.schedule import lr


def test_cosine_passes_through_its_known_points() -> None:
    schedule = ScheduleConfig(shape="cosine", peak_lr=2.0, warmup_frac=0.2, floor_frac=0.1)
    expected = {0: 0.0, 10: 1.0, 20: 2.0, 60: 1.1, 100: 0.2}
    assert {step: lr(schedule, step, 100) for step in expected} == pytest.approx(expected)


def test_wsd_is_flat_then_linear() -> None:
    schedule = ScheduleConfig(shape="wsd", peak_lr=1.0, warmup_frac=0.1, decay_frac=0.4, floor_frac=0.5)
    expected = {0: 0.0, 5: 0.5, 10: 1.0, 35: 1.0, 60: 1.0, 80: 0.75, 100: 0.5}
    assert {step: lr(schedule, step, 100) for step in expected} == pytest.approx(expected)


def test_cosine_hold_linear_falls_holds_and_ends_at_zero() -> None:
    schedule = ScheduleConfig(
        shape="cosine_hold_linear", peak_lr=1.0, warmup_frac=0.0, floor_frac=0.2, hold_frac=0.3, decay_frac=0.2
    )
    expected = {0: 1.0, 25: 0.6, 50: 0.2, 65: 0.2, 79: 0.2, 90: 0.1, 100: 0.0}
    assert {step: lr(schedule, step, 100) for step in expected} == pytest.approx(expected)


def test_cosine_hold_linear_has_the_rates_of_the_original() -> None:
    """Peak 4e-3, 100 steps of warm-up on a cosine that fell over 3400, held until 5500, at zero from 6100."""
    steps = 6100
    schedule = ScheduleConfig(
        shape="cosine_hold_linear",
        peak_lr=4e-3,
        warmup_frac=100 / steps,
        floor_frac=0.1,
        decay_frac=600 / steps,
        hold_frac=2100 / steps,
    )
    at_50 = 4e-3 * 0.5 * 0.99952
    expected = {0: 0.0, 50: at_50, 1700: 4e-3 * 0.55, 5800: 2e-4, 6100: 0.0, 7000: 0.0}
    assert {step: lr(schedule, step, steps) for step in expected} == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert [lr(schedule, step, steps) for step in range(3400, 5500)] == pytest.approx([4e-4] * 2100, rel=1e-12)
    for step in range(0, 6100, 7):
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / 3400)) if step < 3400 else 0.1
        factor = cosine if step < 5500 else 0.1 * max(0.0, 1 - (step - 5500) / 600)
        assert lr(schedule, step, steps) == pytest.approx(4e-3 * min(step / 100, 1) * factor, rel=1e-9, abs=1e-12)


def test_cosine_equals_the_textbook_formula() -> None:
    schedule = ScheduleConfig(shape="cosine", peak_lr=3e-4, warmup_frac=0.02)
    for step in range(1000, 50_000, 997):
        expected = 3e-4 * 0.5 * (1 + math.cos(math.pi * (step - 1000) / 49_000))
        assert lr(schedule, step, 50_000) == pytest.approx(expected, abs=1e-12)


@given(
    st.sampled_from(["cosine", "wsd", "cosine_hold_linear"]),
    st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 1), st.integers(1, 400),
)  # fmt: skip
def test_rates_stay_within_zero_and_peak_and_never_rise_after_the_warm_up(
    shape: str, warmup: float, decay: float, hold: float, floor: float, steps: int
) -> None:
    schedule = ScheduleConfig(
        shape=shape, peak_lr=1.0, warmup_frac=warmup, decay_frac=decay, hold_frac=hold, floor_frac=floor
    )
    rates = [lr(schedule, step, steps) for step in range(steps + 1)]
    assert all(0.0 <= rate <= 1.0 for rate in rates)
    after = [rate for step, rate in enumerate(rates) if step / steps >= warmup]
    # A rate is a few products of numbers up to 1: less than ten roundings, 1e-15.
    assert all(b <= a + 2e-15 for a, b in itertools.pairwise(after))


@given(st.sampled_from(["cosine", "wsd", "cosine_hold_linear"]), st.integers(1, 60), st.integers(0, 60))
def test_the_schedule_depends_only_on_the_share_that_is_done(shape: str, steps: int, step: int) -> None:
    schedule = ScheduleConfig(shape=shape)
    assert lr(schedule, min(step, steps), steps) == lr(schedule, 4 * min(step, steps), 4 * steps)
