"""Whole language models. :func:`build_model` is the only way from a config to weights."""

from hrs.models.base import Cache, LanguageModel, ModelOutput, WindowContext
from hrs.models.build import build_model, count_parameters

__all__ = ["Cache", "LanguageModel", "ModelOutput", "WindowContext", "build_model", "count_parameters"]
