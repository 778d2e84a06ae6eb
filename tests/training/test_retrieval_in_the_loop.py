"""Training with retrieval in its loop: it starts from the base, reads what the config says, and resumes to the bit."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from training_checks import curve, different, weights

from hrs.config import ExperimentConfig
from hrs.data import TokenStore, TrainingWindows
from hrs.data.windows import evaluation_windows, strangers
from hrs.errors import HRSError
from hrs.evaluation import evaluate
from hrs.models import WindowContext, build_model
from hrs.presets import experiment
from hrs.training import Runtime, load_model, train

S, D, T = 4, 16, 16
FINGERPRINT = "0123456789abcdef"


class Drawn:
    """Memories that only the start of the window they are read for decides, absent for one window in five."""

    fingerprint = FINGERPRINT

    def __init__(self, base_weights: Mapping[str, Tensor]) -> None:
        self.base_weights = base_weights
        self.asked: list[tuple[str, list[int], list[int] | None]] = []

    def read(
        self, split: str, starts: NDArray[np.int64], seekers: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        self.asked.append((split, starts.tolist(), None if seekers is None else seekers.tolist()))
        rows = [np.random.default_rng([int(s), split == "train"]) for s in (starts if seekers is None else seekers)]
        return np.stack([r.standard_normal((S, D)).astype(np.float32) * (r.random() > 0.2) for r in rows])


@pytest.fixture
def retrieved(small_experiment: Callable[..., ExperimentConfig]) -> Callable[..., ExperimentConfig]:
    """``retrieved("shuffled", {...})``: an experiment that reads memories."""

    def compose(shown: str = "right", changes: dict[str, Any] | None = None) -> ExperimentConfig:
        named = {"training.retrieval.base": "0" * 16, "training.retrieval.fingerprint": FINGERPRINT}
        named |= {"training.retrieval.memory": shown, "model.engram.slots": S, "model.engram.dropout": 0.0}
        return small_experiment("dense_retrieved", named | (changes or {}))

    return compose


@pytest.fixture
def memories(small_experiment: Callable[..., ExperimentConfig]) -> Drawn:
    """Of a base with random weights."""
    torch.manual_seed(5)
    return Drawn(build_model(small_experiment().model).state_dict())


def trained(config: ExperimentConfig, store: TokenStore, directory: Path, memories: Drawn, **runtime: Any) -> list:
    return list(
        train(config, store, directory, Runtime(**({"device": "cpu", "log_every": 1} | runtime)), memories=memories)
    )


# ---- the start -------------------------------------------------------------------------------------------------------


def test_a_run_starts_from_the_base(retrieved, memories: Drawn, small_store: TokenStore, tmp_path: Path) -> None:
    """With a learning rate of zero its weights stay the base's, and it scores as the base does."""
    config = retrieved(changes={"training.schedule.peak_lr": 0.0, "training.steps": 1})
    trained(config, small_store, tmp_path, memories)
    model, _ = load_model(tmp_path)
    ours = {name: value for name, value in model.state_dict().items() if ".cross." not in name}
    assert different(ours, memories.base_weights) == []
    base = build_model(experiment("dense_baseline").model.__class__(**_plain(config))).eval()
    base.load_state_dict(memories.base_weights)
    scored = [evaluate(m, small_store).bits_per_byte for m in (model, base)]
    assert scored[0] == scored[1]


def _plain(config: ExperimentConfig) -> dict[str, Any]:
    model = config.model
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name != "engram"}


def test_a_base_of_another_shape_is_refused(
    retrieved, memories: Drawn, small_store: TokenStore, tmp_path: Path
) -> None:
    for changes in ({"model.n_layers": 3}, {"model.d_ff": 48}, {"model.locality.enabled": True}):
        with pytest.raises(HRSError, match="the base does not fit this model at"):
            trained(retrieved(changes=changes), small_store, tmp_path, memories)


