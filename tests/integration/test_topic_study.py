"""The topic study: the best causal run of a study through Ray to tables, files and copies in MLflow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hrs.cluster.inline import train_inline
from hrs.cluster.preflight import ROOT
from hrs.cluster.study import Study
from hrs.errors import HRSError
from hrs.evaluation.topic_pairs import Bounds, PairScores
from hrs.retrieval.topics.stress_result import StressResult
from hrs.retrieval.topics.stress_texts import TOPICS
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.training import Runtime
from jobs import topic_study

SOURCES = ["trained", "untrained", "embeddings", "tokens", "random", topic_study.CENTRED]


def run(storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    job = [sys.executable, str(ROOT / "jobs" / "topic_study.py"), *arguments]
    environment = os.environ | {"HRS_STORAGE": str(storage)}
    return subprocess.run(job, env=environment, cwd=storage, capture_output=True, text=True)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty short articles of ten sentences, each in ten words of its own."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("prose") / "prose.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i, topic in enumerate(TOPICS):
            text = " ".join(f"{' '.join(rng.choice(TOPICS[topic], 8)).capitalize()}." for _ in range(10))
            split = "validation" if i % 4 == 0 else "train"
            file.write(json.dumps({"title": topic, "text": text, "split": split}) + "\n")
    return path


@pytest.mark.slow
def test_a_study_is_measured_at_both_scales_beside_its_controls_and_tracked(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    overrides = {"data.corpus": f"jsonl:{prose}", "data.tokenizer": "bpe:300", "training.steps": 10}
    study = Study(title="one", presets=("dense_baseline",), scale="micro", seeds=(0,), overrides=overrides)
    train_inline(study, Runtime())
    storage = Storage(tmp_path)
    (best,) = Tracker(storage).study_records(study.name, with_history=False)

    ended = run(tmp_path, study.name, "--seeds", "1", "--draws", "1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "best causal run: dense_baseline/0" in ended.stdout
    folder = storage.report(study.name)
    text = (folder / "topics.md").read_text()
    assert text in ended.stdout
    assert all(text.count(f"| {source} ") == 3 for source in SOURCES), "two scales and the stress tests"
    told = json.loads((folder / "topics.json").read_text())
    assert told["model"] == str(storage.run(best.key))
    for scale in ("article", "sentence"):
        scores = told["pairs"][scale]
        assert list(scores) == SOURCES
        assert (scores["trained"]["n_documents"], scores["trained"]["n_fitted_documents"]) == (13, 37)
        assert scores["tokens"]["auc"]["value"] > 0.8, "the articles have words of their own"
        assert abs(scores["random"]["auc"]["value"] - 0.5) < 0.12
        assert scores["trained"]["accuracy"]["low"] < scores["trained"]["accuracy"]["high"]
        assert scores["trained"]["auc"] != scores["untrained"]["auc"]
    assert list(told["stress"]) == SOURCES
    assert {len(results) for results in told["stress"].values()} == {7}
    by_name = {result["name"]: result for result in told["stress"]["random"]}
    assert not any(result["passed"] for result in by_name.values())
    (tracked,) = storage.artifacts.rglob("topics.json")
    assert tracked.read_bytes() == (folder / "topics.json").read_bytes() and tracked.parent.name == "topics"

    directory = storage.run(best.key)
    assert topic_study.places(str(directory), storage, Tracker(storage)) == (directory, directory / "topics")
    artifact = directory / "model.hrs"
    artifact.touch()
    assert topic_study.places(str(artifact), storage, Tracker(storage)) == (artifact, directory / "topics")


def test_a_wrong_command_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    with pytest.raises(HRSError, match="--seeds: must lie between 1 and 10,000, got 0"):
        topic_study.main(["s", "--seeds", "0"])
    with pytest.raises(HRSError, match="no path, study or run has the name 'nothing'"):
        topic_study.main(["nothing"])


@pytest.mark.parametrize(("fitted", "join"), [(0.4, 0.4), (-np.inf, -0.99), (np.inf, 0.999), (1.0, 0.999)])
def test_every_fitted_threshold_is_one_that_topics_accept(fitted: float, join: float) -> None:
    assert topic_study.join_threshold(fitted) == join


def test_the_page_tells_every_number_and_marks_what_is_certain() -> None:
    sure, unsure = Bounds(value=0.9, low=0.8, high=0.95), Bounds(value=-0.01, low=-0.05, high=0.02)
    score = PairScores(
        auc=sure, auc_classifier=sure, accuracy=sure, accuracy_classifier=sure, difference=unsure, above_trained=None,
        majority=0.5, accuracy_fitted=0.9, accuracy_classifier_fitted=0.9, by_seed=(0.9,), threshold=0.432,
        mean_same=0.7, mean_different=0.1, n_fitted_documents=40, n_documents=30, n_same=1200, n_different=34000,
    )  # fmt: skip
    passed = StressResult(name="drift", together=0.8, apart=1.0, low=0.8, high=1.0, n_draws=5)
    failed = StressResult(name="fork", together=1.0, apart=0.0, low=0.5, high=0.5, n_draws=5)
    study = topic_study.TopicStudy(
        pairs={"article": {"trained": score}}, stress={"trained": [passed, failed]}, joins={"trained": 0.432}
    )
    text = topic_study.page(study, "name")
    assert "1,200 pairs against 34,000" in text and "30 validation articles" in text and "0.432" in text
    assert "0.80/1.00*" in text and "1.00/0.00 " in text
    assert "0.90 [0.80,0.95]" in text and "-0.01 [-0.05,+0.02]" in text
    assert json.loads(json.dumps(study.to_dict()))["pairs"]["article"]["trained"]["threshold"] == 0.432
