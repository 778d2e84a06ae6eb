"""What a run computes must not depend on how the machine computes it."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training_checks import curve, different, largest_gap, weights

from hrs.data import TrainingWindows
from hrs.errors import HRSError
from hrs.models import build_model
from hrs.training import Runtime, load_model, train
from hrs.training.schedule import lr
from hrs.training.validation import Validation

NO_DROPOUT = {"model.dropout": 0.0, "training.steps": 6, "training.schedule.warmup_frac": 0.0}


# ---- one step after another ------------------------------------------------------------------------------------------


def test_a_run_equals_the_plainest_training_loop(small_experiment, small_store, run, tmp_path: Path) -> None:
    """Reference: torch's AdamW on the mean loss of the whole batch, written out in ten lines."""
    config = small_experiment("dense_baseline", NO_DROPOUT | {"training.label_smoothing": 0.1})
    reports = run(config, tmp_path)
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False, fused=False)
    windows = TrainingWindows(small_store.train.tokens, 16, 4, config.seed)
    for step in range(6):
        tokens = torch.from_numpy(windows.batch(step))
        loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr(config.training.schedule, step, 6)
        optimizer.step()
        assert reports[step].metrics["train_loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert reports[step].metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert reports[step].metrics["lr"] == optimizer.param_groups[0]["lr"]
    assert largest_gap(weights(tmp_path), model.state_dict()) < 1e-4


def test_the_loss_falls_far_below_uniform(small_experiment, run, tmp_path: Path) -> None:
    reports = run(small_experiment("full_hrs", {"training.steps": 120, "training.phases": []}), tmp_path, log_every=20)
    assert reports[0].loss == pytest.approx(math.log(300), abs=1.0)
    assert reports[-1].metrics["validation_loss"] < 0.7 * math.log(300)


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(small_experiment, small_store, tmp_path: Path) -> None:
    runs = {"a": 7, "b": 7, "c": 8}
    for name, seed in runs.items():
        config = small_experiment("full_hrs", {"training.steps": 4, "seed": seed})
        list(train(config, small_store, tmp_path / name, Runtime(device="cpu")))
    a, b, c = (weights(tmp_path / name) for name in runs)
    assert different(a, b) == [] and different(a, c)


def test_reports_come_at_their_steps_with_their_metrics(small_experiment, run, tmp_path: Path) -> None:
    config = small_experiment("full_hrs", {"training.steps": 11, "training.validations": 2})
    reports = run(config, tmp_path, log_every=4)
    assert [p.step for p in reports] == [4, 6, 8, 11]
    assert [p.step for p in reports if "validation_loss" in p.metrics] == [6, 11]
    losses = {"train_loss", "locality", "balance", "entropy", "recon"}
    routing = {"routing_entropy", *(f"tier_share_{name}" for name in config.model.tiers.names)}
    others = {"lr", "grad_norm", "tokens_per_second", "phase", "skipped_steps"}
    assert set(reports[0].metrics) == losses | routing | others
    shares = [v for k, v in reports[0].metrics.items() if k.startswith("tier_share_")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert [p.phase for p in reports] == ["geometry", "specialisation", "compression", "refinement"]
    assert reports[0].loss == reports[0].metrics["train_loss"] and reports[-1].seconds_left == 0.0


def test_a_report_holds_the_mean_of_its_interval(small_experiment, run, tmp_path: Path) -> None:
    config = small_experiment("full_hrs")
    every = [p.metrics for p in run(config, tmp_path / "every", log_every=1)]
    fourth = [p.metrics for p in run(config, tmp_path / "fourth", log_every=6)]
    for name in ("train_loss", "grad_norm", "recon", "tier_share_conv"):
        assert fourth[1][name] == pytest.approx(sum(m[name] for m in every[6:]) / 6, rel=1e-6)


# ---- validation ------------------------------------------------------------------------------------------------------


def test_validations_leave_the_run_as_it_would_have_been(small_experiment, small_store, tmp_path: Path) -> None:
    for n in (0, 12):
        config = small_experiment("full_hrs", {"training.validations": n})
        list(train(config, small_store, tmp_path / str(n), Runtime(device="cpu")))
    assert different(weights(tmp_path / "0"), weights(tmp_path / "12")) == []


def test_validation_loss_scores_every_token_once(small_experiment, small_store, run, tmp_path: Path) -> None:
    """Reference: one window at a time, in evaluation mode, without label smoothing."""
    changes = {"training.validation_windows": 0, "training.validations": 1, "training.label_smoothing": 0.2}
    reports = run(small_experiment("full_hrs", changes), tmp_path)
    model, _ = load_model(tmp_path)
    tokens = torch.from_numpy(small_store.validation.tokens.astype("int64"))
    nats, scored = 0.0, 1
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            start = min(start, len(tokens) - 17)
            logits = model(tokens[None, start : start + 16]).logits[0]
            losses = F.cross_entropy(logits, tokens[start + 1 : start + 17], reduction="none")
            nats += float(losses[scored - start - 1 :].sum())
            scored = start + 17
    assert scored == len(tokens)
    assert reports[-1].metrics["validation_loss"] == pytest.approx(nats / (len(tokens) - 1), abs=1e-5)


def test_fewer_validation_windows_are_spread_through_the_split(small_experiment, small_store) -> None:
    starts = [s for s, _ in Validation(small_store.validation, small_experiment())._windows]
    assert len(starts) == 8 and starts[-1] > 0.8 * len(small_store.validation)


# ---- how the batch is cut --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_equals_the_whole_batch(micro_batch: int, small_experiment, run, tmp_path: Path) -> None:
    config = small_experiment("dense_baseline", NO_DROPOUT)
    whole = run(config, tmp_path / "whole")
    cut = run(config, tmp_path / "cut", micro_batch=micro_batch)
    assert largest_gap(weights(tmp_path / "whole"), weights(tmp_path / "cut")) < 1e-4
    assert [p.loss for p in cut] == pytest.approx([p.loss for p in whole], abs=1e-5)


def test_a_micro_batch_must_divide_the_batch(small_experiment, run, tmp_path: Path) -> None:
    with pytest.raises(HRSError, match="micro_batch 3 must divide batch 4"):
        run(small_experiment(), tmp_path, micro_batch=3)


def test_a_compiled_model_with_lazy_experts_is_refused(small_experiment, run, tmp_path: Path) -> None:
    config = small_experiment("v17_peer_only", {"training.optimizer.expert_updates": "lazy"})
    with pytest.raises(HRSError, match="expert_updates=dense"):
        run(config, tmp_path, compile=True)


def test_a_store_of_another_vocabulary_is_refused(small_experiment, run, tmp_path: Path) -> None:
    with pytest.raises(HRSError, match="300 ids and the model 301"):
        run(small_experiment(changes={"data.tokenizer": "bpe:301"}), tmp_path)


@pytest.mark.parametrize("preset", ["dense_baseline", "full_hrs"])
def test_activation_checkpointing_changes_no_bit(preset: str, small_experiment, run, tmp_path: Path) -> None:
    """With dropout and routing noise: the recomputation must draw the same numbers."""
    config = small_experiment(preset, {"training.steps": 4, "training.phases": []})
    plain = run(config, tmp_path / "plain")
    recomputed = run(config, tmp_path / "recomputed", activation_checkpointing=True)
    assert different(weights(tmp_path / "plain"), weights(tmp_path / "recomputed")) == []
    assert curve(plain) == curve(recomputed)


@pytest.mark.slow
def test_compilation_changes_neither_names_nor_numbers(small_experiment, run, tmp_path: Path) -> None:
    changes = {"model.n_layers": 1, "training.steps": 2, "training.validations": 0}
    config = small_experiment("dense_baseline", NO_DROPOUT | changes)
    run(config, tmp_path / "plain")
    run(config, tmp_path / "compiled", compile=True)
    assert largest_gap(weights(tmp_path / "plain"), weights(tmp_path / "compiled")) < 1e-4


def test_bf16_on_the_cpu_learns_nearly_the_same(small_experiment, run, tmp_path: Path) -> None:
    full = run(small_experiment("dense_baseline", NO_DROPOUT | {"training.precision": "fp32"}), tmp_path / "fp32")
    half = run(small_experiment("dense_baseline", NO_DROPOUT | {"training.precision": "bf16"}), tmp_path / "bf16")
    gap = max(abs(a.loss - b.loss) for a, b in zip(full, half, strict=True))
    assert 0 < gap < 0.02
    assert all(w.dtype is torch.float32 for w in weights(tmp_path / "bf16").values())


# ---- memory ----------------------------------------------------------------------------------------------------------


class _SmallCard(TorchDispatchMode):
    """Runs out of memory whenever an operator gives a floating-point tensor of more than ``limit`` elements."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.failures = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.numel() > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError(f"Tried to allocate {result.numel() * 4} bytes.")
        return result


LOGITS = 16 * 300
"""Elements of the logits of one window, the largest tensor of a pass. The embedding has as many."""


@pytest.mark.parametrize(("fits", "expected"), [(2, 2), (1, 1)])
def test_a_smaller_micro_batch_is_found_and_changes_nothing(
    fits: int, expected: int, small_experiment, run, tmp_path: Path
) -> None:
    config = small_experiment("dense_baseline", NO_DROPOUT)
    run(config, tmp_path / "large")
    with _SmallCard(fits * LOGITS) as card:
        reports = run(config, tmp_path / "small")
    assert card.failures == int(math.log2(4 // fits))  # once each, then remembered
    assert json.loads((tmp_path / "small" / "training.json").read_text())["micro_batch"] == expected
    assert [p.step for p in reports] == list(range(1, 7))
    assert largest_gap(weights(tmp_path / "large"), weights(tmp_path / "small")) < 1e-4


def test_after_running_out_the_step_is_repeated_with_the_same_noise(small_experiment, run, tmp_path: Path) -> None:
    """A run that fell back to micro-batches of 2 equals, to the bit, one that was told to use them."""
    config = small_experiment("full_hrs", {"training.steps": 4})
    run(config, tmp_path / "told", micro_batch=2)
    with _SmallCard(2 * LOGITS) as card:
        run(config, tmp_path / "found")
    assert card.failures == 1
    assert different(weights(tmp_path / "told"), weights(tmp_path / "found")) == []


def test_a_micro_batch_found_in_one_session_is_used_in_the_next(small_experiment, small_store, tmp_path: Path) -> None:
    config, runtime = small_experiment("full_hrs"), Runtime(device="cpu", log_every=1, checkpoint_every=2)
    with _SmallCard(LOGITS * 2) as card:
        for progress in train(config, small_store, tmp_path, runtime):
            if progress.step == 5:
                break
        failures = card.failures
        list(train(config, small_store, tmp_path, runtime))
    assert failures == card.failures == 1


def test_a_model_that_never_fits_is_one_sentence(small_experiment, run, tmp_path: Path) -> None:
    with _SmallCard(LOGITS // 2), pytest.raises(HRSError, match=r"does not fit on cpu.*Tried to allocate") as error:
        run(small_experiment("dense_baseline", {"model.d_model": 8}), tmp_path)
    assert "\n" not in str(error.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(small_experiment, run, tmp_path: Path, monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("hrs.training.step.cross_entropy", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(small_experiment(), tmp_path)


def test_the_largest_micro_batch_within_a_limit_is_chosen(small_experiment, run, tmp_path: Path) -> None:
    from hrs.training.memory import predict_peak

    config = small_experiment("dense_baseline", {"training.steps": 2})
    limit = predict_peak(config, 2, Runtime(device="cpu"))
    run(config, tmp_path, memory_limit_bytes=limit)
    assert json.loads((tmp_path / "training.json").read_text())["micro_batch"] == 2


# ---- numbers that are not finite -------------------------------------------------------------------------------------


class _Poison:
    """A cross-entropy that is not finite at the given calls."""

    def __init__(self, calls: set[int]) -> None:
        from hrs.training.loss import cross_entropy

        self.calls, self.count, self.real = calls, 0, cross_entropy

    def __call__(self, *args, **kwargs):
        loss = self.real(*args, **kwargs)
        self.count += torch.is_grad_enabled()
        return loss * float("nan") if self.count - 1 in self.calls and torch.is_grad_enabled() else loss


def test_a_step_that_is_not_finite_leaves_the_weights_alone(small_experiment, run, tmp_path: Path, monkeypatch) -> None:
    config = small_experiment("dense_baseline", {"training.steps": 4, "training.validations": 0})
    monkeypatch.setattr("hrs.training.step.cross_entropy", _Poison({2}))
    reports = run(config, tmp_path, checkpoint_every=1, log_every=1)
    assert math.isnan(reports[2].loss) and "train_loss" not in reports[2].metrics
    assert [p.metrics["skipped_steps"] for p in reports] == [0, 0, 1, 1]
    assert all(w.isfinite().all() for w in weights(tmp_path).values())
    assert json.loads((tmp_path / "training.json").read_text())["skipped_steps"] == 1


def test_a_skipped_step_changes_no_moment(small_experiment, small_store, tmp_path: Path, monkeypatch) -> None:
    from hrs.training.checkpoint import read_latest

    config = small_experiment("dense_baseline", {"training.validations": 0})
    monkeypatch.setattr("hrs.training.step.cross_entropy", _Poison({3}))
    seen = {}
    for progress in train(config, small_store, tmp_path, Runtime(device="cpu", log_every=1, checkpoint_every=1)):
        if progress.step > 1:
            checkpoint = read_latest(tmp_path)
            moments = {k: v for k, v in checkpoint.trainer.items() if k.startswith("moments/")}
            seen[checkpoint.state["step"]] = checkpoint.weights | moments
    assert different(seen[3], seen[4]) == [] and different(seen[4], seen[5])


def test_ten_bad_steps_in_a_row_stop_the_run_and_keep_the_checkpoint(
    small_experiment, run, tmp_path: Path, monkeypatch
) -> None:
    config = small_experiment("dense_baseline", {"training.steps": 30, "training.validations": 0})
    monkeypatch.setattr("hrs.training.step.cross_entropy", _Poison({1, *range(5, 30)}))
    with pytest.raises(HRSError, match="10 steps in a row, up to step 14"):
        run(config, tmp_path, checkpoint_every=5)
    assert all(w.isfinite().all() for w in weights(tmp_path).values())


# ---- runtime ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"threads": 0}, "threads must be at least 1"), ({"micro_batch": 0}, "micro_batch must be at least 1")],
)
def test_a_runtime_without_sense_is_refused(fields, message: str) -> None:
    with pytest.raises(HRSError, match=message):
        Runtime(**fields)


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(HRSError, match=device):
        Runtime(device=device).torch_device()
