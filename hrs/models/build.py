"""From a config to a model."""

import functools

import torch

from hrs.config import ModelConfig
from hrs.models.base import LanguageModel
from hrs.models.hrs import HRSModel


def build_model(config: ModelConfig) -> LanguageModel:
    """A freshly initialised model of exactly this composition; draws from the global torch generator."""
    return HRSModel(config)


@functools.cache
def count_parameters(config: ModelConfig) -> int:
    """Distinct scalars of a model of this composition, without allocating one."""
    with torch.device("meta"):
        return build_model(config).count_parameters()
