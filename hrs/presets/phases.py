"""The five phases of the original protocol as learning-rate multipliers per parameter group.

Fractions replace step counts, so one table serves every scale. The generation head is tied to the embedding and
therefore has no group of its own.
"""

from hrs.config import PhaseConfig

_GROUPS = ("backbone", "locality_head", "router", "conv", "expert", "attention_tier", "sink", "engram")
_TABLE = {
    "foundation": (1.0, 0.01, 0.01, 1.0, 0.01, 0.01, 0.01, 0.0),
    "geometry": (0.5, 1.0, 1.0, 0.5, 0.1, 0.1, 0.1, 0.0),
    "specialisation": (0.3, 0.3, 1.0, 0.5, 1.0, 0.5, 1.0, 0.0),
    "compression": (0.1, 0.1, 0.3, 0.1, 0.3, 0.1, 0.3, 1.0),
    "refinement": (0.3, 0.1, 0.3, 0.3, 0.3, 0.3, 0.1, 0.0),
}


def _phases(*fractions: float) -> tuple[PhaseConfig, ...]:
    return tuple(
        PhaseConfig(name=name, frac=frac, multipliers=tuple(zip(_GROUPS, _TABLE[name], strict=True)))
        for name, frac in zip(_TABLE, fractions, strict=False)
    )


CORE = _phases(0.2, 0.2, 0.2, 0.4)
"""10k / 10k / 10k of 50k steps, then the fourth phase to the end (there is no engram for it to train)."""

FULL = _phases(0.16, 0.16, 0.20, 0.24, 0.24)
"""8k / 8k / 10k / 12k / 12k of 50k steps; the engram encoder rests in the last."""


def refined() -> tuple[PhaseConfig, ...]:
    """FULL, but in the last phase only the engrams' type embedding learns, drawn anew, at half the rate."""
    *first, last = FULL
    multipliers = tuple((group, 0.5 if group == "engram" else value) for group, value in last.multipliers)
    refinement = PhaseConfig(
        name=last.name,
        frac=last.frac,
        multipliers=multipliers,
        freeze=("engram.encoder",),
        reinitialise=("engram.type_embedding",),
    )
    return (*first, refinement)
