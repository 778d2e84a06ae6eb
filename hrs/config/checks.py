"""Bounds of config fields, said in one sentence each."""

from typing import Any

from hrs.errors import HRSError


def require_at_least(config: Any, **bounds: float) -> None:
    """Raises HRSError for a field below its bound."""
    for name, low in bounds.items():
        if getattr(config, name) < low:
            raise HRSError(f"{name} must be at least {low:g}, got {getattr(config, name):g}")


def require_within(config: Any, **bounds: tuple[float, float]) -> None:
    """Raises HRSError for a field outside its closed interval."""
    for name, (low, high) in bounds.items():
        if not low <= getattr(config, name) <= high:
            raise HRSError(f"{name} must lie between {low:g} and {high:g}, got {getattr(config, name):g}")
