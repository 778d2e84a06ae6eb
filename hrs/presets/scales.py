"""One dial for width, depth, vocabulary, context and steps; presets say what, a scale says how big."""

from collections.abc import Mapping
from typing import Any

from hrs.errors import HRSError

SCALES: dict[str, Mapping[str, Any]] = {
    # A test: seconds. Here and at tiny a run sees no token twice, so dropout would only cost time.
    "micro": {
        "model.d_model": 32,
        "model.n_heads": 2,
        "model.d_ff": 64,
        "model.max_seq_len": 64,
        "model.dropout": 0.0,
        "model.router.hidden": 8,
        "model.tiers.expert_hidden": 16,
        "model.peer.sub_keys": 16,
        "model.peer.n_heads": 2,
        "model.peer.top_k": 4,
        "model.engram.window": 16,
        "model.engram.synapse_hidden": 8,
        "model.engram.slots": 4,
        "model.engram.slot_updates": 10,
        "model.attention.features": 8,
        "model.category.n_classes": 16,
        "model.test_time_memory.chunk": 8,
        "model.test_time_memory.key_width": 8,
        "model.test_time_memory.router_hidden": 8,
        "model.manifold.geometry.dimensions": 16,
        "model.manifold.geometry.partners": 0,
        "model.manifold.geometry.steps": 100,
        "model.manifold.geometry.modes": 24,
        "model.manifold.geometry.directional": 4,
        "model.manifold.geometry.syntactic": 4,
        "model.manifold.geometry.neighbours": 6,
        "data.tokenizer": "bpe:512",
        "training.steps": 20,
        "training.batch_sequences": 4,
        "training.validations": 2,
        "training.validation_windows": 64,
        "training.schedule.peak_lr": 3e-3,
        "training.schedule.warmup_frac": 0.1,
    },
    # The README demo: the whole table on two CPU cores in minutes.
    "tiny": {
        "model.d_model": 128,
        "model.n_heads": 4,
        "model.d_ff": 512,
        "model.max_seq_len": 128,
        "model.dropout": 0.0,
        "model.router.hidden": 16,
        "model.tiers.expert_hidden": 64,
        "model.peer.sub_keys": 32,
        "model.peer.n_heads": 4,
        "model.peer.top_k": 8,
        "model.engram.window": 32,
        "model.engram.synapse_hidden": 16,
        "model.engram.slots": 8,
        "model.engram.slot_updates": 50,
        "model.attention.features": 16,
        "model.test_time_memory.key_width": 16,
        "model.test_time_memory.router_hidden": 32,
        "model.manifold.geometry.dimensions": 64,
        "model.manifold.geometry.partners": 0,
        "model.manifold.geometry.steps": 500,
        "model.manifold.geometry.modes": 96,
        "model.manifold.geometry.directional": 16,
        "model.manifold.geometry.syntactic": 16,
        "data.tokenizer": "bpe:2048",
        "training.steps": 800,
        "training.batch_sequences": 4,
        "training.validations": 5,
        "training.validation_windows": 128,
        "training.schedule.peak_lr": 3e-3,
        "training.schedule.warmup_frac": 0.05,
    },
    # A laptop GPU: about an hour a row.
    "small": {
        "model.d_model": 256,
        "model.n_heads": 4,
        "model.d_ff": 1024,
        "model.max_seq_len": 256,
        "model.router.hidden": 32,
        "model.tiers.expert_hidden": 128,
        "model.peer.sub_keys": 128,
        "model.peer.n_heads": 8,
        "model.peer.top_k": 16,
        "model.engram.window": 64,
        "model.engram.synapse_hidden": 32,
        "model.engram.slots": 16,
        "model.engram.slot_updates": 200,
        "model.test_time_memory.key_width": 32,
        "model.test_time_memory.router_hidden": 64,
        "model.manifold.geometry.dimensions": 128,
        "model.manifold.geometry.modes": 192,
        "data.tokenizer": "bpe:8192",
        "training.steps": 10_000,
        "training.batch_sequences": 32,
        "training.validation_windows": 256,
        "training.schedule.peak_lr": 1e-3,
    },
    # The original's setting: the dataclass defaults, on a 16 GB card.
    "paper": {},
}


def get_scale(name: str) -> Mapping[str, Any]:
    """The scale's field values.

    Raises:
        HRSError: if there is no such scale.
    """
    if name not in SCALES:
        raise HRSError(f"unknown scale '{name}': choose one of {', '.join(SCALES)}")
    return SCALES[name]
