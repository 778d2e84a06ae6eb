"""Presets whose models differ: some presets differ from another in training only."""

from hrs.config import ModelConfig, override
from hrs.presets import PRESETS, experiment


def _network(name: str) -> ModelConfig:
    """What decides a model's layers: controls of the geometry differ in the numbers they are given alone."""
    config = experiment(name, "micro").model
    return override(config, {"manifold.source": "corpus", "manifold.geometry.definition": "clean"})


DISTINCT = list({_network(name): name for name in reversed(PRESETS)}.values())
"""One preset of each distinct model."""

DISTINCT_HRS = [name for name in DISTINCT if experiment(name, "micro").model.family == "hrs"]
"""Those of the HRS family."""
