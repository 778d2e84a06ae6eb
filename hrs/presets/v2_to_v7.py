"""Versions two to seven: convolution blocks, product-key experts, and other ways to use engrams."""

from hrs.presets.phases import MEMORY, SHORT, V2
from hrs.presets.preset import Preset, Times
from hrs.presets.repairs import WINDOWS

V2_TO_V7 = (
    Preset(
        name="v2_attn_conv",
        parent="dense_baseline",
        summary="causal convolutions take the place of attention in the last two blocks",
        changes={"model.conv_blocks": 2},
        original_params=36_760_064,
        original_micro_batch=24,
    ),
    Preset(
        name="v2_attn_conv_dual",
        parent="v2_attn_conv",
        summary="adds the locality head",
        changes={"model.locality.enabled": True},
        original_params=37_022_208,
        original_micro_batch=24,
    ),
    Preset(
        name="v2_attn_conv_peer",
        parent="v2_attn_conv_dual",
        summary="product-key experts (PEER) replace the MLP, without a gate",
        changes={"model.feed_forward": ("peer",), "model.peer.gated": False},
        original_params=167_049_728,
        original_micro_batch=24,
    ),
    Preset(
        name="v2_full",
        parent="v2_attn_conv_peer",
        summary="adds a running engram to the convolution blocks, and a four-phase schedule of its own",
        changes={"model.engram.kind": "running", "training.phases": V2},
        repaired=(
            "engrams stood in front of the text, and the convolutions showed those of the whole text to the first "
            "twelve tokens; a convolution has no keys to add engrams to, so each token gets one (where a window had "
            "four: the encoder is smaller), made of the mean of all states up to it, through a gate"
        ),
        original_params=169_675_776,
        original_micro_batch=24,
    ),
    Preset(
        name="v3_full",
        parent="full_hrs_refined",
        summary="product-key experts are the expert tier",
        changes={"model.tiers.names": ("conv", "peer", "attention", "sink")},
        repaired=WINDOWS,
        original_params=175_586_312,
        original_micro_batch=8,
    ),
    Preset(
        name="v4_full",
        parent="v3_full",
        summary="product-key experts leave the tiers and follow them in every block, for all tokens",
        changes={"model.feed_forward": ("tiers", "peer"), "model.tiers.names": ("conv", "attention", "sink")},
        repaired=WINDOWS,
        original_params=175_590_156,
        original_micro_batch=8,
    ),
    Preset(
        name="v4_1024",
        parent="v4_full",
        summary="twice the context, and no refinement phase",
        changes={
            "model.max_seq_len": Times(2),
            "training.batch_sequences": Times(0.5),
            "training.phases": SHORT,
        },
        repaired=WINDOWS,
        original_params=175_590_156,
        original_micro_batch=4,
    ),
    Preset(
        name="v5_replace",
        parent="v4_full",
        summary="tokens are mixed with the engrams of the window before theirs, by a gate; no refinement phase",
        changes={"model.engram.kind": "replace", "training.phases": SHORT},
        repaired=(
            "tokens were mixed with the engrams of their own window, which hold its later tokens, by a gate on a "
            "training loss that no text has when it is generated, whose entropy was made small against the stated "
            "intent: now it is the window before, a gate on how well engrams tell their window, and the other sign"
        ),
        original_params=176_182_030,
        original_micro_batch=8,
    ),
    Preset(
        name="v6_gate",
        parent="v4_1024",
        summary="a learned gate decides how much of each window's engrams is kept",
        changes={"model.engram.remember_gate": True},
        repaired=(
            f"{WINDOWS}; the gate's first layer started at zero and so never learned, it read a training loss and "
            "statistics over all windows, and its entropy was made small against the stated intent: now it can learn, "
            "reads its own window only, and has the other sign"
        ),
        original_params=175_590_349,
        original_micro_batch=4,
    ),
    Preset(
        name="v7_full",
        parent="v4_full",
        summary="adds a predictor that learns the text while it reads, mixed with the model's own; no refinement phase",
        changes={"model.test_time_memory.enabled": True, "training.phases": MEMORY},
        repaired=(
            "a part of the original was never published and its result never reported, so there is no legacy copy; its "
            "memory learned from replayed batches of training text: this one is fast weights that start empty with "
            f"every text; {WINDOWS}"
        ),
        original_micro_batch=8,
    ),
)