def test_memories_and_config_must_belong_together(
    retrieved, small_experiment, memories: Drawn, small_store: TokenStore, tmp_path: Path
) -> None:
    runtime = Runtime(device="cpu")
    with pytest.raises(HRSError, match="needs the memories of that run and none were given"):
        list(train(retrieved(), small_store, tmp_path, runtime))
    with pytest.raises(HRSError, match="do not fit: a model that reads"):
        list(train(small_experiment("dense_retrieved"), small_store, tmp_path, runtime))
    based = {"training.retrieval.base": "x", "training.retrieval.fingerprint": FINGERPRINT}
    with pytest.raises(HRSError, match="no other model does"):
        list(train(small_experiment("dense_baseline", based), small_store, tmp_path, runtime, memories=memories))
    other = {"training.retrieval.fingerprint": "f" * 16}
    with pytest.raises(HRSError, match="those of a base with 0123456789abcdef"):
        trained(retrieved(changes=other), small_store, tmp_path, memories)
    with pytest.raises(HRSError, match="batch_sequences of 2 or more"):
        trained(retrieved("shuffled", {"training.batch_sequences": 1}), small_store, tmp_path, memories)
    assert not list(tmp_path.iterdir())


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", ["right", "shuffled", "none"])
def test_every_window_of_a_batch_is_shown_what_the_config_says(
    shown: str, retrieved, memories: Drawn, small_store: TokenStore, tmp_path: Path
) -> None:
    config = retrieved(shown, {"training.steps": 3, "training.validations": 1})
    trained(config, small_store, tmp_path, memories)
    windows = TrainingWindows(small_store.train.tokens, T, config.training.batch_sequences, config.seed)
    training = [(starts, seekers) for split, starts, seekers in memories.asked if split == "train"]
    validation = [(starts, seekers) for split, starts, seekers in memories.asked if split == "validation"]
    if shown == "none":
        assert memories.asked == []
        return
    assert [starts for starts, _ in training] == [windows.starts(step).tolist() for step in range(3)]
    assert validation
    for starts, seekers in training + validation:
        assert (seekers is None) == (shown == "right")
        assert seekers is None or all(a != b for a, b in zip(starts, seekers, strict=True))
    assert all(seekers is None or sorted(starts) == sorted(seekers) for starts, seekers in training)


def test_only_what_is_read_decides_what_is_learned(
    retrieved, memories: Drawn, small_store: TokenStore, tmp_path: Path
) -> None:
    """Without memories the cross-attention rests; with others, all learn something else."""
    for shown in ("right", "shuffled", "none"):
        trained(retrieved(shown), small_store, tmp_path / shown, memories)
    learned = {shown: weights(tmp_path / shown) for shown in ("right", "shuffled", "none")}
    crossed = [name for name in learned["none"] if name.endswith("cross.output.weight")]
    assert crossed and all(not learned["none"][name].any() for name in crossed)
    assert all(learned[shown][name].any() for shown in ("right", "shuffled") for name in crossed)
    assert set(crossed) <= set(different(learned["right"], learned["shuffled"]))
    assert "embedding.weight" in different(learned["right"], learned["none"])


def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    retrieved, memories: Drawn, small_store: TokenStore, tmp_path: Path
) -> None:
    config = retrieved(changes={"training.steps": 8, "model.engram.dropout": 0.4, "model.dropout": 0.1})
    options = {"checkpoint_every": 3, "micro_batch": 2}
    whole = trained(config, small_store, tmp_path / "whole", memories, **options)
    reports = []
    runtime = Runtime(device="cpu", log_every=1, **options)
    for progress in train(config, small_store, tmp_path / "cut", runtime, memories=memories):
        reports.append(progress)
        if progress.step == 5:
            break
    torch.manual_seed(99)
    reports += trained(config, small_store, tmp_path / "cut", memories, **options)
    assert different(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == []
    assert curve(reports) == curve(whole)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_shows_each_window_the_right_memory_another_or_none(
    retrieved, memories: Drawn, small_store: TokenStore, tmp_path: Path
) -> None:
    """Reference: one window at a time."""
    trained(retrieved(), small_store, tmp_path, memories)
    model = load_model(tmp_path)[0].double()
    text = small_store.validation
    tokens = torch.from_numpy(text.tokens.astype(np.int64))
    windows = list(evaluation_windows(len(text), T, T // 2))
    starts = np.array([start for start, _ in windows])
    seekers = strangers(starts)
    scored = {}
    for shown in ("right", "shuffled", "none"):
        nats = 0.0
        for i, (start, first) in enumerate(windows):
            slots = memories.read("validation", starts[i : i + 1], seekers[i : i + 1] if shown == "shuffled" else None)
            context = None if shown == "none" else WindowContext(memory=torch.from_numpy(slots))
            with torch.no_grad():
                logits = model(tokens[None, start : start + T], context).logits[0]
            losses = F.cross_entropy(logits, tokens[start + 1 : start + T + 1], reduction="none")
            nats += float(losses[first - start - 1 :].sum())
        found = evaluate(model, small_store, memories=memories, shown=shown, batch_windows=7)
        assert found.nats_per_token == pytest.approx(nats / (len(text) - 1), rel=1e-9)
        scored[shown] = found
    assert len({e.nats_per_token for e in scored.values()}) == 3
    assert evaluate(model, small_store, batch_windows=7).nats_per_token == scored["none"].nats_per_token
    assert scored["right"].documents["title"].equals(scored["shuffled"].documents["title"])


def test_a_model_that_reads_no_memories_is_not_given_any(small_experiment, memories: Drawn, small_store) -> None:
    with pytest.raises(HRSError, match="this model reads no memories"):
        evaluate(build_model(small_experiment().model), small_store, memories=memories)


@pytest.mark.parametrize("n", [2, 3, 50])
def test_a_stranger_is_never_oneself_and_serves_once(n: int) -> None:
    starts = 7 * np.arange(n)
    other = strangers(starts)
    assert (other != starts).all() and sorted(other) == starts.tolist()
    assert np.array_equal(other, strangers(starts))
