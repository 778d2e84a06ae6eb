"""The Ray Serve application and what it is made of, without Ray: settings, keys, the gate, the example file."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml

from hrs.config import override
from hrs.errors import HRSError
from hrs.export.opening import OpenedModel
from hrs.retrieval.calibration import Calibration
from hrs.storage import Storage
from serve.opening import gate_of, resolve, warning_of
from serve.settings import Settings, parse_settings, read_api_keys
from serve.shared_topics import SharedTopics

EXAMPLE = Path(__file__).parents[2] / "serve" / "config.yaml"


def test_wrong_settings_are_all_named() -> None:
    with pytest.raises(HRSError, match=r"slots: .*greater.*; frobnicate: Extra") as wrong:
        parse_settings({"model": "m", "slots": 0, "frobnicate": 1})
    assert "\n" not in str(wrong.value)
    with pytest.raises(HRSError, match="max_replicas 1 is below min_replicas 2"):
        parse_settings({"model": "m", "min_replicas": 2})


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HRS_API_KEY", raising=False)
    assert read_api_keys(Settings(model="m")) == []
    monkeypatch.setenv("HRS_API_KEY", " a key \n")
    assert read_api_keys(Settings(model="m")) == ["a key"]
    (tmp_path / "keys").write_text(" one \n\ntwo\n")
    assert read_api_keys(Settings(model="m", api_key_file=str(tmp_path / "keys"))) == ["one", "two"]
    (tmp_path / "keys").write_text("\n")
    for name, part in (("keys", "holds no key"), ("none", "cannot be read")):  # never open to all by accident
        with pytest.raises(HRSError, match=part):
            read_api_keys(Settings(model="m", api_key_file=str(tmp_path / name)))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HRSError, match="there is no model at"):
        resolve(str(tmp_path / "x"), Storage(tmp_path))
    assert resolve(str(tmp_path), Storage(tmp_path)) == tmp_path


def test_models_that_are_not_known_to_be_causal_are_warned_of() -> None:
    assert warning_of(True) is None
    assert "NOT CAUSAL" in str(warning_of(False))
    assert "never audited" in str(warning_of(None))


def test_the_gate_is_measured_where_the_text_is_at_hand_and_kept(
    opened: OpenedModel, small_store, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Storage(tmp_path)
    assert gate_of(opened, here, tmp_path / "a") is None  # nothing is tokenised to serve a model
    from hrs.data import open_tokens

    open_tokens(opened.config.data, here.tokens)
    gate = gate_of(opened, here, tmp_path / "a")
    assert gate is not None
    assert 0 < gate.threshold_bits < 8.3
    assert gate.n_tokens <= len(small_store.validation)
    monkeypatch.setattr("serve.opening.calibrate", None)
    assert gate_of(opened, here, tmp_path / "a") == gate
    assert isinstance(Calibration.from_json((tmp_path / "a" / "gate.json").read_text()), Calibration)


def test_a_corpus_that_is_gone_leaves_the_gate_uncalibrated(opened: OpenedModel, tmp_path: Path) -> None:
    config = override(opened.config, {"data.corpus": f"jsonl:{tmp_path / 'gone.jsonl'}"})
    assert gate_of(dataclasses.replace(opened, config=config), Storage(tmp_path), tmp_path / "b") is None


def test_topics_that_are_shared_do_not_grow_for_ever(tmp_path: Path) -> None:
    topics = SharedTopics(tmp_path, 64, max_topics=7)
    for number in range(40):
        topics.change(lambda t, n=number: t.assign(np.eye(64)[n], [n] * 200, "a tide"))
        if number == 3:
            topics.change(lambda t: t.rename("topic-1", "mine"))
    kept = SharedTopics(tmp_path, 64, max_topics=7).read()
    assert [info.id for info in kept] == [f"topic-{number}" for number in range(40, 33, -1)] + ["topic-1"]
    assert kept[-1].name == "mine"
    size = (tmp_path / "topics.json").stat().st_size
    for number in range(40, 60):
        topics.change(lambda t, n=number: t.assign(np.eye(64)[n], [n] * 200, "a tide"))
    assert (tmp_path / "topics.json").stat().st_size == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("Retry.\nTraceback:\n  File x\nhrs.errors.HRSError: there is no model at /m\n\n", "there is no model at /m"),
        ("RuntimeError: first\nduring which\nray.exceptions.RayTaskError: RuntimeError\nOSError: [Errno 28] full",
         "OSError: [Errno 28] full"),
        ("Deploying application hrs failed", "Deploying application hrs failed"),
        ("", ""),
    ],
)  # fmt: skip
def test_a_replicas_own_sentence_is_found_in_what_serve_says(message: str, sentence: str) -> None:
    from serve.replicas import own_sentence

    assert own_sentence(message) == sentence


def test_a_process_of_ray_that_has_ended_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import worker

    from serve.replicas import require_ray

    class Node:
        def dead_processes(self) -> list[tuple[str, None]]:
            return [("raylet", None)]

    monkeypatch.setattr(worker, "_global_node", None)
    require_ray()
    monkeypatch.setattr(worker, "_global_node", Node())
    with pytest.raises(HRSError, match="raylet of Ray ended unexpectedly"):
        require_ray()


def test_the_example_is_what_serve_and_we_accept() -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as as_deployed
    from ray.serve.schema import ServeDeploySchema

    from serve.app import build

    values = yaml.safe_load(EXAMPLE.read_text())
    (application,) = ServeDeploySchema.model_validate(values).applications
    assert application.import_path == "serve.app:build"
    built = as_deployed(build, application.args)
    deployment = built._bound_deployment
    assert deployment.max_ongoing_requests > 8 + 64  # the replica refuses, not Serve
    config = deployment._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (1, 4, 8)
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        as_deployed(build, {"model": "m", "slot": 1})
