"""Originals that could see the future or were broken, rebuilt with their defects and their protocol's confounds."""

from collections.abc import Iterable, Mapping
from typing import Any

from hrs.presets.preset import Preset
from hrs.presets.v1 import V1
from hrs.presets.v2_to_v7 import V2_TO_V7
from hrs.presets.v8_to_v18 import V8_TO_V14, V15_TO_V18

_PREFIX = {"model.engram.kind": "prefix", "model.engram.dropout": 0.0}
_DEFECTS = {"model.engram.as_original": True}
_SMOOTHING = {"training.label_smoothing": 0.1}
_GATE = {"model.tiers.renormalise_gate": True}
_DRIFT = {"model.loss_scales": "original"}
_IDLE = {"model.peer.idle_norm": True}

_BATCH = {"training.batch_sequences": 32}
_STEPS = {"training.steps": 38_000, "training.schedule.warmup_frac": 1000 / 38_000}
_ROUTED_STEPS = {**_STEPS, "model.router.temperature_decay_frac": 1.0}
"""The original's temperature fell over 40,000 steps, a little more than there were."""

_SHOWS = "its engrams show every token the future"
_PLAIN = {preset.name: preset for preset in (*V1, *V2_TO_V7, *V8_TO_V14, *V15_TO_V18)}


def _legacy(
    name: str, remark: str, *changes: Mapping[str, Any], paper: Iterable[Mapping[str, Any]] = (), leaks: bool = True
) -> Preset:
    """A copy of the preset ``name`` with changes, and with what all originals had in common: every parameter decayed,
    model selection on ten batches of its micro-batch."""
    plain = _PLAIN[name]
    assert plain.original_micro_batch is not None
    protocol = {
        "training.validation_windows": 10 * plain.original_micro_batch,
        "training.optimizer.decay_vectors": True,
    }
    return Preset(
        name=f"{name}_legacy",
        parent=name,
        summary=f"{name} as the original ran it: {remark}",
        changes=_merged(changes) | protocol,
        paper=_merged(paper),
        legacy=True,
        leaks=leaks,
        original_params=plain.original_params,
        original_micro_batch=plain.original_micro_batch,
        reported_gb=plain.reported_gb,
    )


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


LEGACY = (
    *(
        _legacy(name, "the choice of experts has no gradient", _GATE, _SMOOTHING, leaks=False)
        for name in ("dual_head_router", "dual_head_router_sink", "full_core")
    ),
    _legacy("full_hrs", _SHOWS, _PREFIX, _GATE, _SMOOTHING),
    _legacy("full_hrs_refined", _SHOWS, _PREFIX, _GATE, _SMOOTHING),
    _legacy("full_hrs_trc", _SHOWS, _PREFIX, _GATE, _SMOOTHING),
    _legacy("v2_full", "the convolutions show the first twelve tokens engrams of the future", _PREFIX),
    _legacy("v3_full", _SHOWS, _PREFIX, _SMOOTHING),
    _legacy("v4_full", _SHOWS, _PREFIX, _SMOOTHING),
    _legacy("v4_1024", _SHOWS, _PREFIX, _SMOOTHING, paper=(_ROUTED_STEPS,)),
    _legacy(
        "v5_replace",
        "tokens are mixed with engrams of their own window, its later tokens included",
        {"model.engram.dropout": 0.0},
        _DEFECTS,
        _SMOOTHING,
        paper=(_ROUTED_STEPS,),
    ),
    _legacy("v6_gate", _SHOWS, _PREFIX, _DEFECTS, _SMOOTHING, paper=(_ROUTED_STEPS,)),
    _legacy("v8_bdh", _SHOWS, _PREFIX, _DEFECTS, _SMOOTHING, paper=(_ROUTED_STEPS, _BATCH)),
    _legacy("v9_learnable", _SHOWS, _PREFIX, _DEFECTS, _DRIFT, _SMOOTHING, paper=(_BATCH,)),
    _legacy(
        "v10_control",
        "loss weights that drift whatever the data, and an idle norm",
        _DRIFT,
        _IDLE,
        paper=(_STEPS, _BATCH),
        leaks=False,
    ),
    _legacy("v11_no_p5", _SHOWS, _PREFIX, _DEFECTS, _DRIFT, _SMOOTHING, paper=(_BATCH,)),
    _legacy("v12_247m", _SHOWS, _PREFIX, _DEFECTS, _DRIFT, _SMOOTHING, paper=(_BATCH,)),
    _legacy("v13_low_sparsity", _SHOWS, _PREFIX, _DEFECTS, _DRIFT, _SMOOTHING, paper=(_BATCH,)),
    _legacy("v14_attn_sink", _SHOWS, _PREFIX, _DEFECTS, _DRIFT, _SMOOTHING, paper=(_BATCH,)),
    _legacy("v15_vanilla_route", _SHOWS, _PREFIX, _SMOOTHING, paper=(_BATCH,)),
    _legacy(
        "v16_peer_engram",
        f"{_SHOWS} (without its engram dropout of 0.1: prepended engrams cannot be left out of one micro-batch)",
        _PREFIX,
        _IDLE,
        paper=(_BATCH,),
    ),
    _legacy("v17_peer_only", "an idle norm, and every parameter decayed", _IDLE, paper=(_BATCH,), leaks=False),
    _legacy(
        "v18_cross_attn",
        "all slots alike, so its cross-attention adds a constant; labels of other articles",
        {"model.engram.dropout": 0.0, "model.category.labels": "estimated"},
        _DEFECTS,
        _IDLE,
        paper=(_BATCH,),
        leaks=False,
    ),
)
