"""Checkpoints that survive SIGKILL at any moment, and are refused when they are not whole.

    <run>/checkpoints/step_00000050/weights.safetensors     the model's state_dict
                                    trainer.safetensors     optimiser state by parameter name, RNG states
                                    averages.safetensors    averages of the weights, by decay and parameter name
                                    kept.safetensors        the averaged state_dict that the run is evaluated with
                                    state.json              format, config, counters, SHA-256 of everything

Written to a hidden folder, synced to disk, then renamed: a folder ``step_*`` is complete or was damaged later, which
the checksums tell. No pickle, so a checkpoint can be shared without trust. A run without averages, or one in which
they have not begun, has no file of them.

``<run>/tokenizer.json`` is the tokenizer that the run learns with; every checkpoint holds its SHA-256 beside the
fingerprint of the tokens, so that a model is never read with other ids than its own.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from hrs import strict_json
from hrs.config import ExperimentConfig, from_dict, to_dict
from hrs.data.tokenization import load_tokenizer
from hrs.errors import HRSError
from hrs.files import sha256_of, sync, write_whole
from hrs.models import LanguageModel, build_model
from hrs.training.averaging import Averages
from hrs.training.randomness import set_rng

FORMAT = 1
KEEP = 2
WEIGHTS, TRAINER, STATE = "weights.safetensors", "trainer.safetensors", "state.json"
AVERAGES, KEPT = "averages.safetensors", "kept.safetensors"
TOKENIZER = "tokenizer.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint read back and verified; tensors on the CPU."""

    path: Path
    weights: dict[str, Tensor]
    trainer: dict[str, Tensor]
    """``moments/<kind>/<parameter>``, every tensor of the optimiser's state, and ``rng/<device type>``."""
    state: dict[str, Any]
    """``step``, ``config``, ``data`` and the counters the loop keeps."""
    averages: dict[str, Tensor] = field(default_factory=dict)
    """As :meth:`hrs.training.averaging.Averages.tensors` gives them."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """The state_dict that the run is evaluated with, if it is an averaged one."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainedModel:
    """A trained model with what it was trained on."""

    model: LanguageModel
    """On the CPU, in eval mode."""
    config: ExperimentConfig
    data_fingerprint: str
    """Of the tokens that it learned from; empty if the checkpoint does not say."""
    tokenizer: Tokenizer | None
    """The run's own; None if it kept none, as earlier versions did."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_checkpoint(directory: Path, state: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write ``directory/checkpoints/step_%08d`` for ``state["step"]`` and delete all but the last two.

    Args:
        files: contiguous tensors on the CPU by name, by file name. They must not change before this returns.

    Raises:
        HRSError: if the disk refuses; checkpoints written before stay as they are.
    """
    parent = directory / "checkpoints"
    final = parent / f"step_{state['step']:08d}"
    partial = parent / f".{final.name}.partial"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(".step_*"):  # of a process that was killed while writing
            shutil.rmtree(leftover)
        partial.mkdir()
        for name, content in files.items():
            save_file(dict(content), partial / name)
        sums = {name: sha256_of(partial / name) for name in files}
        sums["state"] = _sha256_json(state)
        document = {"format": FORMAT, "state": dict(state), "sha256": sums}
        (partial / STATE).write_text(strict_json.dumps(document, indent=1), encoding="utf-8")
        for path in (*(partial / name for name in files), partial / STATE, partial):
            sync(path)
        if final.exists():  # a damaged one that was passed over; rename cannot replace a folder that is not empty
            os.replace(final, parent / f".{final.name}.damaged")
        os.replace(partial, final)
        sync(parent)
        for old in [*_steps(directory)[:-KEEP], *parent.glob(".step_*")]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise HRSError(f"checkpoint {final} could not be written ({error}): make room, then run again") from error
    return final


