"""Topics of an endpoint: fitted to its model, off with a reason where they would be of no use, and never mixed."""

from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from hrs.cli import app
from hrs.data import open_tokens
from hrs.export.opening import OpenedModel, open_model
from hrs.presets import experiment
from hrs.retrieval.engrams import model_fingerprint
from hrs.retrieval.topics.contexts import TopicContexts
from hrs.retrieval.topics.fit import TopicFit, fit_path
from hrs.retrieval.topics.stress_result import Thresholds
from hrs.storage import Storage
from hrs.training import Runtime, train
from serve.settings import Settings
from serve.shared_topics import SharedTopics
from serve.topic_state import NO_TOPICS, keep_fit, topic_state

BASE = {"model": "tiny", "prompt": "The wave", "max_tokens": 2}


def test_topics_that_would_be_of_no_use_are_off_and_the_reason_is_said(another: Callable) -> None:
    with another(topic_least_auc=0.95) as endpoint, httpx.Client(base_url=f"{endpoint.url}/v1") as http:
        answers = [
            http.post("/completions", json=BASE | {"hrs": {"topics": True}}),
            http.post("/memories", json={"input": "The moon", "topic": "auto"}),
        ]
        for answer, field in zip(answers, ("hrs.topics", "topic"), strict=True):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "topics_off", field)
            assert error["message"].endswith("with an AUC of 0.90 only, below 0.95")
        told = http.get("/topics").json()
        assert told["data"] == [] and told["hrs"]["on"] is False and "below 0.95" in told["hrs"]["reason"]
        assert http.get("/memories").json()["total"] == 0
        assert http.post("/completions", json=BASE).status_code == 200
        assert http.post("/memories", json={"input": "The moon", "topic": "a"}).status_code == 200


def test_how_well_topics_separate_is_told(endpoint) -> None:
    told = httpx.get(f"{endpoint.url}/v1/topics").json()["hrs"]
    assert told == {"on": True, "reason": None, "auc": 0.9, "low": 0.8, "high": 1.0, "together": 1.0, "apart": 1.0,
                    "n_documents": 4, "join": 0.5}  # fmt: skip


@pytest.fixture(scope="module")
def run(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, OpenedModel]:
    storage = Storage(tmp_path_factory.mktemp("storage"))
    changes = {
        "data.tokenizer": "bpe:300", "data.corpus": f"jsonl:{small_corpus}", "model.max_seq_len": 64,
        "training.steps": 2, "training.validations": 0, "training.schedule.warmup_frac": 0.0,
    }  # fmt: skip
    config = experiment("dense_baseline", "micro", overrides=changes)
    list(train(config, open_tokens(config.data, storage.tokens), storage.run("a"), Runtime(device="cpu")))
    return storage, open_model(storage.run("a"), storage.tokens)


def test_an_endpoint_fits_topics_to_its_model_once(run: tuple[Storage, OpenedModel], tmp_path: Path) -> None:
    storage, opened = run
    settings = Settings(model="m", topic_least_auc=0.0)
    made = topic_state(opened, storage.run("a"), settings, storage, tmp_path)
    assert made.fit is not None and made.why_off is None and made.line().startswith("on, AUC 0.")
    keep_fit(made, tmp_path)
    elsewhere = Storage(tmp_path / "empty")
    assert topic_state(opened, tmp_path / "moved", settings, elsewhere, tmp_path) == made
    none = topic_state(opened, tmp_path / "moved", settings, elsewhere, tmp_path / "none")
    assert none == NO_TOPICS and "run hrs topics MODEL" in none.line()
    strict = topic_state(opened, storage.run("a"), Settings(model="m", topic_least_auc=1.0), storage, tmp_path)
    assert strict.fit == made.fit and strict.line().startswith("off, this model's engrams tell subjects apart")


def test_the_command_keeps_the_fit_with_the_model_and_tells_it(
    run: tuple[Storage, OpenedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, opened = run
    monkeypatch.setenv("HRS_STORAGE", str(storage.root))
    told = CliRunner().invoke(app, ["topics", str(storage.run("a"))])
    assert told.exit_code == 0, told.output
    fit = TopicFit.load(storage.run("a") / "topic_fit.json", model_fingerprint(opened.model))
    assert told.output.splitlines()[0] == f"topics: {fit.sentence()}"
    assert ("serve:  on" in told.output) == (fit.auc >= 0.7)
    state = topic_state(opened, storage.run("a"), Settings(model="m"), Storage(tmp_path), tmp_path)
    assert state.fit == fit, "without text at hand"
    fit_path(storage.run("a")).unlink()


def test_the_fit_beside_a_model_comes_first_and_is_of_its_weights(
    run: tuple[Storage, OpenedModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, opened = run
    values = {"block": None, "mean": (0.0,) * opened.model.d_model, "join": 0.1, "merge": 0.6, "auc": 0.9, "low": 0.8,
              "high": 1.0, "together": 1.0, "apart": 1.0, "n_fitted_documents": 4, "n_documents": 4,
              "piece_tokens": 32}  # fmt: skip
    artifact, nothing = tmp_path / "model.hrs", Storage(tmp_path / "empty")
    artifact.write_bytes(b"")
    fit = TopicFit(model=model_fingerprint(opened.model), **values)
    fit.save(fit_path(artifact))
    assert topic_state(opened, artifact, Settings(model="m"), nothing, tmp_path).fit == fit
    TopicFit(model="0" * 16, **values).save(fit_path(artifact))
    assert topic_state(opened, artifact, Settings(model="m"), nothing, tmp_path) == NO_TOPICS
    assert "fit again with hrs topics" in caplog.text


def test_topics_of_another_fit_are_set_aside_and_their_ids_are_not_given_again(tmp_path: Path) -> None:
    old = SharedTopics(tmp_path, 4)
    first = old.change(lambda topics: topics.assign(np.eye(4)[0], [1], "tide")).topic_id
    before = (tmp_path / "topics.json").read_bytes()
    new = SharedTopics(tmp_path, 4, thresholds=Thresholds(join=0.1, merge=0.6))
    assert new.read() == []
    assert (tmp_path / "topics.json").read_bytes() == before, "reading changes nothing"
    second = new.change(lambda topics: topics.assign(np.eye(4)[0], [1], "tide")).topic_id
    assert second != first and [info.id for info in new.read()] == [second]
    assert (tmp_path / "topics.old.json").read_bytes() == before
    third = new.change(lambda topics: topics.assign(np.eye(4)[1], [1], "oven")).topic_id
    assert [info.id for info in SharedTopics(tmp_path, 4).read()] == [third, second]


def test_a_first_change_that_raises_leaves_nothing(tmp_path: Path) -> None:
    topics = SharedTopics(tmp_path, 4)

    def half_done(contexts: TopicContexts) -> None:
        contexts.assign(np.eye(4)[0], [1], "tide")
        raise RuntimeError("half done")

    with pytest.raises(RuntimeError, match="half done"):
        topics.change(half_done)
    assert topics.read() == []
