"""What is built when, without Ray: which experiments read a manifold, what a trial gets, which lines are printed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hrs.cluster.manifold import (
    LINE_SECONDS,
    ProgressLines,
    build_manifolds,
    cached_digest,
    geometry_of,
    reads_manifold,
)
from hrs.config import ExperimentConfig
from hrs.data import TokenStore, open_tokens
from hrs.manifold.build import manifold_key, open_manifold
from hrs.presets import experiment
from hrs.storage import Storage

Configure = Callable[..., ExperimentConfig]


@pytest.fixture
def configure(small_corpus: Path) -> Configure:
    def make(preset: str = "manifold_v18", seed: int = 0, **geometry: int) -> ExperimentConfig:
        overrides = {"data.corpus": f"jsonl:{small_corpus}", "data.tokenizer": "bpe:300"}
        return experiment(
            preset, "micro", seed, overrides | {f"model.manifold.geometry.{n}": v for n, v in geometry.items()}
        )

    return make


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


@pytest.fixture
def store(configure: Configure, storage: Storage) -> TokenStore:
    return open_tokens(configure().data, storage.tokens)


def test_only_models_guided_by_the_text_read_a_manifold(configure: Configure) -> None:
    readers = ("manifold_v18", "manifold_permuted", "manifold_random", "manifold_v18_legacy")
    assert all(reads_manifold(configure(preset)) for preset in readers)
    assert not any(reads_manifold(configure(preset)) for preset in ("manifold_none", "dense_baseline", "full_hrs"))


def test_a_trial_gets_the_geometry_of_its_source_and_seed(
    configure: Configure, storage: Storage, store: TokenStore
) -> None:
    assert geometry_of(configure("dense_baseline"), store, storage) is None
    nothing = geometry_of(configure("manifold_none"), store, storage)
    assert not storage.manifolds.exists(), "no geometry needs no manifold"
    corpus = geometry_of(configure(), store, storage)
    permuted, other = (geometry_of(configure("manifold_permuted", seed), store, storage) for seed in (0, 1))
    random = geometry_of(configure("manifold_random"), store, storage)
    assert corpus is not None and permuted is not None and other is not None and random is not None
    assert nothing is not None and not nothing.coordinates.any() and (nothing.neighbours == -1).all()
    config = configure().model.manifold.geometry
    for geometry in (corpus, permuted, random, nothing):
        assert geometry.coordinates.shape == (300, config.n_coordinates)
        assert geometry.neighbours.shape == (300, config.neighbours)
        assert (geometry.coordinates.dtype, geometry.neighbours.dtype) == (torch.float32, torch.int64)

    manifold = open_manifold(config, store, storage.manifolds)
    assert torch.equal(corpus.coordinates, torch.from_numpy(manifold.coordinates))
    assert torch.equal(geometry_of(configure(seed=1), store, storage).coordinates, corpus.coordinates)  # type: ignore[union-attr]
    rows = [sorted(geometry.coordinates.tolist()) for geometry in (corpus, permuted, other)]
    assert rows[0] == rows[1] == rows[2], "a permutation only"
    assert not torch.equal(permuted.coordinates, corpus.coordinates)
    assert not torch.equal(permuted.coordinates, other.coordinates), "of the run's seed"
    assert len(list(storage.manifolds.glob("*/manifold.json"))) == 1, "one manifold for all of them"


def test_what_is_there_needs_no_ray(configure: Configure, storage: Storage, store: TokenStore) -> None:
    config = configure()
    manifold = open_manifold(config.model.manifold.geometry, store, storage.manifolds)
    key = manifold_key(config.model.manifold.geometry, store.fingerprint)
    program = (
        "import sys\n"
        "from hrs.cluster.manifold import build_manifolds\n"
        "from hrs.config import ExperimentConfig, from_dict\n"
        "from hrs.storage import Storage\n"
        "import json, pathlib\n"
        "configs = [from_dict(ExperimentConfig, values) for values in json.loads(sys.argv[1])]\n"
        "print(json.dumps(build_manifolds(configs, Storage(pathlib.Path(sys.argv[2])), print)))\n"
        "assert 'ray' not in sys.modules\n"
    )
    from hrs.config import canonical_json

    presets = ("manifold_v18", "manifold_permuted", "manifold_none", "dense_baseline")
    configs = f"[{','.join(canonical_json(configure(preset, seed)) for preset in presets for seed in (0, 1))}]"
    words = [sys.executable, "-c", program, configs, str(storage.root)]
    ended = subprocess.run(words, env=os.environ, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f'{{"{key}": "{manifold.digest}"}}\n'
    assert build_manifolds([configure("dense_baseline")], storage, print) == {}


def test_a_damaged_manifold_does_not_count_as_there(configure: Configure, storage: Storage, store: TokenStore) -> None:
    geometry = configure().model.manifold.geometry
    key = manifold_key(geometry, store.fingerprint)
    assert cached_digest(key, storage) is None
    digest = open_manifold(geometry, store, storage.manifolds).digest
    assert cached_digest(key, storage) == digest
    tensors = storage.manifolds / key / "manifold.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert cached_digest(key, storage) is None


def test_lines_of_progress_are_few_and_never_miss_the_end_of_a_stage() -> None:
    lines, printed = ProgressLines("0123456789abcdef"), []
    for step in range(102):
        reports = {"counts": (1.0, "7 tokens"), "physics": (min(step, 97) / 100, f"energy {200 - min(step, 97)}")}
        if step > 98:
            reports["spectrum"] = (0.0, "")
        printed += list(lines.fresh(reports, now=step * LINE_SECONDS / 40))
    assert printed == [
        "manifold 01234567  counts       100%  7 tokens",
        "manifold 01234567  physics        0%  energy 200",
        "manifold 01234567  physics       40%  energy 160",
        "manifold 01234567  physics       80%  energy 120",
        "manifold 01234567  physics       97%  energy 103",
        "manifold 01234567  spectrum       0%",
    ]
    assert list(lines.fresh({"counts": (1.0, "7 tokens")}, now=1e9)) == [], "nothing is said twice"
