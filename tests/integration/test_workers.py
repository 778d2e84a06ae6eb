"""One run on several Ray workers: the weights of one process, and a lost worker costs nothing but time."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

from hrs.cluster.preflight import ROOT
from hrs.cluster.workers import train_with_workers
from hrs.config import ExperimentConfig
from hrs.data import open_tokens
from hrs.errors import HRSError
from hrs.evaluation import Evaluation
from hrs.presets import experiment
from hrs.training import Runtime, load_model, train

pytestmark = pytest.mark.slow

RUNTIME = Runtime(device="cpu", log_every=1, checkpoint_every=4)


@pytest.fixture
def compose(small_corpus: Path) -> Callable[..., ExperimentConfig]:
    def make(preset: str, workers: int, *unshared: str, **changes: Any) -> ExperimentConfig:
        overrides = {
            "data.corpus": f"jsonl:{small_corpus}",
            "data.tokenizer": "bpe:300",
            "model.dropout": 0.0,
            "training.steps": 10,
            "training.validations": 2,
            "training.validation_windows": 4,
            "training.optimizer.eps": 1e-3,  # else Adam turns the rounding of tiny gradients into whole steps
            "training.sharing.workers": workers,
            "training.sharing.unshared": list(unshared),
        }
        return experiment(preset, "micro", 0, overrides | changes)

    return make


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def gap(one: Path, other: Path) -> float:
    """The largest difference of any weight between two runs."""
    left, right = (load_model(directory)[0].state_dict() for directory in (one, other))
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def test_plain_sharing_is_the_run_of_one_process(
    ray_local: ModuleType, compose: Callable[..., ExperimentConfig], tokens: Path, tmp_path: Path
) -> None:
    alone = compose("dense_baseline", 1)
    single = list(train(alone, open_tokens(alone.data, tokens), tmp_path / "alone", RUNTIME))
    config = compose("dense_baseline", 2)
    reports = list(train_with_workers(config, tokens, tmp_path / "shared", RUNTIME))
    assert gap(tmp_path / "alone", tmp_path / "shared") < 1e-5
    for p, q in zip(reports, single, strict=True):
        assert (p.step, p.phase, p.metrics.keys()) == (q.step, q.phase, q.metrics.keys())
        assert p.loss == pytest.approx(q.loss, abs=1e-4)
    assert reports[-1].metrics["validation_loss"] == pytest.approx(single[-1].metrics["validation_loss"], abs=1e-4)
    assert list(train_with_workers(config, tokens, tmp_path / "shared", RUNTIME)) == [], "it is complete"


def test_selective_sharing_is_what_one_process_computes(
    ray_local: ModuleType, compose: Callable[..., ExperimentConfig], tokens: Path, tmp_path: Path
) -> None:
    config = compose("dual_head_router", 2, "router", "expert", **{"model.dropout": 0.1})
    store = open_tokens(config.data, tokens)
    list(train(config, store, tmp_path / "one", RUNTIME))
    list(train_with_workers(config, tokens, tmp_path / "two", RUNTIME))
    plain = compose("dual_head_router", 2, **{"model.dropout": 0.1})
    list(train(plain, store, tmp_path / "plain", RUNTIME))
    assert gap(tmp_path / "one", tmp_path / "two") < 1e-5
    assert gap(tmp_path / "plain", tmp_path / "two") > 1e-3, "the two strategies differ"


def second_worker() -> psutil.Process:
    """Of the run that has reported once: it is still in its first call, the first worker is not."""
    (process,) = (
        child
        for child in psutil.Process().children(recursive=True)
        if child.is_running() and "".join(child.cmdline()[:1]).startswith("ray::Worker.begin")
    )
    return process


def test_a_killed_worker_ends_the_others_and_the_next_call_goes_on(
    ray_local: ModuleType, compose: Callable[..., ExperimentConfig], tokens: Path, tmp_path: Path
) -> None:
    config = compose("dual_head_router", 2, "router")
    steps = []
    with pytest.raises(HRSError, match=r"worker 1 of 2 died .* goes on from the last checkpoint") as error:
        for progress in train_with_workers(config, tokens, tmp_path / "killed", RUNTIME):
            steps.append(progress.step)
            if progress.step == 6:
                second_worker().send_signal(signal.SIGKILL)
    assert "\n" not in str(error.value) and steps[-1] in (6, 7)
    again = [p.step for p in train_with_workers(config, tokens, tmp_path / "killed", RUNTIME)]
    assert again == list(range(5, 11))
    list(train_with_workers(config, tokens, tmp_path / "undisturbed", RUNTIME))
    left, right = (load_model(tmp_path / name)[0].state_dict() for name in ("killed", "undisturbed"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_mistake_is_one_sentence_and_frees_the_cluster(
    ray_local: ModuleType, compose: Callable[..., ExperimentConfig], tokens: Path, tmp_path: Path
) -> None:
    with pytest.raises(HRSError, match=r"worker \d of 2: training.sharing.unshared: unknown group hops; this model"):
        list(train_with_workers(compose("dense_baseline", 2, "hops"), tokens, tmp_path, RUNTIME))
    with pytest.raises(HRSError, match="8 workers need 8 cores and the cluster has 4"):
        eight = compose("dense_baseline", 8, **{"training.batch_sequences": 8})
        list(train_with_workers(eight, tokens, tmp_path, RUNTIME))
    steps = train_with_workers(compose("dense_baseline", 4), tokens, tmp_path, RUNTIME)
    assert next(steps).step == 1, "there is room for four again"
    steps.close()


def test_the_job_trains_evaluates_audits_and_tracks(small_corpus: Path, tmp_path: Path) -> None:
    job = [sys.executable, str(ROOT / "jobs" / "train_parallel.py"), "dual_head_router", "--unshared", "router"]
    job += ["--scale", "micro", "--corpus", f"jsonl:{small_corpus}", "--set", "data.tokenizer=bpe:300"]
    job += ["--set", "training.steps=8"]
    environment = os.environ | {"HRS_STORAGE": str(tmp_path)}
    ended = subprocess.run(job, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 workers on" in ended.stdout and "finished" in ended.stdout
    (directory,) = (tmp_path / "runs").iterdir()
    assert ended.stdout.splitlines()[-1] == f"run dual_head_router/0: {directory}"
    (row,) = [line for line in ended.stdout.splitlines() if line.split()[:1] == ["dual_head_router"]]
    assert f" {Evaluation.load(directory).bits_per_byte:.2f} [" in row and row.endswith("yes")
    again = subprocess.run(job, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "finished before" in again.stdout
