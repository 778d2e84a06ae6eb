"""What training and validation tell a model of its windows besides their tokens, and when it may remember them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distinct_models import DISTINCT
from torch import Tensor
from training_checks import curve, different, largest_gap, weights

from hrs.config import CategoryConfig, ModelConfig
from hrs.data import TrainingWindows
from hrs.data.categories import token_labels
from hrs.data.windows import evaluation_windows, history, window_categories
from hrs.evaluation.leaks import CausalMean, SkeletonLM
from hrs.models import ModelOutput, WindowContext, build_model
from hrs.models.geometry import TokenGeometry
from hrs.presets import experiment
from hrs.training import Runtime, load_model, train
from hrs.training.optimizer import build_optimizer
from hrs.training.step import Stepper

T, BATCH = 16, 4


class Listener(SkeletonLM):
    """Notes what it is told in training mode, and when it may remember it."""

    history_tokens = 5
    n_categories = 4

    def __init__(self, vocab_size: int = 300) -> None:
        super().__init__(lambda width: CausalMean(), vocab_size=vocab_size, max_seq_len=T)
        self.told: list[tuple[Tensor, WindowContext | None]] = []
        self.events: list[str] = []
        self.out_of_memory_at: set[int] = set()

    def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
        if self.training:
            self.told.append((tokens, context))
            self.events.append(f"pass {len(tokens)}")
            if len(self.told) in self.out_of_memory_at:
                raise torch.OutOfMemoryError("Tried to allocate too much.")
        output = super().encode(tokens, context)
        output.metrics = {
            "expert_usage": torch.ones(2, 50),
            "temperature": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            "heads": torch.arange(8.0).view(2, 2, 2),
            "distance": torch.tensor(7.0),
        }
        return output

    def keep_observations(self) -> None:
        self.events.append("keep")

    def drop_observations(self) -> None:
        self.events.append("drop")


@pytest.fixture
def stepper_of(small_experiment):
    def build(model: SkeletonLM, micro_batch: int) -> Stepper:
        training = small_experiment().training
        optimizer = build_optimizer(model, training.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        return Stepper(model, optimizer, training, torch.device("cpu"), micro_batch)

    return build


def windows_and_context() -> tuple[Tensor, WindowContext]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(300, (BATCH, T + 1), generator=generator)
    return tokens, WindowContext(torch.randint(300, (BATCH, 5), generator=generator), torch.arange(BATCH))


# ---- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_every_micro_batch_gets_the_context_of_its_own_windows(micro_batch: int, stepper_of) -> None:
    model, (tokens, context) = Listener(), windows_and_context()
    stepper_of(model, micro_batch).step(tokens, context)
    assert len(model.told) == BATCH // micro_batch
    assert torch.equal(torch.cat([t for t, _ in model.told]), tokens[:, :-1])
    assert torch.equal(torch.cat([c.history for _, c in model.told]), context.history)
    assert torch.equal(torch.cat([c.category for _, c in model.told]), context.category)


def test_observations_are_kept_once_after_each_update(stepper_of) -> None:
    model, (tokens, context) = Listener(), windows_and_context()
    stepper = stepper_of(model, 2)
    stepper.step(tokens, context)
    stepper.step(tokens, context)
    assert model.events == ["pass 2", "pass 2", "keep"] * 2


def test_observations_of_a_skipped_step_are_dropped(stepper_of, monkeypatch) -> None:
    model, (tokens, context) = Listener(), windows_and_context()
    monkeypatch.setattr("hrs.training.step.cross_entropy", lambda *a, **k: model.norm.weight.sum() * float("nan"))
    assert stepper_of(model, 4).step(tokens, context) is None
    assert model.events == ["pass 4", "drop"]


def test_observations_are_dropped_before_every_repetition_for_lack_of_memory(stepper_of) -> None:
    model, (tokens, context) = Listener(), windows_and_context()
    model.out_of_memory_at = {1, 3}  # the whole batch, and the second half of it
    stepper = stepper_of(model, 4)
    assert stepper.step(tokens, context) is not None
    assert stepper.micro_batch == 1
    assert model.events == ["pass 4", "drop", "pass 2", "pass 2", "drop", *["pass 1"] * 4, "keep"]
    assert torch.equal(torch.cat([c.history for _, c in model.told[-4:]]), context.history)


def test_metrics_of_any_shape_are_means_over_layers_and_usage_of_experts_is_none(stepper_of) -> None:
    model, (tokens, context) = Listener(), windows_and_context()
    diagnostics = stepper_of(model, 2).step(tokens, context)
    assert "expert_usage" not in diagnostics
    found = {name: [v.tolist() for v in values] for name, values in diagnostics.items()}
    assert found["temperature"] == [[2.0, 3.0]] * 2
    assert found["heads"] == [[2.0, 3.0, 4.0, 5.0]] * 2
    assert found["distance"] == [[7.0]] * 2


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener(monkeypatch) -> list[Listener]:
    """Every model that a run builds is one of these."""
    built: list[Listener] = []

    def build(config, geometry=None) -> Listener:
        built.append(Listener(config.vocab_size))
        return built[-1]

    monkeypatch.setattr("hrs.training.loop.build_model", build)
    return built


def test_a_run_tells_the_model_the_history_and_topic_of_each_window(
    listener, small_experiment, small_store, run, tmp_path: Path
) -> None:
    config = small_experiment(changes={"training.steps": 6, "model.category.n_classes": 4})
    reports = run(config, tmp_path, micro_batch=2)
    text = small_store.train
    windows = TrainingWindows(text.tokens, T, BATCH, config.seed)
    labels = token_labels(small_store, "train", CategoryConfig(n_classes=4))
    (model,) = listener
    assert len(model.told) == 12
    for step in range(6):
        told = [context for _, context in model.told[2 * step : 2 * step + 2]]
        starts = windows.starts(step)
        assert np.array_equal(torch.cat([c.history for c in told]).numpy(), history(text, starts, 5))
        expected = window_categories(labels, starts, T)
        assert np.array_equal(torch.cat([c.category for c in told]).numpy(), expected)
    assert (torch.cat([c.history for _, c in model.told]) >= 0).any()
    assert reports[0].metrics["temperature_1"] == 3.0 and reports[0].metrics["heads_3"] == 5.0
    assert not [name for report in reports for name in report.metrics if name.startswith("expert_usage")]


def test_a_resumed_run_tells_the_same(listener, small_experiment, small_store, tmp_path: Path) -> None:
    config = small_experiment(changes={"training.steps": 6, "training.validations": 0, "model.category.n_classes": 4})
    runtime = Runtime(device="cpu", log_every=1, checkpoint_every=2)
    list(train(config, small_store, tmp_path / "whole", runtime))
    for progress in train(config, small_store, tmp_path / "cut", runtime):
        if progress.step == 5:
            break
    list(train(config, small_store, tmp_path / "cut", runtime))
    whole, _, rest = listener
    for (tokens, context), (again, told) in zip(whole.told[4:], rest.told, strict=True):
        assert torch.equal(tokens, again)
        assert torch.equal(context.history, told.history) and torch.equal(context.category, told.category)


def test_a_model_that_wants_nothing_is_told_nothing(
    listener, small_experiment, run, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(Listener, "history_tokens", 0)
    monkeypatch.setattr(Listener, "n_categories", 0)
    run(small_experiment(changes={"training.steps": 2}), tmp_path)
    assert [context for _, context in listener[0].told] == [None, None]


NO_CHANCE = {"model.dropout": 0.0, "model.engram.dropout": 0.0, "training.steps": 4, "training.validation_windows": 0}


def test_history_survives_the_cutting_of_the_batch(small_experiment, run, tmp_path: Path) -> None:
    config = small_experiment("dense_recurrence", NO_CHANCE)
    whole = run(config, tmp_path / "whole")
    cut = run(config, tmp_path / "cut", micro_batch=1)
    assert largest_gap(weights(tmp_path / "whole"), weights(tmp_path / "cut")) < 1e-4
    assert [p.loss for p in cut] == pytest.approx([p.loss for p in whole], abs=1e-5)


def test_validation_tells_each_window_what_stands_before_it(small_experiment, small_store, run, tmp_path: Path) -> None:
    """Reference: one window at a time with its history; without, the loss is another."""
    changes = NO_CHANCE | {"training.steps": 30, "training.validations": 1}
    report = run(small_experiment("dense_recurrence", changes), tmp_path)[-1]
    model, _ = load_model(tmp_path)
    text = small_store.validation
    tokens = torch.from_numpy(text.tokens.astype(np.int64))
    nats = {True: 0.0, False: 0.0}
    with torch.no_grad():
        for start, scored in evaluation_windows(len(text), T, T):
            before = torch.from_numpy(history(text, np.array([start]), model.history_tokens))
            for known in nats:
                context = WindowContext(before) if known else None
                logits = model(tokens[None, start : start + T], context).logits[0]
                losses = F.cross_entropy(logits, tokens[start + 1 : start + T + 1], reduction="none")
                nats[known] += float(losses[scored - start - 1 :].sum())
    assert report.metrics["validation_loss"] == pytest.approx(nats[True] / (len(text) - 1), abs=1e-5)
    assert not math.isclose(nats[True], nats[False], rel_tol=1e-5)


def drawn_geometry(config: ModelConfig) -> TokenGeometry | None:
    """What a manifold-guided network is given, here a random one."""
    if config.family != "manifold":
        return None
    model = build_model(config)
    return TokenGeometry(model.coordinates, model.neighbours)


OFTEN = ("full_hrs_recurrence", "v18_cross_attn", "v5_replace_legacy")
SELDOM = [name for name in DISTINCT if name not in OFTEN and experiment(name).model.engram.kind != "retrieved"]
"""A retrieved memory resumes in test_retrieval_in_the_loop.py, which has one to give."""


@pytest.mark.parametrize(
    ("preset", "stop_at"),
    [(preset, stop) for preset in OFTEN for stop in (4, 5)]
    + [pytest.param(preset, 5, marks=pytest.mark.slow) for preset in SELDOM],
)
def test_every_model_resumes_to_the_same_bits(
    preset: str, stop_at: int, small_experiment, small_store, tmp_path: Path
) -> None:
    changes = {"training.steps": 8, "model.n_layers": 3, "model.engram.extract_after": 1, "model.engram.slots": 4}
    changes["model.manifold.geometry.modes"] = 8
    config = small_experiment(preset, changes)
    runtime = Runtime(device="cpu", log_every=1, checkpoint_every=2, micro_batch=2)
    geometry = drawn_geometry(config.model)
    whole = list(train(config, small_store, tmp_path / "whole", runtime, geometry))
    reports = []
    for progress in train(config, small_store, tmp_path / "cut", runtime, geometry):
        reports.append(progress)
        if progress.step == stop_at:
            break
    torch.manual_seed(99)
    reports += train(config, small_store, tmp_path / "cut", runtime)
    assert different(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == []
    assert curve(reports) == curve(whole)
