"""From a preset, a scale, a seed and overrides to one experiment."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from hrs.config import ExperimentConfig, flatten, override
from hrs.config.checks import LARGEST_SIZE
from hrs.errors import HRSError, shown
from hrs.presets.lineage import lineage
from hrs.presets.preset import Preset, Relative
from hrs.presets.scales import get_scale

GPT2_VOCABULARY = 50257


def experiment(
    preset: str, scale: str = "tiny", seed: int = 0, overrides: Mapping[str, Any] | None = None
) -> ExperimentConfig:
    """Compose an experiment: defaults, then the scale, then the preset's lineage, then overrides.

    A preset's relative values start from what the scale alone says, whatever its ancestors changed. The vocabulary
    follows from the tokenizer.

    Raises:
        HRSError: for an unknown preset or scale, or overrides that name missing or mistyped fields.
    """
    base = override(ExperimentConfig(preset=preset, scale=scale, seed=seed), get_scale(scale))
    base = config = override(base, {"model.vocab_size": vocabulary_size(base.data.tokenizer)})
    for ancestor in lineage(preset):
        config = override(config, _changes(ancestor, base))
    overrides = dict(overrides or {})
    if fixed := sorted({"preset", "scale", "model.vocab_size"} & set(overrides)):
        raise HRSError(f"{', '.join(fixed)} cannot be overridden: presets, scales and data.tokenizer decide them")
    config = override(config, overrides)
    return override(config, {"model.vocab_size": vocabulary_size(config.data.tokenizer)})


def _changes(preset: Preset, base: ExperimentConfig) -> dict[str, Any]:
    """What the preset changes at the scale of ``base``, in plain values."""
    changes = {**preset.changes, **(preset.paper if base.scale == "paper" else {})}
    return {n: value.resolve(n, base) if isinstance(value, Relative) else value for n, value in changes.items()}


def vocabulary_size(tokenizer: str) -> int:
    """Token ids of a tokenizer by its name.

    Raises:
        HRSError: if the name is neither ``gpt2`` nor ``bpe:N``.
    """
    kind, _, size = tokenizer.partition(":")
    if tokenizer == "gpt2":
        return GPT2_VOCABULARY
    if kind == "bpe" and re.fullmatch(r"[0-9]{1,9}", size) and 256 < int(size) <= LARGEST_SIZE:
        return int(size)
    raise HRSError(
        f"unknown tokenizer {shown(tokenizer)}: choose gpt2, or bpe:N with N above 256 (every byte needs an id) and at "
        f"most {LARGEST_SIZE:,}"
    )


class Difference(NamedTuple):
    """One field in which two experiments differ."""

    field: str
    left: Any
    right: Any


def compare(left: ExperimentConfig, right: ExperimentConfig) -> list[Difference]:
    """Every field whose values differ, in declaration order."""
    a, b = flatten(left), flatten(right)
    return [Difference(name, a[name], b[name]) for name in a if a[name] != b[name]]
