"""What is no number is null in every JSON of ours: the standard knows no NaN and no infinity."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrs import strict_json

ROOT = Path(__file__).parent.parent


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def finite(value: object) -> object:
    """The reference: walk the value and put None for what JSON cannot spell."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case list():
            return [finite(item) for item in value]
        case dict():
            return {key: finite(item) for key, item in value.items()}
    return value


@given(VALUES)
def test_any_value_is_strict_json_and_keeps_what_is_finite(value: object) -> None:
    assert json.loads(strict_json.dumps(value), parse_constant=refuse) == finite(value)


def test_a_circle_is_still_an_error() -> None:
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises((ValueError, RecursionError)):
        strict_json.dumps(circle)


@pytest.mark.parametrize("package", ["hrs", "jobs", "serve", "tune"])
def test_nothing_else_writes_json(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        if path.name != "strict_json.py":
            text = path.read_text(encoding="utf-8").replace("strict_json.dumps(", "")
            assert "json.dump" not in text, f"{path.relative_to(ROOT)} has to use hrs.strict_json"
