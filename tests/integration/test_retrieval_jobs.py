"""From a study to its registered model, a filled store and its needles: real Ray, real MLflow, the real commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hrs.cluster.inline import train_inline
from hrs.cluster.preflight import ROOT
from hrs.cluster.study import Study
from hrs.errors import HRSError
from hrs.export import open_model
from hrs.retrieval.engrams import engrams, model_fingerprint
from hrs.retrieval.store import EngramStore
from hrs.storage import Storage
from hrs.tracking import Tracker, resolve_model
from hrs.training import Runtime
from jobs import needle, populate_store


def run(storage: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HRS_STORAGE": str(storage)}
    line = [sys.executable, *command]
    ended = subprocess.run(line, env=environment, cwd=storage, capture_output=True, text=True)
    assert "Traceback" not in ended.stdout + ended.stderr, ended.stdout + ended.stderr
    return ended


def job(name: str) -> str:
    return str(ROOT / "jobs" / name)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # trains, and starts five private clusters one after the other
def test_from_a_study_to_its_needles(small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    overrides = {
        "data.corpus": f"jsonl:{small_corpus}",
        "data.tokenizer": "bpe:300",
        "training.steps": "10",
        "model.max_seq_len": "128",
    }
    study = Study(title="one", presets=("dense_baseline",), scale="micro", seeds=(0,), overrides=overrides)
    train_inline(study, Runtime())
    storage = Storage(tmp_path)
    (best,) = Tracker(storage).study_records(study.name, with_history=False)

    cli = ("-c", "from hrs.cli import main; main()")
    promoted = run(tmp_path, *cli, "promote", study.name)
    assert promoted.returncode == 0, promoted.stderr
    assert "taken: dense_baseline/0" in promoted.stdout and "mlflow:hrs@champion is version 1" in promoted.stdout
    assert "version 1: step_00000010" in run(tmp_path, *cli, "promote", study.name).stdout
    checkpoint = resolve_model(storage, "mlflow:hrs@champion")
    assert checkpoint == storage.run(best.key) / "checkpoints" / "step_00000010"
    scored = run(tmp_path, *cli, "evaluate", "mlflow:hrs@champion")
    assert f"bits_per_byte        {best.metrics['bits_per_byte']:.6g}" in scored.stdout
    assert run(tmp_path, *cli, "audit", "mlflow:hrs/1").returncode == 0
    missing = run(tmp_path, *cli, "generate", "mlflow:hrs@best")
    assert missing.returncode == 2 and missing.stderr.startswith("error: registered model 'hrs' has no alias 'best'")

    fill = (
        job("populate_store.py"),
        "mlflow:hrs@champion",
        "validation",
        "--condition",
        "both",
        "--keep-above",
        "0.25",
    )
    first = run(tmp_path, *fill)
    assert first.returncode == 0, first.stdout + first.stderr
    stores = [Path(line.split()[1]) for line in first.stdout.splitlines() if line.startswith("store: ")]
    opened = open_model(checkpoint, storage.tokens)
    sizes = []
    for path in stores:
        store = EngramStore.open(
            path,
            fingerprint=model_fingerprint(opened.model),
            width=opened.model.d_model,
            normalisation="centred",
            create=False,
        )
        sizes.append(len(store))
        assert f"{sizes[-1]} added now, {sizes[-1]} in the store" in first.stdout
    assert len(sizes) == 2 and min(sizes) > 5
    again = run(tmp_path, *fill)
    assert again.stdout.count(" 0 added now") == 2
    memory = store.list()[0]
    key = engrams(opened.model, [opened.tokenizer.encode(memory.text).ids])
    assert store.search(key, 1)[0][0].similarity > 0.5  # keys of the other condition are near, not equal

    seek = (job("needle.py"), str(storage.run(best.key)), "--split", "train", "--haystack", "3", "--trials", "8")
    seek = (*seek, "--distractors", "0,5", "--depths", "0,1", "--new-tokens", "3")
    found = run(tmp_path, *seek)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "sought 16 of 16 needles" in found.stdout and "asked 16 times, memory: text, shuffled" in found.stdout
    (folder,) = (tmp_path / "needles").iterdir()
    assert {p.name for p in folder.iterdir()} == {"needle.json", "needle.md", "needle.png", "needle.txt"}
    assert (folder / "needle.txt").read_text() in found.stdout
    metrics = json.loads((folder / "needle.json").read_text())["metrics"]
    (record,) = Tracker(storage).records([folder.name])
    assert record.status == "finished" and record.metrics == pytest.approx(metrics)
    assert len(list(storage.artifacts.rglob("needle.png"))) == 1
    repeated = run(tmp_path, *seek)
    assert "sought 16 of" not in repeated.stdout and (folder / "needle.txt").read_text() in repeated.stdout


def test_a_wrong_command_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    for main in (lambda model: needle.main([model]), lambda model: populate_store.main([model, "train"])):
        with pytest.raises(HRSError, match="no path, study or run has the name 'nothing'"):
            main("nothing")
        with pytest.raises(HRSError, match="there is no registered model 'hrs'"):
            main("mlflow:hrs@champion")
    with pytest.raises(HRSError, match="--keep-above: must be a number between 0 and"):
        populate_store.main([str(tmp_path), "train", "--keep-above", "1"])
    with pytest.raises(HRSError, match="--condition both fills two stores"):
        populate_store.main([str(tmp_path), "train", "--condition", "both", "--store", "x"])
    with pytest.raises(HRSError, match="--depths: must be a number between 0 and 1"):
        needle.main([str(tmp_path), "--depths", "0,middle"])
