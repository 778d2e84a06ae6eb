"""What a preset is, and the values that follow from the scale."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hrs.config import ExperimentConfig, ModelConfig, flatten


@runtime_checkable
class Relative(Protocol):
    """A field's new value that depends on the scale. Its text stands on the page of presets."""

    def resolve(self, name: str, base: ExperimentConfig) -> Any:
        """The value of field ``name``, given what the scale alone makes of an experiment."""


@dataclass(frozen=True, slots=True)
class Times:
    """The scale's value times a factor; whole numbers stay whole."""

    factor: float

    def resolve(self, name: str, base: ExperimentConfig) -> int | float:
        value = flatten(base)[name]
        return round(value * self.factor) if isinstance(value, int) else value * self.factor

    def __str__(self) -> str:
        return f"{self.factor:g} x the scale's"


@dataclass(frozen=True, slots=True)
class FromModel:
    """A value computed from the scale's model."""

    compute: Callable[[ModelConfig], int]
    text: str
    """What it is, for people."""

    def resolve(self, name: str, base: ExperimentConfig) -> int:
        return self.compute(base.model)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One named ablation."""

    name: str
    parent: str | None
    """The preset this one differs from; None for the root."""
    summary: str
    """One sentence: what it adds or removes."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted config fields and their new values, some of them :class:`Relative`."""
    paper: Mapping[str, Any] = field(default_factory=dict)
    """Further changes at scale ``paper`` only, where the original's own dimensions and length are meant."""
    legacy: bool = False
    """A faithful copy of an original that could see the future, or was broken."""
    leaks: bool = False
    """What the audit must find. Only a label that tests compare with the audit: nothing else reads it."""
    repaired: str = ""
    """What was changed in the original so that its number means something, and why; empty if nothing had to be."""
    original_params: int | None = None
    """Parameters of the original, counted from its code; those of the legacy copy if there is one."""
    original_micro_batch: int | None = None
    """Windows per forward pass in the original's runs."""
    reported_gb: float | None = None
    """Training memory that the original reported for it."""
