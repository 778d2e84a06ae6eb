"""Rows that the original lacked: each isolates one claim."""

import math

from hrs.config import ModelConfig
from hrs.presets.preset import FromModel, Preset

# ---- equal parameters ------------------------------------------------------------------------------------------------


def _encoder(model: ModelConfig) -> int:
    """Parameters of the engram encoder, biases and norm included, and of the type embedding."""
    d, k = model.d_model, model.engram.per_window
    return d * 2 * d + 2 * d + 2 * d * k * d + k * d + 2 * d + d


def _recurrence(model: ModelConfig) -> int:
    return _encoder(model) + model.engram.history_windows * model.d_model


def _memory(model: ModelConfig) -> int:
    """Parameters of the cross-attention, its two norms and gate included, in every second block."""
    d = model.d_model
    return model.n_layers // 2 * (4 * d * d + 4 * d + 1)


def _wider(extra: int, model: ModelConfig) -> int:
    """``d_ff`` with which the MLPs of all blocks hold ``extra`` more parameters."""
    return model.d_ff + round(extra / (2 * model.d_model * model.n_layers))


def _sub_keys_of_wide_experts(model: ModelConfig) -> int:
    """Keys per side with which experts as wide as the model hold as much as experts as wide as a head."""
    return max(model.peer.top_k, round(model.peer.sub_keys / math.sqrt(model.peer.n_heads)))


CONTROLS = (
    Preset(
        name="dual_head_router_mlp",
        parent="dual_head_router",
        summary="the MLP stays, after the tiers: is it routing that costs, or the missing MLP?",
        changes={"model.feed_forward": ("tiers", "mlp")},
    ),
    Preset(
        name="full_hrs_mlp",
        parent="full_hrs",
        summary="the MLP stays, after the tiers",
        changes={"model.feed_forward": ("tiers", "mlp")},
    ),
    Preset(
        name="full_hrs_running",
        parent="full_hrs",
        summary="one running engram per token in place of those of windows",
        changes={"model.engram.kind": "running"},
    ),
    Preset(
        name="full_hrs_recurrence",
        parent="full_hrs",
        summary="engrams of the text before the training window, too",
        changes={"model.engram.kind": "recurrence"},
    ),
    Preset(
        name="dense_window",
        parent="dense_baseline",
        summary="engrams of completed windows in an otherwise plain transformer",
        changes={"model.engram.kind": "window"},
    ),
    Preset(
        name="dense_recurrence",
        parent="dense_baseline",
        summary="engrams of completed windows and of the text before the training window in a plain transformer",
        changes={"model.engram.kind": "recurrence"},
    ),
    Preset(
        name="dense_running",
        parent="dense_baseline",
        summary="one running engram per token in a plain transformer",
        changes={"model.engram.kind": "running"},
    ),
    Preset(
        name="dense_memory",
        parent="dense_baseline",
        summary="a memory of the training text, read by cross-attention, in a plain transformer",
        changes={"model.engram.kind": "memory", "model.engram.extract_after": -2},
    ),
    Preset(
        name="dense_wide_recurrence",
        parent="dense_baseline",
        summary="as many parameters as dense_recurrence (and, but for a few vectors, dense_window), spent on the MLP",
        changes={"model.d_ff": FromModel(lambda m: _wider(_recurrence(m), m), "wider by dense_recurrence's engrams")},
    ),
    Preset(
        name="dense_wide_memory",
        parent="dense_baseline",
        summary="as many parameters as dense_memory, spent on the MLP",
        changes={"model.d_ff": FromModel(lambda m: _wider(_memory(m), m), "wider by dense_memory's cross-attention")},
    ),
    Preset(
        name="v17_unphased",
        parent="v17_peer_only",
        summary="one learning rate for all: do phases under-train the experts?",
        changes={"training.phases": ()},
    ),
    Preset(
        name="v17_paper_peer",
        parent="v17_peer_only",
        summary="product-key experts as He (2024) published them: fewer and wider, with nearly as many parameters",
        changes={
            "model.peer.mode": "paper",
            "model.peer.sub_keys": FromModel(_sub_keys_of_wide_experts, "the scale's / sqrt(peer.n_heads)"),
        },
    ),
)

# ---- attention -------------------------------------------------------------------------------------------------------

_KERNELS = {
    "exponential": "minus the squared distance of query and key",
    "mlp": "the dot product of learned features of query and key",
    "random_projection": "the dot product of random features of query and key",
    "l1": "minus the L1 distance of query and key",
    "sin_product": "the sum of sines of the products of their entries",
    "soft_rank": "minus the squared distance, set between its least and greatest",
}

KERNELS = (
    *(
        Preset(
            name=f"kernel_{kernel}",
            parent="dense_baseline",
            summary=f"attention scores are {text}",
            changes={"model.attention.kernel": kernel},
        )
        for kernel, text in _KERNELS.items()
    ),
    Preset(
        name="attention_alibi",
        parent="dense_baseline",
        summary="linear penalties of distance (ALiBi) in place of rotary positions",
        changes={"model.attention.positions": "alibi"},
    ),
    Preset(
        name="attention_learned",
        parent="dense_baseline",
        summary="learned position embeddings in place of rotary positions",
        changes={"model.attention.positions": "learned"},
    ),
)
