"""Every named ablation and what it changes in its parent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from hrs.errors import HRSError
from hrs.presets.phases import CORE, FULL, refined


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One named ablation."""

    name: str
    parent: str | None
    """The preset this one differs from; None for the root."""
    summary: str
    """One sentence: what it adds or removes."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted config fields and their new values."""
    legacy: bool = False
    """A faithful copy of an original that could see the future. Only a label: the audit decides what is causal."""


_LEGACY: dict[str, Any] = {
    "model.engram.kind": "prefix",
    "model.engram.dropout": 0.0,
    "model.tiers.renormalise_gate": True,
    "training.label_smoothing": 0.1,
    "training.validation_windows": 240,
    "training.optimizer.decay_vectors": True,
}
"""The original's leak and its confounds: summaries every token can read, no engram dropout, an expert gate without
gradient, label smoothing for routed rows alone, model selection on 240 windows, decay of every parameter."""


def _legacy(name: str) -> Preset:
    summary = f"{name} as the original ran it: its engrams show every token the future"
    return Preset(name=f"{name}_legacy", parent=name, summary=summary, changes=_LEGACY, legacy=True)


_ALL = (
    Preset(
        name="dense_baseline",
        parent=None,
        summary="pre-norm transformer with rotary attention, a GELU MLP and tied embeddings",
    ),
    Preset(
        name="dual_head",
        parent="dense_baseline",
        summary="adds the locality head: InfoNCE between nearby positions",
        changes={"model.locality.enabled": True},
    ),
    Preset(
        name="dual_head_router",
        parent="dual_head",
        summary="routed conv, expert, attention and sink tiers replace the MLP",
        changes={"model.feed_forward": "tiers"},
    ),
    Preset(
        name="dual_head_router_sink",
        parent="dual_head_router",
        summary="the residual stream shrinks by the share routed to the sink",
        changes={"model.tiers.sink_rescale": True},
    ),
    Preset(
        name="full_core",
        parent="dual_head_router_sink",
        summary="trains in phases with a learning rate per component",
        changes={"training.phases": CORE},
    ),
    Preset(
        name="full_hrs",
        parent="full_core",
        summary="adds engrams of completed windows as extra keys and values, and the five-phase schedule",
        changes={"model.engram.kind": "window", "training.phases": FULL},
    ),
    Preset(
        name="full_hrs_refined",
        parent="full_hrs",
        summary="last phase: frozen encoder, type embedding drawn anew and trained",
        changes={"training.phases": refined()},
    ),
    Preset(
        name="full_hrs_trc",
        parent="full_hrs",
        summary="routing logits averaged causally over 8 tokens",
        changes={"model.router.trc_window": 8},
    ),
    _legacy("full_hrs"),
    _legacy("full_hrs_refined"),
    _legacy("full_hrs_trc"),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


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
