"""Every field refuses what would break later, in one sentence that names it: NaN, infinity, signs, sizes, types."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrs.config import ExperimentConfig, canonical_json, flatten, from_dict, override
from hrs.errors import HRSError
from hrs.presets import experiment
from hrs.training import Runtime
from hrs.training.requirements import require_consistent

DEFAULTS = flatten(ExperimentConfig())
NUMBERS = [math.nan, math.inf, -math.inf, -1, 0, -0.5, 1, 2, 10**23, -(10**23), 10**400, 1e300, 5e-324, "nan", "-inf"]
OTHERS = ["", "x", "none", "[", "[" * 10_000, "9" * 5000, "\ud800", True, None, [], {}, [[]], [{"a": 1}], [math.nan]]


def refused(field: str, value: object) -> str | None:
    """Return the sentence that a value is refused with; None if it is a value of the field."""
    try:
        config = override(ExperimentConfig(), {field: value})
    except HRSError as error:
        return str(error)
    assert from_dict(ExperimentConfig, json.loads(canonical_json(config))) == config, "it survives strict JSON"
    return None


@pytest.mark.parametrize("field", DEFAULTS)
def test_a_field_takes_a_value_or_names_itself_in_one_short_sentence(field: str) -> None:
    for value in (*NUMBERS, *OTHERS):
        sentence = refused(field, value)
        if sentence is not None:
            assert field.rpartition(".")[2] in sentence and len(sentence) < 500 and "\n" not in sentence, (
                value,
                sentence,
            )


@pytest.mark.parametrize("field", [name for name, value in DEFAULTS.items() if type(value) in (int, float)])
def test_no_number_that_is_not_finite_and_no_huge_size_passes(field: str) -> None:
    for value in (math.nan, math.inf, -math.inf, "nan", "inf", "-inf", "1e999"):
        assert refused(field, value) is not None, value
    if type(DEFAULTS[field]) is int:
        assert refused(field, 10**23) is not None and refused(field, -(10**23)) is not None


@given(st.sampled_from(list(DEFAULTS)), st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.none())
def test_any_value_is_a_config_or_a_sentence(field: str, value: object) -> None:
    sentence = refused(field, value)
    assert sentence is None or field.rpartition(".")[2] in sentence


PHASE = {"name": "a", "frac": 1.0}


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ("[1]", r"phases\[0\] must be a JSON object"),
        ('[{"name": "a"}]', r"phases\[0\] lacks frac"),
        ([PHASE | {"extra": 1}], r"unknown field training.phases\[0\].extra"),
        ([PHASE | {"frac": math.nan}], "frac must lie between 0 and 1, got nan"),
        ([PHASE | {"frac": 2.0}, PHASE | {"frac": -1.0}], "frac must lie between 0 and 1, got 2"),
        ([PHASE | {"frac": 0.5}], "fractions sum to 0.5"),
        ([PHASE | {"multipliers": [["backbone", math.nan]]}], "multiplier of group 'backbone' must be finite"),
        ([PHASE | {"multipliers": [["backbone", -1.0]]}], "multiplier of group 'backbone' must be finite"),
        ([PHASE | {"multipliers": [["backbone"]]}], "must be a list of 2 values"),
        ([PHASE | {"multipliers": [["router", 1.0], ["router", 0.0]]}], "two multipliers"),
        ([PHASE | {"multipliers": 3}], "multipliers must be a comma-separated list"),
        ([PHASE | {"multipliers": [["no_such_group", 0.5]]}], "unknown group no_such_group"),
        ([PHASE | {"multipliers": [["backbone", 0.0]]}], "let at least one group learn"),
        ([PHASE | {"freeze": [""]}], "names a parameter without letters"),
        ([PHASE | {"freeze": ["no.such"]}], "no parameter of this model begins with 'no.such'"),
        ([PHASE | {"reinitialise": ["no.such"]}], "no parameter of this model begins with 'no.such'"),
    ],
)
def test_phases_that_cannot_be_trained_are_refused_without_text_or_device(phases: object, words: str) -> None:
    with pytest.raises(HRSError, match=words):
        require_consistent(experiment("dense_baseline", "micro", overrides={"training.phases": phases}))


def test_direct_construction_is_checked_as_well() -> None:
    for config in (ExperimentConfig().model, ExperimentConfig().training.optimizer):
        for field in dataclasses.fields(config):
            if isinstance(getattr(config, field.name), float):
                with pytest.raises(HRSError, match=field.name):
                    dataclasses.replace(config, **{field.name: math.nan})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_minutes_between_checkpoints_are_finite(value: float) -> None:
    with pytest.raises(HRSError, match="checkpoint_minutes must be above 0 and finite"):
        Runtime(checkpoint_minutes=value)
