"""Whole language models. :func:`build_model` is the only way from a config to weights."""

from hrs.models.base import Cache, LanguageModel, ModelOutput
from hrs.models.build import build_model

__all__ = ["Cache", "LanguageModel", "ModelOutput", "build_model"]
