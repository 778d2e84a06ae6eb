"""Engrams: a few vectors that summarise text for the blocks above, in every construction the presets know."""

from hrs.config import ModelConfig
from hrs.nn.engrams.base import BlockInputs, EngramMechanism, EngramState, WindowSlots
from hrs.nn.engrams.memory import MemoryEngrams
from hrs.nn.engrams.recurrence import RecurrenceEngrams
from hrs.nn.engrams.replace import ReplaceEngrams
from hrs.nn.engrams.retrieved import RetrievedEngrams
from hrs.nn.engrams.running import RunningEngrams
from hrs.nn.engrams.window import PrefixEngrams, WindowEngrams

_KINDS: dict[str, type[EngramMechanism]] = {
    "window": WindowEngrams,
    "prefix": PrefixEngrams,
    "recurrence": RecurrenceEngrams,
    "memory": MemoryEngrams,
    "retrieved": RetrievedEngrams,
    "running": RunningEngrams,
    "replace": ReplaceEngrams,
}


def build_engrams(config: ModelConfig) -> EngramMechanism | None:
    """The mechanism that ``config.engram.kind`` names; None for none."""
    return None if config.engram.kind == "none" else _KINDS[config.engram.kind](config)


__all__ = ["BlockInputs", "EngramMechanism", "EngramState", "WindowSlots", "build_engrams"]
