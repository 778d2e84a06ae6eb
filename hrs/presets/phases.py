"""The phases of the original protocols as learning-rate multipliers per parameter group.

Fractions replace step counts, so one table serves every scale. The generation head is tied to the embedding and
therefore has no group of its own.
"""

from dataclasses import replace

from hrs.config import PhaseConfig

_NAMES = ("foundation", "geometry", "specialisation", "compression", "refinement")

_GROUPS = ("backbone", "locality_head", "router", "conv", "expert", "attention_tier", "sink", "engram")
_TABLE = (
    (1.0, 0.01, 0.01, 1.0, 0.01, 0.01, 0.01, 0.0),
    (0.5, 1.0, 1.0, 0.5, 0.1, 0.1, 0.1, 0.0),
    (0.3, 0.3, 1.0, 0.5, 1.0, 0.5, 1.0, 0.0),
    (0.1, 0.1, 0.3, 0.1, 0.3, 0.1, 0.3, 1.0),
    (0.3, 0.1, 0.3, 0.3, 0.3, 0.3, 0.1, 0.0),
)

_V2_GROUPS = ("backbone", "locality_head", "expert", "engram")
_V2_TABLE = (
    (1.0, 1.0, 0.1, 0.0),
    (0.3, 0.3, 1.0, 0.0),
    (0.1, 0.1, 0.3, 1.0),
    (0.3, 0.3, 0.5, 0.5),
)

Phases = tuple[PhaseConfig, ...]


def _phases(groups: tuple[str, ...], table: tuple[tuple[float, ...], ...], *fractions: float) -> Phases:
    return tuple(
        PhaseConfig(name=name, frac=frac, multipliers=tuple(zip(groups, row, strict=True)))
        for name, row, frac in zip(_NAMES, table, fractions, strict=False)
    )


def _with(phases: Phases, group: str, *multipliers: float) -> Phases:
    """The same with one more group, by phase."""
    return tuple(
        replace(phase, multipliers=(*phase.multipliers, (group, multiplier)))
        for phase, multiplier in zip(phases, multipliers, strict=True)
    )


CORE = _phases(_GROUPS, _TABLE, 0.2, 0.2, 0.2, 0.4)
"""10k / 10k / 10k of 50k steps, then the fourth phase to the end (there is no engram for it to train)."""

FULL = _phases(_GROUPS, _TABLE, 0.16, 0.16, 0.20, 0.24, 0.24)
"""8k / 8k / 10k / 12k / 12k of 50k steps; the engram encoder rests in the last."""

SHORT = _phases(_GROUPS, _TABLE, 8 / 38, 8 / 38, 10 / 38, 12 / 38)
"""8k / 8k / 10k / 12k of 38k steps: no refinement."""

LONG = _phases(_GROUPS, _TABLE, 0.16, 0.16, 0.20, 0.48)
"""8k / 8k / 10k / 24k of 50k steps: no refinement."""

V2 = _phases(_V2_GROUPS, _V2_TABLE, 0.24, 0.24, 0.28, 0.24)
"""12k / 12k / 14k / 12k of 50k steps, with groups and multipliers of their own."""

MEMORY = _with(SHORT, "test_time_memory", 0.0, 0.0, 0.5, 1.0)
"""SHORT with the multipliers that the seventh version gave to its memory's router."""


def with_loss_scales(phases: Phases) -> Phases:
    """The same with learned loss weights at a tenth of the learning rate throughout."""
    return _with(phases, "loss_scales", *(0.1 for _ in phases))


def refined() -> Phases:
    """FULL, but in the last phase only the engrams' type embedding learns, drawn anew, at half the rate."""
    *first, last = FULL
    multipliers = tuple((group, 0.5 if group == "engram" else value) for group, value in last.multipliers)
    refinement = replace(
        last, multipliers=multipliers, freeze=("engram.encoder",), reinitialise=("engram.type_embedding",)
    )
    return (*first, refinement)
