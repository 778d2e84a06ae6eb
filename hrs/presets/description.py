"""A preset in words: where it comes from, what it changes, and every field."""

from collections.abc import Iterator, Mapping
from typing import Any

from hrs.config import ExperimentConfig, flatten
from hrs.presets.compose import Difference, compare, experiment
from hrs.presets.lineage import lineage


def describe_preset(name: str, scale: str, overrides: Mapping[str, Any], parameters: int) -> str:
    """Return the lineage, the size, the differences from the parent and from the preset itself, then every field.

    Args:
        overrides: fields that are changed for this description alone.
        parameters: of the model, overrides included.

    Raises:
        HRSError: for an unknown preset, scale or field, or a value that is refused.
    """
    config, ancestors = experiment(name, scale, overrides=overrides), [preset.name for preset in lineage(name)]
    plain = experiment(name, scale)
    lines = [" -> ".join(ancestors), f"{parameters:,} parameters at scale {scale}", ""]
    if len(ancestors) > 1:
        lines += _section(f"differences from its parent {ancestors[-2]}:", experiment(ancestors[-2], scale), plain)
    if overrides:
        lines += _section(f"overrides of {name}:", plain, config)
    fields = [f"{field} = {value}" for field, value in flatten(config).items()]
    return "\n".join([*lines, "every field:", *fields])


def _section(title: str, left: ExperimentConfig, right: ExperimentConfig) -> list[str]:
    lines = [line for difference in compare(left, right) for line in _lines(difference, left, right)]
    return [title, *(lines or ["  none"]), ""]


def _lines(difference: Difference, left: ExperimentConfig, right: ExperimentConfig) -> Iterator[str]:
    if difference.field == "preset":
        return
    if difference.field != "training.phases":
        yield f"  {difference.field} = {difference.right}  (there {difference.left})"
        return
    theirs, ours = _phases(left), _phases(right)
    for name in {**theirs, **ours}:
        if theirs.get(name) != ours.get(name):
            yield f"  training.phases: {name} = {ours.get(name, 'none')}  (there {theirs.get(name, 'none')})"


def _phases(config: ExperimentConfig) -> dict[str, str]:
    """Return what makes up the phases, one entry a number, so that a difference is short."""
    found: dict[str, str] = {}
    for phase in config.training.phases:
        found[f"{phase.name} share of the steps"] = f"{phase.frac:g}"
        found |= {f"{phase.name} rate of {group}": f"{value:g}" for group, value in phase.multipliers}
        parts = (("freezes", phase.freeze), ("redraws", phase.reinitialise))
        found |= {f"{phase.name} {verb}": ", ".join(names) for verb, names in parts if names}
    return found
