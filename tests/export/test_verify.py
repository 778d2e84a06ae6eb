"""``hrs verify`` on a storage with one of each thing: whole, it says so; damaged anywhere, it names the place."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hrs.cli import app
from hrs.config import canonical_json
from hrs.config.manifold import GeometryConfig
from hrs.data import open_tokens
from hrs.evaluation import AuditReport, evaluate
from hrs.export import export
from hrs.files import write_manifest
from hrs.manifold.build import open_manifold
from hrs.presets import experiment
from hrs.retrieval.store import EngramStore, NewMemory
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.training import load_model, train

CHANGES = {
    "data.tokenizer": "bpe:300",
    "model.d_model": 16,
    "model.n_heads": 2,
    "model.d_ff": 32,
    "model.max_seq_len": 16,
    "training.steps": 4,
    "training.validations": 0,
}
GEOMETRY = GeometryConfig(dimensions=4, modes=4, directional=2, syntactic=2, neighbours=4, steps=2, partners=8)


@pytest.fixture(scope="module")
def whole(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a database, tokens, a geometry, a bank, an engram store, a run and an artifact."""
    storage = Storage(tmp_path_factory.mktemp("whole"))
    config = experiment("dense_baseline", "micro", 0, CHANGES | {"data.corpus": f"jsonl:{small_corpus}"})
    tracker = Tracker(storage)
    with tracker.open_run("run", tracker.open_study("demo", {"run": config}), config, "data") as tracked:
        tracked.log(4, {"bits_per_byte": 2.0})
    store = open_tokens(config.data, storage.tokens)
    open_manifold(GEOMETRY, store, storage.manifolds)
    run = storage.run("run")
    for _ in train(config, store, run):
        pass
    (run / "config.json").write_text(canonical_json(config))
    (run / "unlogged_metrics.jsonl").write_text('["train_loss", 1.0, 1, 1]\n')
    model, _ = load_model(run)
    evaluate(model, store).save(run)
    (run / "audit.json").write_text(AuditReport([]).to_json())
    export(run, run / "model.hrs", store=store)
    bank = storage.root / "memories" / "bank"
    bank.mkdir(parents=True)
    np.save(bank / "train.slots.npy", np.arange(9))
    write_manifest(bank / "bank.json", {})
    memories = EngramStore.open(storage.root / "engrams" / "some", fingerprint="f", width=2)
    memories.add([NewMemory(text="a"), NewMemory(text="b")], np.eye(2, dtype=np.float32))
    (storage.root / "needles" / "key").mkdir(parents=True)
    (storage.root / "needles" / "key" / "needle.json").write_text("{}")
    return storage.root


def verified(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setenv("HRS_STORAGE", str(root))
    ended = CliRunner().invoke(app, ["verify"])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, ended.output


def test_a_whole_storage_is_whole(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = verified(whole, monkeypatch)
    assert status == 0, text
    counts = re.findall(r"^(\w[\w ]*?) +(\d+) +(\d+)$", text, re.MULTILINE)
    assert len(counts) == 11 and all(int(n) > 0 and int(bad) == 0 for _, n, bad in counts), text


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "damages",
    [
        [
            ("database", "mlflow/mlflow.db", cut),
            ("token store", "tokens/*/validation.tokens.arrow", flip),
            ("geometry", "manifolds/*/manifold.safetensors", flip),
            ("memory bank", "memories/bank/train.slots.npy", flip),
            ("engram store", "engrams/some/log-*.bin", remove),
            ("checkpoint", "runs/run/checkpoints/*/weights.safetensors", flip),
            ("run file", "runs/run/config.json", cut),
            ("run file", "runs/run/training.json", cut),
            ("run file", "runs/run/evaluation.json", cut),
            ("run file", "runs/run/audit.json", cut),
            ("run file", "runs/run/unlogged_metrics.jsonl", cut),
            ("result", "needles/key/needle.json", cut),
            ("artifact", "runs/run/model.hrs", flip),
        ],
        [
            ("token store", "tokens/*/tokenizer.json", remove),
            ("tokenizer", "runs/run/tokenizer.json", flip),
            ("run file", "runs/run/documents.arrow", cut),
            ("tracked run", "runs/run", lambda path: None),  # by the same file
        ],
        [("token store", "tokens/????????????????", remove), ("tokenizer", "runs/run/tokenizer.json", remove)],
        [("checkpoint", "runs/run/checkpoints/*/state.json", cut)],
    ],
)
def test_damage_is_named_with_its_place_and_ends_with_status_1(
    damages: list[tuple[str, str, Callable[[Path], None]]],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "storage"
    shutil.copytree(whole, root)
    damaged = []
    for kind, pattern, damage in damages:
        (path,) = root.glob(pattern)
        damage(path)
        damaged.append((kind, path.name))
    status, text = verified(root, monkeypatch)
    assert status == 1
    found = re.findall(r"^([a-z ]+?) \S+: (.*)\n  \S", text, re.MULTILINE)
    assert len(found) == len(damaged), text
    for kind, name in damaged:
        assert any(f_kind == kind and name in problem for f_kind, problem in found), (kind, name, text)
