"""From a config to a model."""

import functools

import torch

from hrs.config import ModelConfig
from hrs.models.base import LanguageModel
from hrs.models.geometry import TokenGeometry
from hrs.models.hrs import HRSModel
from hrs.models.manifold import ManifoldModel
from hrs.models.manifold_as_built import ManifoldModelAsBuilt


def build_model(config: ModelConfig, geometry: TokenGeometry | None = None) -> LanguageModel:
    """A freshly initialised model of exactly this composition; draws from the global torch generator.

    Args:
        geometry: what a manifold-guided network reads. Without it the network gets a random one, good for counting,
            tracing and auditing, and for weights that are loaded afterwards: a checkpoint holds its geometry.
    """
    if config.family == "hrs":
        return HRSModel(config)
    network = ManifoldModelAsBuilt if config.manifold.as_built else ManifoldModel
    return network(config, geometry)


@functools.cache
def count_parameters(config: ModelConfig) -> int:
    """Distinct scalars of a model of this composition, without allocating one."""
    with torch.device("meta"):
        return build_model(config).count_parameters()
