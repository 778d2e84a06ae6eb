"""JSON that every reader accepts: the standard has no NaN and no infinity, so they become null."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """Return ``value`` as strict JSON; ``options`` are those of :func:`json.dumps`."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # searched only now: values that are not finite are rare
        return json.dumps(_finite(value), allow_nan=False, **options)


def number(value: float | None) -> float:
    """Return a number that :func:`dumps` wrote: null is NaN."""
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
