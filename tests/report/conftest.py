"""Synthetic runs: documents with a difficulty of their own, presets and seeds that shift it."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from hrs.config import to_dict
from hrs.presets import PRESETS, experiment, get_study
from hrs.report.records import RunRecord

N_DOCUMENTS = 40


def documents(nats_per_byte: float, *, seed: int = 0, n: int = N_DOCUMENTS) -> pa.Table:
    """A table of ``n`` documents; the texts are always the same, ``seed`` only moves the nats."""
    texts, noise = np.random.default_rng(7), np.random.default_rng([seed, 1])
    n_bytes = texts.integers(200, 4000, n)
    difficulty = texts.normal(1.0, 0.15, n) + noise.normal(0, 0.01, n)
    text_nats = nats_per_byte * difficulty * n_bytes
    tokens = n_bytes // 3 + 1
    return pa.table(
        {
            "document": np.arange(n, dtype=np.int32),
            "title": [f"document {i}" for i in range(n)],
            "topic": [None] * n,
            "nats": text_nats + 2.0,
            "text_nats": text_nats,
            "tokens": tokens,
            "bytes": n_bytes,
            "words": n_bytes // 6,
        }
    )


@pytest.fixture
def make_record() -> Callable[..., RunRecord]:
    return record


def record(preset: str = "dense_baseline", seed: int = 0, nats_per_byte: float = 1.2, **fields: object) -> RunRecord:
    """A finished, causal run of a preset at tiny scale with plausible curves."""
    config = experiment(preset, "tiny", seed)
    steps = config.training.steps
    rng = np.random.default_rng([seed, *preset.encode()])
    train = [
        (s, 3 * nats_per_byte + 4 * float(np.exp(-s / 60)) + float(rng.normal(0, 0.06)))
        for s in range(10, steps + 1, 10)
    ]
    schedule = [(s, 3e-3 * min(1.0, s / 15) * (0.5 + 0.5 * float(np.cos(np.pi * s / steps)))) for s, _ in train]
    length = config.model.max_seq_len
    if config.model.routed:
        shares = rng.dirichlet([4, 4, 4, 2], size=config.model.n_layers).tolist()
    values: dict[str, object] = {
        "key": rng.bytes(8).hex(),
        "preset": preset,
        "scale": "tiny",
        "seed": seed,
        "status": "finished",
        "code_version": "code-of-runs",
        "data_fingerprint": "data-of-runs",
        "causal": not PRESETS[preset].leaks,
        "parameters": 1_234_567 + 10_000 * len(preset),
        "tokens_per_second": 12_345.0 + 100 * seed,
        "peak_memory_bytes": 812 * 2**20,
        "documents": documents(nats_per_byte, seed=sum(preset.encode()) + seed),
        "loss_by_position": (3 * nats_per_byte + 3 / np.sqrt(1 + np.arange(length))).tolist(),
        "history": {"train_loss": train, "validation_loss": [(s, v + 0.1) for s, v in train[5::6]], "lr": schedule},
        "config": to_dict(config),
        "tier_share": shares if config.model.routed else None,
    }
    return RunRecord(**{**values, **fields})  # type: ignore[arg-type]


def full_study() -> list[RunRecord]:
    """Eleven presets times three seeds: one preset failed, one run was killed, three presets see the future."""
    levels = (1.20, 1.19, 1.26, 1.27, 1.31, 1.22, 1.21, 1.205, 0.25, 0.22, 0.21)
    level = dict(zip(get_study("v1_with_legacy"), levels, strict=True))
    records = []
    for preset, nats in level.items():
        for seed in range(3):
            fields: dict[str, object] = {}
            if PRESETS[preset].leaks:
                leak = "suffix_flip: positions 0..95 changed, through blocks.2"
                fields |= {
                    "audit_failures": (leak, "gradient: 31 of 32 positions"),
                    "loss_by_position": [0.7] * 120 + [3.0] * 8,
                }
            elif preset == "dual_head_router_sink":
                gone = {"documents": None, "causal": None, "loss_by_position": None, "tier_share": None, "history": {}}
                fields |= {"status": "failed", "reason": "out of memory at micro-batch 1 of 16", **gone}
            elif preset == "full_core" and seed == 2:
                fields |= {"status": "killed", "reason": "node lost", "documents": None, "causal": None}
            records.append(record(preset, seed, nats + 0.004 * np.sin(seed + len(preset)), **fields))
    return records


@pytest.fixture(scope="session")
def study() -> list[RunRecord]:
    return full_study()
