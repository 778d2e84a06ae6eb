"""Configs survive JSON, refuse what they do not know, and hash by content."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrs.config import (
    ExperimentConfig,
    canonical_json,
    content_hash,
    flatten,
    from_dict,
    override,
    parse_assignments,
)
from hrs.errors import HRSError
from hrs.presets import PRESETS, experiment


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_json(preset: str) -> None:
    config = experiment(preset, "tiny")
    assert from_dict(ExperimentConfig, json.loads(canonical_json(config))) == config


@pytest.mark.parametrize("preset", ["dense_baseline", "full_hrs_refined_legacy"])
def test_flat_values_given_back_as_text_rebuild_the_config(preset: str) -> None:
    """Whatever the tracker shows as a parameter can be pasted into --set."""
    config = experiment(preset, "paper", seed=3)
    texts = {name: str(value) for name, value in flatten(config).items()}
    assert override(ExperimentConfig(), texts) == config


@given(st.integers(1, 64), st.floats(1e-6, 1.0), st.booleans())
def test_text_overrides_keep_the_fields_type(steps: int, rate: float, decay: bool) -> None:
    texts = {
        "training.steps": str(steps),
        "training.schedule.peak_lr": repr(rate),
        "training.optimizer.decay_vectors": str(decay),
    }
    training = override(ExperimentConfig(), texts).training
    assert (training.steps, training.schedule.peak_lr, training.optimizer.decay_vectors) == (steps, rate, decay)


def test_all_bad_overrides_are_named_at_once() -> None:
    with pytest.raises(HRSError) as caught:
        override(ExperimentConfig(), {"model.n_layers": "six", "model.depth": "6", "training.precision": "fp8"})
    message = str(caught.value)
    assert "model.n_layers must be a value of type int, got 'six'" in message
    assert "unknown field model.depth" in message
    assert "training.precision must be one of auto, fp32, bf16, fp16, got 'fp8'" in message


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("training.optimizer.decay_vectors", "yes", "true or false"),
        ("training.steps", "1.5", "type int"),
        ("training.steps", 1.5, "type int"),
        ("training.steps", True, "type int"),
        ("data.corpus", 3, "type str"),
        ("model", "x", "unknown field model"),
        ("model.n_layers.x", "1", "unknown field model.n_layers.x"),
        ("training.phases", "foundation", "must be a JSON object"),
        ("training.phases", "[{", "comma-separated list or JSON"),
        ("model.tiers.names", "conv,conv", "distinct names"),
        ("model.n_heads", "3", "must be a multiple of 2 * n_heads"),
        ("training.schedule.warmup_frac", "2", "between 0 and 1"),
        ("training.steps", "0", "at least 1"),
    ],
)
def test_a_bad_value_is_one_sentence(field: str, value: object, words: str) -> None:
    with pytest.raises(HRSError, match=words.replace("*", r"\*")) as caught:
        override(ExperimentConfig(), {field: value})
    assert "\n" not in str(caught.value)


def test_two_fields_that_only_fit_together_can_change_together() -> None:
    config = override(ExperimentConfig(), {"model.d_model": "96", "model.n_heads": "6"})
    assert (config.model.d_model, config.model.n_heads) == (96, 6)


def test_an_assignment_without_a_sign_is_refused() -> None:
    with pytest.raises(HRSError, match="FIELD=VALUE"):
        parse_assignments(["model.n_layers"])


def test_equal_configs_hash_alike_and_every_field_counts() -> None:
    config = experiment("full_hrs", "micro")
    assert content_hash(config) == content_hash(dataclasses.replace(config))
    changed = [override(config, {"seed": 1}), override(config, {"model.router.hidden": 9})]
    assert len({content_hash(c) for c in (config, *changed)}) == 3