# ---- reading ---------------------------------------------------------------------------------------------------------


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint of a run directory, unverified; None if there is none."""
    return _steps(Path(directory))[-1] if _steps(Path(directory)) else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint directory.

    Raises:
        HRSError: if it is missing, incomplete, damaged, or of a newer format.
    """
    state, names = _verified(path)
    tensors = {name: load_file(path / name) for name in names}
    return Checkpoint(path, tensors[WEIGHTS], tensors[TRAINER], state, tensors.get(AVERAGES, {}), tensors.get(KEPT, {}))


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Verify one checkpoint directory without reading its tensors into memory; its state.

    Raises:
        HRSError: see :func:`read_checkpoint`.
    """
    return _verified(path)[0]


def _verified(path: Path) -> tuple[dict[str, Any], list[str]]:
    """State and names of the files of a checkpoint, all of which are what was written."""
    try:
        document = json.loads((path / STATE).read_text(encoding="utf-8"))
        written, state, sums = document["format"], document["state"], document["sha256"]
    except OSError as error:
        raise HRSError(f"{path} is not a checkpoint: {STATE} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise HRSError(f"checkpoint {path} is damaged: {STATE} is not what was written") from error
    if written != FORMAT:
        raise HRSError(f"checkpoint {path} has format {written} and this version of hrs reads {FORMAT}: update hrs")
    if sums.get("state") != _sha256_json(state):
        raise HRSError(f"checkpoint {path} is damaged: {STATE} is not what was written")
    names = [WEIGHTS, TRAINER, *(name for name in (AVERAGES, KEPT) if name in sums)]
    for name in names:
        if not (path / name).is_file() or sha256_of(path / name) != sums.get(name):
            raise HRSError(f"checkpoint {path} is damaged: {name} is missing or not what was written")
    return state, names


def read_latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read; a damaged one is passed over with a warning. None if there is none.

    Raises:
        HRSError: if there are checkpoints and none can be read: starting over silently would lose work unseen.
    """
    steps = _steps(directory)
    for path in reversed(steps):
        try:
            return read_checkpoint(path)
        except HRSError as error:
            _log.warning("%s; trying the one before", error)
    if steps:
        raise HRSError(f"no checkpoint in {directory / 'checkpoints'} can be read: delete that folder to start over")
    return None


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    averages: Averages | None = None,
) -> None:
    """Put weights, moments, averages and random states back, exactly."""
    _load_weights(checkpoint, checkpoint.weights, model)
    parameters = dict(model.named_parameters())
    for key, value in checkpoint.trainer.items():
        if key.startswith("moments/"):
            _, kind, name = key.split("/", 2)
            optimizer.state[parameters[name]][kind] = value.to(parameters[name].device)
    if averages is not None:
        averages.restore(checkpoint.averages, checkpoint.kept, checkpoint.state.get("kept"))
    set_rng({k.removeprefix("rng/"): v for k, v in checkpoint.trainer.items() if k.startswith("rng/")}, device)


Weights = Literal["auto", "last", "averaged"]


def load_model(checkpoint: Path, weights: Weights = "auto") -> tuple[LanguageModel, ExperimentConfig]:
    """The model and the config of :func:`load_trained`."""
    trained = load_trained(checkpoint, weights)
    return trained.model, trained.config


def load_trained(checkpoint: Path, weights: Weights = "auto") -> TrainedModel:
    """The model of a run directory (its last checkpoint) or of one checkpoint directory: on the CPU, in eval mode.

    Args:
        weights: ``last`` are those that learn; ``averaged`` those that ``training.averaging.keep`` names, of a
            run that is not finished the best so far; ``auto`` are the averaged ones if there are any, else the last:
            what the run is to be evaluated with.

    Raises:
        HRSError: if there is no checkpoint, it is damaged or does not belong to this version of the model, averaged
            weights are asked for and it holds none, or the run's tokenizer is not the one that it learned with.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        raise HRSError(f"{path} does not exist: give a run directory or one of its checkpoints")
    if not (path / STATE).exists():
        latest = latest_checkpoint(path)
        if latest is None:
            raise HRSError(f"{path} holds no checkpoint: train the run first, or give another directory")
        path = latest
    read = read_checkpoint(path)
    try:
        config: ExperimentConfig = from_dict(ExperimentConfig, read.state["config"])
    except (HRSError, LookupError, TypeError, ValueError) as error:
        raise HRSError(f"checkpoint {path} is of another version of hrs, which trained it ({error})") from error
    if weights == "averaged" and not read.kept:
        raise HRSError(f"checkpoint {path} holds no averaged weights: ask for the last ones")
    with torch.random.fork_rng(devices=[]):  # initialisation must not move the caller's generator
        model = build_model(config.model)
    _load_weights(read, read.weights if weights == "last" else read.kept or read.weights, model)
    tokenizer = _own_tokenizer(path.absolute().parent.parent, read.state.get("tokenizer"))
    return TrainedModel(model.eval(), config, read.state.get("data", ""), tokenizer)


def _own_tokenizer(directory: Path, digest: str | None) -> Tokenizer | None:
    """The tokenizer of a run's directory; None if it has none, as in a checkpoint that was copied alone."""
    path = directory / TOKENIZER
    if digest is None or not path.is_file():
        return None
    try:
        if sha256_of(path) != digest:
            raise ValueError("its checksum differs")
        return load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise HRSError(
            f"{path} is not the tokenizer that this run learned with ({error}): restore it, or delete it to take the "
            "one of the run's tokens"
        ) from error


def keep_tokenizer(directory: Path, tokenizer: Tokenizer, digest: str | None) -> str:
    """Write ``tokenizer.json`` of a run unless the file of this digest is there; its SHA-256.

    Args:
        digest: what the run's last checkpoint says; None if there is none.

    Raises:
        HRSError: if the disk refuses.
    """
    path = directory / TOKENIZER
    if digest is None or not path.is_file() or sha256_of(path) != digest:
        write_whole(path, tokenizer.to_str())
    return sha256_of(path)


def _load_weights(checkpoint: Checkpoint, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise HRSError(
            f"checkpoint {checkpoint.path} has other parameters than this version's model: "
            "use the version of hrs that trained it, or train again"
        ) from error


def _steps(directory: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    return sorted((directory / "checkpoints").glob("step_" + "[0-9]" * 8))


def _sha256_json(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(strict_json.dumps(value, sort_keys=True).encode()).hexdigest()


def config_as_json(config: ExperimentConfig) -> dict[str, Any]:
    """The config as it comes back from JSON: tuples are lists, so that it compares equal after reading."""
    return json.loads(strict_json.dumps(to_dict(config)))
