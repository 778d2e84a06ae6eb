"""The first version: heads, routing, phases and engrams, one after the other."""

from hrs.presets.phases import CORE, FULL, refined
from hrs.presets.preset import Preset
from hrs.presets.repairs import GATE, WINDOWS

_ENGRAMS = f"{GATE}; {WINDOWS}"

V1 = (
    Preset(
        name="dense_baseline",
        parent=None,
        summary="pre-norm transformer with rotary attention, a GELU MLP and tied embeddings",
        original_params=38_323_712,
        original_micro_batch=24,
        reported_gb=16,
    ),
    Preset(
        name="dual_head",
        parent="dense_baseline",
        summary="adds the locality head: InfoNCE between nearby positions",
        changes={"model.locality.enabled": True},
        original_params=38_585_856,
        original_micro_batch=24,
        reported_gb=16,
    ),
    Preset(
        name="dual_head_router",
        parent="dual_head",
        summary="routed conv, expert, attention and sink tiers replace the MLP",
        changes={"model.feed_forward": ("tiers",)},
        repaired=GATE,
        original_params=38_750_724,
        original_micro_batch=24,
        reported_gb=16,
    ),
    Preset(
        name="dual_head_router_sink",
        parent="dual_head_router",
        summary="the residual stream shrinks by the share routed to the sink",
        changes={"model.tiers.sink_rescale": True},
        repaired=GATE,
        original_params=38_750_728,
        original_micro_batch=24,
        reported_gb=16,
    ),
    Preset(
        name="full_core",
        parent="dual_head_router_sink",
        summary="trains in phases with a learning rate per component",
        changes={"training.phases": CORE},
        repaired=GATE,
        original_params=38_750_728,
        original_micro_batch=24,
        reported_gb=16,
    ),
    Preset(
        name="full_hrs",
        parent="full_core",
        summary="adds engrams of completed windows as extra keys and values, and the five-phase schedule",
        changes={"model.engram.kind": "window", "training.phases": FULL},
        repaired=_ENGRAMS,
        original_params=41_376_776,
        original_micro_batch=24,
        reported_gb=16,
    ),
    Preset(
        name="full_hrs_refined",
        parent="full_hrs",
        summary="last phase: frozen encoder, type embedding drawn anew and trained",
        changes={"training.phases": refined()},
        repaired=_ENGRAMS,
        original_params=41_376_776,
        original_micro_batch=24,
        reported_gb=16,
    ),
    Preset(
        name="full_hrs_trc",
        parent="full_hrs",
        summary="routing logits averaged causally over 8 tokens",
        changes={"model.router.trc_window": 8},
        repaired=_ENGRAMS,
        original_params=41_376_776,
        original_micro_batch=24,
        reported_gb=16,
    ),
)
