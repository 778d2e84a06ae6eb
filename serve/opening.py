"""From settings to a backend: the model, the folder of its memories, and the gate that fits it."""

import contextlib
import dataclasses
import logging
import os
import sys
from pathlib import Path

import numpy as np
import torch

from hrs.data import TokenSplit
from hrs.errors import HRSError
from hrs.export.opening import OpenedModel, open_model, stored_text
from hrs.files import absolute_path
from hrs.retrieval.bank.slots import slot_maker
from hrs.retrieval.calibration import Calibration, calibrate
from hrs.retrieval.engrams import model_fingerprint
from hrs.retrieval.retriever import SlotMaker
from hrs.storage import Storage, open_storage
from serve.local import LocalBackend
from serve.placement import replica_device
from serve.settings import Settings
from serve.topic_state import topic_state

CALIBRATION_TOKENS = 50_000
"""Validation tokens the gate is calibrated on, at most."""

_log = logging.getLogger("serve")


def resolve(model: str, storage: Storage) -> Path:
    """Where a model lies, given its path or another of its names (:mod:`hrs.tracking.naming`).

    Raises:
        HRSError: if there is no such model.
    """
    if (path := absolute_path(model)).exists():
        return path
    from hrs.tracking.naming import find_model

    return find_model(storage, model)


def open_backend(settings: Settings, *, replica: str = "0") -> LocalBackend:
    """Load the model onto the GPU that this replica reserved, or the CPU, and open its memories.

    Raises:
        HRSError: if the model, its data or the storage cannot be used.
    """
    storage = open_storage(settings.storage)
    torch.set_num_threads(settings.threads)
    device = replica_device(settings)
    path = resolve(settings.model, storage)
    opened = open_model(path, storage.tokens)
    opened.model.to(device)
    folder = memory_folder(storage, opened)
    make_private(folder)
    calibration = gate_of(opened, storage, folder)
    slots = slots_of(opened, storage)
    topics = topic_state(opened, path, settings, storage, folder)
    return LocalBackend(opened, settings, folder, calibration=calibration, slots=slots, topics=topics, replica=replica)


def memory_folder(storage: Storage, opened: OpenedModel) -> Path:
    """Return the folder of what an endpoint of the model remembers, counts and has measured."""
    return storage.root / "engrams" / f"{model_fingerprint(opened.model)}-served"


def make_private(folder: Path) -> None:
    """Keep what users say from other users of the machine: of this folder, and of what this process writes from now."""
    os.umask(0o077)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # it belongs to another user, who decides about it
        folder.chmod(0o700)


def slots_of(opened: OpenedModel, storage: Storage) -> SlotMaker | None:
    """What turns memories into slots as in the model's training, or, where its base is not at hand, by the model
    itself; None if it reads none.

    Raises:
        HRSError: if the slots of the model's config do not divide.
    """
    model, config, tokenizer = opened.model, opened.config, opened.tokenizer
    try:
        return slot_maker(model, config, tokenizer, storage.run(config.training.retrieval.base))
    except HRSError as error:
        _log.warning("memories are not read by the model's base but by the model itself: %s", error)
        return slot_maker(model, config, tokenizer, None)


def gate_of(opened: OpenedModel, storage: Storage, folder: Path) -> Calibration | None:
    """The model's calibrated gate, measured now if its validation text is at hand; None if it is not."""
    path = folder / "gate.json"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return Calibration.load(path, model_fingerprint(opened.model), opened.data_fingerprint)
    except HRSError:
        pass  # there is none yet
    try:
        text = _validation(opened, storage)
        if text is None:
            return None
        calibration = dataclasses.replace(calibrate(opened.model, text), data=opened.data_fingerprint)
    except HRSError as error:
        _log.warning("the entropy gate is not calibrated: %s", error)
        return None
    calibration.save(path)
    return calibration


def _validation(opened: OpenedModel, storage: Storage) -> TokenSplit | None:
    """The front of the model's validation split; None if its tokens are not in the storage. Nothing is built."""
    if (store := stored_text(opened, storage.tokens)) is None:
        return None
    text = store.validation
    n = max(int(np.searchsorted(text.document_starts, CALIBRATION_TOKENS, side="right")) - 1, 1)
    starts = text.document_starts[: n + 1]
    return dataclasses.replace(
        text,
        tokens=text.tokens[: starts[-1]],
        document_starts=starts,
        topic_ids=text.topic_ids[:n],
        n_bytes=text.n_bytes[:n],
        n_words=text.n_words[:n],
        documents=text.documents.slice(0, n),
    )


def warning_of(causal: bool | None) -> str | None:
    """What must be said of a model that is not known to be causal."""
    if causal is False:
        return "THIS MODEL IS NOT CAUSAL: it was trained to see the tokens it predicts, which are not there to continue"
    if causal is None:
        return "this model was never audited for causality (hrs audit does it)"
    return None


def print_warning(causal: bool | None) -> None:
    if (sentence := warning_of(causal)) is not None:
        print(f"warning: {sentence}", file=sys.stderr, flush=True)
