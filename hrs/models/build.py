"""From a config to a model."""

from hrs.config import ModelConfig
from hrs.models.base import LanguageModel
from hrs.models.hrs import HRSModel


def build_model(config: ModelConfig) -> LanguageModel:
    """A freshly initialised model of exactly this composition; draws from the global torch generator."""
    return HRSModel(config)
