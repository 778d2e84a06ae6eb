"""Runs of a few steps on the small corpus."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hrs.config import ExperimentConfig
from hrs.data import TokenStore
from hrs.presets import experiment
from hrs.training import Progress, Runtime, train

SMALL = {
    "data.tokenizer": "bpe:300",
    "model.d_model": 16,
    "model.n_heads": 2,
    "model.d_ff": 32,
    "model.max_seq_len": 16,
    "model.engram.window": 4,
    "model.engram.per_window": 2,
    "model.locality.window": 4,
    "model.locality.n_anchors": 4,
    "model.locality.n_negatives": 4,
    "training.steps": 12,
    "training.validations": 2,
    "training.validation_windows": 8,
    "training.schedule.peak_lr": 1e-2,
}


@pytest.fixture
def small_experiment(small_corpus: Path) -> Callable[..., ExperimentConfig]:
    """``small_experiment(preset, {"training.steps": 5})``: an experiment on the small corpus."""

    def compose(preset: str = "dense_baseline", changes: dict[str, Any] | None = None) -> ExperimentConfig:
        return experiment(preset, "micro", 7, SMALL | {"data.corpus": f"jsonl:{small_corpus}"} | (changes or {}))

    return compose


@pytest.fixture
def run(small_store: TokenStore) -> Callable[..., list[Progress]]:
    """``run(config, directory, log_every=1)``: train to the end and give every report."""

    def start(config: ExperimentConfig, directory: Path, **runtime: Any) -> list[Progress]:
        return list(train(config, small_store, directory, Runtime(device="cpu", **({"log_every": 1} | runtime))))

    return start
