"""Which fields of an experiment decide anything: a part that is off has fields that no code reads."""

from typing import Any

from hrs.config.codec import flatten
from hrs.config.experiment import ExperimentConfig
from hrs.config.model import ModelConfig


def fields_in_effect(config: ExperimentConfig) -> dict[str, Any]:
    """Return the flat fields without those of parts that are off; the switch of such a part stays."""
    idle = tuple(_idle(config))
    kept = ("model.engram.kind", "training.retrieval.base")
    return {
        name: value
        for name, value in flatten(config).items()
        if not name.startswith(idle) or name in kept or name.endswith(".enabled")
    }


def _idle(config: ExperimentConfig) -> list[str]:
    """Return beginnings of the names of fields that nothing reads."""
    training = config.training
    tail = {"cosine": ("decay_frac", "hold_frac"), "wsd": ("hold_frac",), "cosine_hold_linear": ()}
    parts = [
        ("training.averaging.", not training.averaging.decays),
        ("training.sharing.unshared", training.sharing.workers == 1),
        ("training.retrieval.", not training.retrieval.base),
    ]
    parts += [(f"training.schedule.{name}", True) for name in tail[training.schedule.shape]]
    return [name for name, idle in parts if idle] + _idle_of_model(config.model)


def _idle_of_model(model: ModelConfig) -> list[str]:
    if model.family == "manifold":
        read = ("vocab_size", "n_layers", "n_heads", "d_model", "max_seq_len", "dropout", "rope_base", "manifold.")
        names = [f"model.{name}" for name in flatten(model)]
        return [n for n in names if n != "model.family" and not n.startswith(tuple(f"model.{part}" for part in read))]
    parts = (
        ("manifold.", True),
        ("router.", not model.routed),
        ("tiers.", not model.routed),
        ("peer.", not model.uses_peer),
        ("attention.features", model.attention.kernel not in ("mlp", "random_projection")),
        ("engram.", model.engram.kind == "none"),
        ("locality.", not model.locality.enabled),
        ("category.", not model.category.enabled),
        ("test_time_memory.", not model.test_time_memory.enabled),
    )
    return [f"model.{name}" for name, idle in parts if idle]
