"""Small models with every kind of tensor an artifact meets."""

import functools

import torch
from tokenizers import Tokenizer

from hrs.config import ExperimentConfig, override
from hrs.data.tokenization import build_tokenizer
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment


def small_config(preset: str = "dense_baseline") -> ExperimentConfig:
    """A preset at micro scale over the 300 ids of :func:`small_tokenizer`."""
    changes = {"model.vocab_size": 300, "data.tokenizer": "bpe:300", "training.steps": 10}
    return override(experiment(preset, "micro"), changes)


def small_model(preset: str = "dense_baseline", seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    return build_model(small_config(preset).model).eval()


@functools.cache
def small_tokenizer() -> Tokenizer:
    rows = (" ".join(str(number * 7919) for number in range(start, start + 50)) for start in range(0, 1000, 50))
    return build_tokenizer("bpe:300", rows)
