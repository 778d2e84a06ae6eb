"""Every named ablation, and how it descends from the baseline."""

from collections.abc import Mapping
from difflib import get_close_matches

from hrs.errors import HRSError
from hrs.presets.controls import CONTROLS, KERNELS
from hrs.presets.legacy import LEGACY
from hrs.presets.manifold import MANIFOLD, MANIFOLD_LEGACY
from hrs.presets.preset import Preset
from hrs.presets.retrieval import RETRIEVAL
from hrs.presets.v1 import V1
from hrs.presets.v2_to_v7 import V2_TO_V7
from hrs.presets.v8_to_v18 import V8_TO_V14, V15_TO_V18

FAMILIES: Mapping[str, tuple[Preset, ...]] = {
    "Version 1": V1,
    "Versions 2 to 7": V2_TO_V7,
    "Versions 8 to 14": V8_TO_V14,
    "Versions 15 to 18": V15_TO_V18,
    "Controls": CONTROLS,
    "Attention kernels and positions": KERNELS,
    "Retrieved memory": RETRIEVAL,
    "Manifold-guided network": MANIFOLD,
    "Legacy": (*LEGACY, MANIFOLD_LEGACY),
}
"""Presets by group, in the order of lists and pages."""

PRESETS: dict[str, Preset] = {preset.name: preset for family in FAMILIES.values() for preset in family}


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        HRSError: with the nearest names, if there is none.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise HRSError(f"unknown preset '{name}': {hint}'hrs presets' lists them all")
    return PRESETS[name]


def lineage(name: str) -> list[Preset]:
    """The preset's ancestors, root first, ending with itself."""
    preset = get_preset(name)
    return [*(lineage(preset.parent) if preset.parent else []), preset]
