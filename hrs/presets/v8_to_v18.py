"""Versions eight to eighteen: synapses and sparsity, learned loss weights, depth, width, and experts alone."""

from hrs.presets.phases import FULL, LONG, SHORT, with_loss_scales
from hrs.presets.preset import Preset, Times
from hrs.presets.repairs import IDLE_NORM, LOSS_SCALES, SYNAPSE, WINDOWS

_SYNAPSE = f"{WINDOWS}; {SYNAPSE}"
_SCALES = f"{_SYNAPSE}; {LOSS_SCALES}"

V8_TO_V14 = (
    Preset(
        name="v8_bdh",
        parent="v4_full",
        summary="engrams set the temperature of heads, tiers read a sparse input, shares are pulled to Zipf's law",
        changes={
            "model.engram.synapse": True,
            "model.tiers.input_density": 0.05,
            "model.router.hub_exponent": 1.5,
            "training.phases": SHORT,
        },
        repaired=_SYNAPSE,
        original_params=176_114_444,
        original_micro_batch=4,
    ),
    Preset(
        name="v9_learnable",
        parent="v8_bdh",
        summary="the weights of the routing and reconstruction losses are learned; five phases",
        changes={"model.loss_scales": "learned", "training.phases": with_loss_scales(FULL)},
        repaired=_SCALES,
        original_params=176_114_447,
        original_micro_batch=4,
    ),
    Preset(
        name="v10_control",
        parent="dual_head",
        summary="the control of v9_learnable: product-key experts for the MLP, learned weights of meaningless losses",
        changes={
            "model.feed_forward": ("peer",),
            "model.placeholder_losses": True,
            "model.loss_scales": "learned",
            "training.phases": with_loss_scales(SHORT),
        },
        repaired=f"{IDLE_NORM}; {LOSS_SCALES}",
        original_params=168_640_007,
        original_micro_batch=4,
    ),
    Preset(
        name="v11_no_p5",
        parent="v9_learnable",
        summary="no refinement phase: the fourth goes on to the end",
        changes={"training.phases": with_loss_scales(LONG)},
        repaired=_SCALES,
        original_params=176_114_447,
        original_micro_batch=4,
    ),
    Preset(
        name="v12_247m",
        parent="v11_no_p5",
        summary="half as many blocks again",
        changes={"model.n_layers": Times(1.5)},
        repaired=_SCALES,
        original_params=249_861_269,
        original_micro_batch=4,
        reported_gb=7.7,
    ),
    Preset(
        name="v13_low_sparsity",
        parent="v12_247m",
        summary="tiers read 95 % of their input in place of 5 %",
        changes={"model.tiers.input_density": 0.95},
        repaired=_SCALES,
        original_params=249_861_269,
        original_micro_batch=4,
    ),
    Preset(
        name="v14_attn_sink",
        parent="v13_low_sparsity",
        summary="attention and sink are the only tiers, pulled to a steep Zipf's law",
        changes={"model.tiers.names": ("attention", "sink"), "model.router.hub_exponent": 5.5},
        repaired=_SCALES,
        original_params=249_833_237,
        original_micro_batch=4,
    ),
)

V15_TO_V18 = (
    Preset(
        name="v15_vanilla_route",
        parent="v14_attn_sink",
        summary="an MLP for the product-key experts, dense tier input, balance loss, fixed weights, no synapse; wider",
        changes={
            "model.feed_forward": ("tiers", "mlp"),
            "model.tiers.input_density": 1.0,
            "model.router.hub_exponent": 0.0,
            "model.engram.synapse": False,
            "model.loss_scales": "fixed",
            "training.phases": LONG,
        },
        paper={"model.d_model": 1024, "model.n_heads": 16, "model.d_ff": 4096},
        repaired=WINDOWS,
        original_params=164_096_780,
        original_micro_batch=4,
    ),
    Preset(
        name="v16_peer_engram",
        parent="v15_vanilla_route",
        summary="product-key experts are the only feed-forward: neither tiers nor MLP",
        changes={"model.feed_forward": ("peer",)},
        repaired=f"{WINDOWS}; {IDLE_NORM}",
        original_params=509_751_302,
        original_micro_batch=4,
        reported_gb=5.7,
    ),
    Preset(
        name="v17_peer_only",
        parent="v16_peer_engram",
        summary="no engrams",
        changes={"model.engram.kind": "none"},
        repaired=f"{IDLE_NORM}; the phases, which under-train the experts, are kept: v17_unphased is their control",
        original_params=499_256_326,
        original_micro_batch=4,
        reported_gb=5.5,
    ),
    Preset(
        name="v18_cross_attn",
        parent="v17_peer_only",
        summary="every second block reads a memory of the training text by cross-attention; a head names the topic",
        changes={
            "model.engram.kind": "memory",
            "model.engram.extract_after": -2,
            "model.category.enabled": True,
        },
        repaired=(
            "all 32 slots were one and the same average, so cross-attention added a constant, and topic labels drifted "
            "away from their articles: now slots differ (online k-means), have a norm and start as no change, and "
            f"labels follow the documents; {IDLE_NORM}"
        ),
        original_params=511_896_635,
        original_micro_batch=4,
        reported_gb=12.5,
    ),
)
