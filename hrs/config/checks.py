"""Bounds of config fields, said in one sentence each. A class names the place of its fields in ``PLACE``."""

import dataclasses
import math
from typing import Any

from hrs.errors import HRSError, shown

LARGEST_SIZE = 2**24
"""No count or width is larger, unless a field has bounds of its own: torch multiplies sizes in 64 bits, and checkpoints
carry eight digits of the step in their names."""
LARGEST_SEED = 2**32 - 1
"""NumPy's and scikit-learn's generators take no larger one."""


def require_finite(config: Any) -> None:
    """Raise HRSError for NaN or infinity in any field: they pass every comparison that asks what is too large."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise _refused(config, field.name, "be finite")


def require_at_least(config: Any, **bounds: float) -> None:
    """Raise HRSError for a field below its bound, or an integer above :data:`LARGEST_SIZE`."""
    for name, low in bounds.items():
        value = getattr(config, name)
        if not value >= low:
            raise _refused(config, name, f"be at least {_spelt(low)}")
        if isinstance(value, int) and value > LARGEST_SIZE:
            raise _refused(config, name, f"be at most {_spelt(LARGEST_SIZE)}")


def require_within(config: Any, **bounds: tuple[float, float]) -> None:
    """Raise HRSError for a field outside its closed interval."""
    for name, (low, high) in bounds.items():
        if not low <= getattr(config, name) <= high:
            raise _refused(config, name, f"lie between {_spelt(low)} and {_spelt(high)}")


def _refused(config: Any, name: str, rule: str) -> HRSError:
    return HRSError(f"{getattr(config, 'PLACE', '')}{name} must {rule}, got {shown(getattr(config, name))}")


def _spelt(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
