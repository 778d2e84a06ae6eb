import json
import os
from pathlib import Path

import pytest
import torch
from training_checks import different, weights

from hrs.errors import HRSError
from hrs.models import build_model
from hrs.training import latest_checkpoint, load_model
from hrs.training.checkpoint import read_checkpoint


@pytest.fixture
def finished(small_experiment, run, tmp_path: Path) -> Path:
    run(small_experiment("full_hrs", {"training.steps": 7}), tmp_path / "run", checkpoint_every=2)
    return tmp_path / "run"


def test_the_last_two_checkpoints_are_kept_and_nothing_else(finished: Path) -> None:
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step_00000006", "step_00000007"]
    assert latest_checkpoint(finished) == finished / "checkpoints" / "step_00000007"
    assert latest_checkpoint(finished / "nothing") is None


def test_load_model_takes_a_run_or_one_checkpoint(finished: Path, small_experiment) -> None:
    model, config = load_model(finished)
    assert config == small_experiment("full_hrs", {"training.steps": 7})
    assert not model.training
    assert different(model.state_dict(), load_model(finished / "checkpoints" / "step_00000007")[0].state_dict()) == []
    assert different(model.state_dict(), weights(finished / "checkpoints" / "step_00000006"))


def test_loading_does_not_move_the_callers_generator(finished: Path) -> None:
    state = torch.get_rng_state()
    load_model(finished)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_file_is_a_pickle(finished: Path) -> None:
    files = [path for path in (finished / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert not [path for path in files if path.read_bytes().startswith((b"\x80", b"PK"))]  # pickle, torch.save


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _forge_step(path: Path) -> None:
    document = json.loads(path.read_text())
    document["state"]["step"] += 1
    path.write_text(json.dumps(document))


def _newer(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("weights.safetensors", _truncate, "damaged: weights.safetensors"),
        ("weights.safetensors", _flip_a_bit, "damaged: weights.safetensors"),
        ("trainer.safetensors", _flip_a_bit, "damaged: trainer.safetensors"),
        ("trainer.safetensors", Path.unlink, "damaged: trainer.safetensors"),
        ("state.json", _truncate, "damaged: state.json"),
        ("state.json", _forge_step, "damaged: state.json"),
        ("state.json", _newer, "format 2 and this version of hrs reads 1: update hrs"),
        ("state.json", Path.unlink, "is not a checkpoint"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_in_one_sentence(file, damage, message, finished: Path) -> None:
    path = finished / "checkpoints" / "step_00000007"
    damage(path / file)
    with pytest.raises(HRSError, match=message) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "message"), [("missing", "does not exist"), ("empty", "holds no checkpoint")])
def test_load_model_says_what_is_missing(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(HRSError, match=message):
        load_model(tmp_path / name)


def test_weights_of_another_model_are_refused(finished: Path, monkeypatch, small_experiment) -> None:
    smaller = build_model(small_experiment("dense_baseline").model)
    monkeypatch.setattr("hrs.training.checkpoint.build_model", lambda config: smaller)
    with pytest.raises(HRSError, match="other parameters"):
        load_model(finished)


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(
    small_experiment, run, tmp_path: Path, monkeypatch
) -> None:
    real, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 5:  # the second checkpoint
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HRSError, match=r"could not be written .*No space left on device"):
        run(small_experiment("dense_baseline", {"training.steps": 6}), tmp_path, checkpoint_every=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    read_checkpoint(tmp_path / "checkpoints" / "step_00000002")
