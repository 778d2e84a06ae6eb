"""Learning rate as a pure function of the step: a run can be resumed, replotted or stretched without state."""

import math

from hrs.config import ScheduleConfig


def lr(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate of ``step`` (0-based) of ``steps``, before phase multipliers.

    All shapes rise linearly from 0 over ``warmup_frac``. With a warm-up the very first step therefore has rate 0.

    In ``cosine`` and ``wsd`` the warm-up comes first and ends at the peak. In ``cosine_hold_linear`` it is a factor on
    a cosine that has been falling since step 0, so the highest rate is a little below the peak.
    """
    return schedule.peak_lr * _relative(schedule, step / steps)


def _relative(schedule: ScheduleConfig, x: float) -> float:
    """Share of the peak when a share ``x`` of all steps is done."""
    warmup, floor, decay = schedule.warmup_frac, schedule.floor_frac, schedule.decay_frac
    if schedule.shape == "cosine_hold_linear":
        falling = _cosine(floor, _progress(x, 0.0, 1.0 - decay - schedule.hold_frac))
        return _progress(x, 0.0, warmup) * falling * (1.0 - _progress(x, 1.0 - decay, 1.0))
    if x < warmup:
        return x / warmup
    if schedule.shape == "wsd":
        return 1.0 - (1.0 - floor) * _progress(x, 1.0 - decay, 1.0)
    return _cosine(floor, _progress(x, warmup, 1.0))


def _progress(x: float, start: float, end: float) -> float:
    """0 before ``start``, 1 from ``end`` on, linear between."""
    return min(max((x - start) / (end - start), 0.0), 1.0) if end > start else float(x >= end)


def _cosine(floor: float, progress: float) -> float:
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
