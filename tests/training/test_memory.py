"""Prediction of memory: exact against hand counts, torch's own allocator, and the resident set of a real process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hrs.config import ExperimentConfig
from hrs.errors import HRSError
from hrs.models import WindowContext, build_model
from hrs.presets import experiment
from hrs.training.memory import (
    CUDA_OVERHEAD_BYTES,
    AllocatorLimit,
    card_fraction,
    estimate_peak,
    fit_micro_batch,
    predict_peak,
    reserved_bytes,
)
from hrs.training.memory_imitation import ImitateCuda
from hrs.training.memory_step import measure_step, training_step_peak
from hrs.training.memory_trace import StorageCounter, peak
from hrs.training.optimizer import build_optimizer
from hrs.training.runtime import Runtime
from hrs.training.step import Stepper

CPU, CUDA = Runtime(device="cpu"), Runtime(device="cuda")
CHECKPOINTED_CPU = Runtime(device="cpu", activation_checkpointing=True)


def small(preset: str = "dense_baseline", **changes: str) -> ExperimentConfig:
    """Two blocks, or three where engrams need one to read them."""
    layers = "3" if "full_hrs" in preset else "2"
    return experiment(preset, "micro", overrides={"model.n_layers": layers, "model.max_seq_len": "32", **changes})


# ---- counting storages -----------------------------------------------------------------------------------------------


def test_storage_counts_once_rounded_to_blocks_until_its_last_view_dies() -> None:
    with StorageCounter(block_bytes=512) as counter:
        x = torch.ones(130)  # 520 bytes
        view = x[:3].view(3, 1)
        x += 1
        assert counter.live_bytes == 1024
        del x
        assert counter.live_bytes == 1024
        del view
    assert (counter.live_bytes, counter.peak_bytes) == (0, 1024)


def test_storage_resized_in_place_counts_at_its_new_size() -> None:
    with StorageCounter() as counter:
        x = torch.ones(10)
        x.resize_(100)
        assert counter.live_bytes == 400


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 100)), min_size=1, max_size=30))
def test_peak_is_the_highest_sum_and_its_categories_add_up(allocations: list[tuple[int, int]]) -> None:
    """Replay against a slow reference: every storage is released two allocations after its own."""
    events = []
    for serial, (_, size) in enumerate(allocations):
        events.append((serial, size))
        if serial >= 2:
            events.append((serial - 2, -allocations[serial - 2][1]))
    category = {serial: f"kind {kind}" for serial, (kind, _) in enumerate(allocations) if kind}
    top = peak(events, category, "rest")
    assert top.bytes == max(sum(change for _, change in events[: n + 1]) for n in range(len(events)))
    assert sum(top.by_category.values()) == top.bytes


# ---- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake", [False, True])
def test_peak_of_an_mlp_equals_the_count_by_hand(fake: bool) -> None:
    """At the backward of ReLU: x, the hidden units, their gradient before and after, and two seeds of the loss."""
    n, a, b, c = 64, 8, 32, 16
    with FakeTensorMode(allow_non_fake_inputs=False) if fake else StorageCounter(), StorageCounter() as counter:
        model = nn.Sequential(nn.Linear(a, b, bias=False), nn.ReLU(), nn.Linear(b, c, bias=False))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        x = torch.zeros(n, a)

        def accumulate_gradients() -> None:
            for _ in range(2):
                model(x).sum().backward()

        top = measure_step(counter, model, optimizer, accumulate_gradients, clip_norm=1.0)
    weights = 4 * (a * b + b * c)
    assert top.by_category == {
        "parameters": weights,
        "gradients": weights,
        "optimizer": 2 * weights + 2 * 4,  # two moments, and one step count per parameter
        "activations": 4 * n * (a + 3 * b) + 2 * 4,
    }


@pytest.mark.parametrize(
    "preset", ["dense_baseline", "full_hrs", "full_hrs_legacy", "full_hrs_recurrence", "v18_cross_attn"]
)
@pytest.mark.parametrize("runtime", [CPU, CHECKPOINTED_CPU], ids=["plain", "checkpointed"])
def test_fake_step_takes_exactly_the_bytes_of_the_real_step(preset: str, runtime: Runtime) -> None:
    config = small(preset, **{"model.engram.window": "8"})
    with StorageCounter() as counter:
        real = training_step_peak(
            counter,
            config.model,
            config.training,
            micro_batch=2,
            n_micro_batches=2,
            activation_checkpointing=runtime.activation_checkpointing,
        )
    fake = estimate_peak(config, 2, runtime)
    assert fake.peak_bytes == real.bytes
    assert fake.activation_bytes == real.by_category["activations"]
    assert (fake.parameter_bytes, fake.gradient_bytes) == (
        real.by_category["parameters"],
        real.by_category["gradients"],
    )


@pytest.mark.parametrize("preset", ["dense_baseline", "full_hrs"])
def test_prediction_agrees_with_the_allocator_that_torch_profiles(preset: str) -> None:
    """An independent measure: every allocation of the CPU's allocator, scratch space of kernels included."""
    config = small(preset)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run_real_step(config, micro_batch=2)
    events = profile.profiler.kineto_results.events()
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    live = top = 0
    for change in changes:
        live += change
        top = max(top, live)
    assert predict_peak(config, 2, CPU) == pytest.approx(top, rel=0.01)


def run_real_step(config: ExperimentConfig, micro_batch: int) -> None:
    """Two optimiser steps of two micro-batches: the second has the optimiser's state from the start."""
    model = build_model(config.model).train()
    optimizer = build_optimizer(model, config.training.optimizer)
    stepper = Stepper(model, optimizer, config.training, torch.device("cpu"), micro_batch)
    for _ in range(2):
        stepper.step(torch.zeros(2 * micro_batch, config.model.max_seq_len + 1, dtype=torch.int64))


RESIDENT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.backends.mkldnn.set_flags(_enabled=sys.argv[2] == "onednn")
from test_memory import run_real_step, wide
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
for micro_batch in (4, 24):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run_real_step(wide(), micro_batch)
    print(status("VmHWM"))
"""


def wide() -> ExperimentConfig:
    """200 MB a step at a micro-batch of 24."""
    return experiment("full_hrs", "tiny", overrides={"model.max_seq_len": "64", "training.batch_sequences": "48"})


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident high-water marks are Linux's")
@pytest.mark.parametrize(("products", "within"), [("mkl", 0.05), ("onednn", 0.15)])
def test_prediction_agrees_with_the_resident_set_of_a_process(products: str, within: float) -> None:
    """Growth between two micro-batches: what is loaded once drops out; mapped blocks go back when freed.

    oneDNN keeps scratch space of its own, which no tensor holds and no trace sees.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RESIDENT, str(Path(__file__).parent), products]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    smaller, larger = map(int, done.stdout.split())
    predicted = predict_peak(wide(), 24, CPU) - predict_peak(wide(), 4, CPU)
    assert larger - smaller == pytest.approx(predicted, rel=within)


def test_prediction_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    predict_peak(small(), 1, CUDA)
    assert torch.equal(torch.get_rng_state(), state)


# ---- imitation of CUDA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_imitated_attention_keeps_no_score_matrix(masked: bool) -> None:
    """Live after the forward: q, k, v, output, one float per query, and the mask in the type of q."""
    b, h, t, d = 2, 2, 64, 8
    with FakeTensorMode(), StorageCounter() as counter, ImitateCuda():
        q, k, v = (torch.zeros(b, h, t, d, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        mask = torch.ones(t, t, dtype=torch.bool) if masked else None
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1, is_causal=not masked)
        expected = 4 * 2 * b * h * t * d + 4 * b * h * t + (t * t + 2 * t * t if masked else 0)
        assert counter.live_bytes == expected
        output.sum().backward()
        assert [x.grad.shape for x in (q, k, v)] == [q.shape] * 3
    assert counter.peak_bytes < expected + 2 * b * h * t * t


def test_imitated_dropout_keeps_one_byte_per_element() -> None:
    with FakeTensorMode(), StorageCounter() as counter, ImitateCuda():
        x = torch.zeros(1000, requires_grad=True)
        y = nn.Dropout(0.1)(x)
        assert counter.live_bytes == 4000 + 4000 + 1000
        y.sum().backward()
        assert x.grad is not None


def test_imitated_autocast_multiplies_in_bfloat16_and_normalises_in_float32() -> None:
    with FakeTensorMode(), ImitateCuda(), torch.autocast("cpu", torch.bfloat16):
        y = nn.Linear(8, 8)(torch.zeros(2, 8))
        assert y.dtype is torch.bfloat16
        assert y.softmax(-1).dtype is F.layer_norm(y, (8,)).dtype is torch.float32


def test_recomputation_in_the_backward_pass_is_imitated_too() -> None:
    """Were it not, a checkpointed block would hold scores [B, H, T, T] in its backward pass."""
    config = small("dense_baseline", **{"model.max_seq_len": "256", "model.n_heads": "16", "model.dropout": "0.1"})
    checkpointed = Runtime(device="cuda", activation_checkpointing=True)
    scores_bytes = 4 * 2 * 16 * 256 * 256
    assert estimate_peak(config, 2, checkpointed).activation_bytes < scores_bytes
    assert estimate_peak(config, 2, CHECKPOINTED_CPU).activation_bytes > scores_bytes


def test_a_plan_for_a_card_adds_the_cards_own_memory() -> None:
    estimate = estimate_peak(small(), 2, CUDA)
    parts = estimate.parameter_bytes + estimate.gradient_bytes + estimate.optimizer_bytes + estimate.activation_bytes
    assert estimate.peak_bytes == parts + CUDA_OVERHEAD_BYTES


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_activation_checkpointing_lowers_the_peak() -> None:
    assert predict_peak(small(), 4, CHECKPOINTED_CPU) < predict_peak(small(), 4, CPU)


def test_fit_takes_the_largest_divisor_that_fits() -> None:
    """Against a search over all divisors, at limits on and just below each of their peaks."""
    config = small("dense_baseline", **{"training.batch_sequences": "6"})
    peaks = {n: predict_peak(config, n, CPU) for n in (1, 2, 3, 6)}
    for limit in [peak_bytes - below for peak_bytes in peaks.values() for below in (0, 1)]:
        fitting = [n for n in peaks if peaks[n] <= limit]
        if fitting:
            plan = fit_micro_batch(config, limit, CPU)
            assert (plan.micro_batch, plan.accumulation) == (max(fitting), 6 // max(fitting))
            assert plan.peak_bytes == peaks[max(fitting)]


def test_a_card_too_small_is_told_in_one_sentence() -> None:
    config = small()
    needed, checkpointed = predict_peak(config, 1, CPU), predict_peak(config, 1, CHECKPOINTED_CPU)
    assert checkpointed < needed
    with pytest.raises(
        HRSError, match=r"dense_baseline at scale micro needs .* at micro-batch 1 .* or turn on activation"
    ):
        fit_micro_batch(config, checkpointed, CPU)
    with pytest.raises(HRSError, match="activation checkpointing would still need"):
        fit_micro_batch(config, checkpointed - 1, CPU)
    with pytest.raises(HRSError, match=r"choose a smaller scale$"):
        fit_micro_batch(config, checkpointed - 1, CHECKPOINTED_CPU)


def test_a_micro_batch_must_divide_the_batch() -> None:
    with pytest.raises(HRSError, match=r"micro_batch 3 must divide training.batch_sequences 4"):
        predict_peak(small(), 3, CPU)


@given(peak_bytes=st.integers(1, 2**36), card_bytes=st.integers(2**30, 2**37))
def test_trials_packed_by_fraction_fit_the_card(peak_bytes: int, card_bytes: int) -> None:
    fraction = card_fraction(peak_bytes, card_bytes)
    hundredths = round(100 * fraction)
    assert fraction == hundredths / 100 and 1 <= hundredths <= 100
    needed = reserved_bytes(peak_bytes)
    if needed <= card_bytes:
        assert 100 // hundredths * needed <= card_bytes
        assert (hundredths - 1) * card_bytes < 100 * needed  # rounded by less than one hundredth


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_limit_holds_in_forward_backward_and_optimizer() -> None:
    """Weights, input, output, each gradient and each moment take 4096 bytes."""
    model, x = nn.Linear(32, 32, bias=False), torch.ones(32, 32, requires_grad=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with AllocatorLimit(3 * 4096 - 1), pytest.raises(torch.OutOfMemoryError):
        model(x)
    with AllocatorLimit(3 * 4096 + 100):
        loss = model(x).sum()
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
    model(x).sum().backward()
    with AllocatorLimit(4 * 4096 - 1), pytest.raises(torch.OutOfMemoryError):
        optimizer.step()


@pytest.mark.parametrize("preset", ["dense_baseline", "dense_recurrence"])
def test_predicted_peak_is_the_smallest_limit_under_which_training_runs_undivided(preset: str) -> None:
    """The windows of a model with history are given theirs."""
    config = small(preset, **{"training.batch_sequences": "4", "model.n_layers": "3", "model.engram.window": "8"})
    limit = predict_peak(config, 2, CPU)
    tokens = torch.zeros(4, config.model.max_seq_len + 1, dtype=torch.int64)
    n_history = build_model(config.model).history_tokens
    assert (n_history > 0) == (preset == "dense_recurrence")
    context = WindowContext(torch.zeros(4, n_history, dtype=torch.int64)) if n_history else None
    for limit_bytes, micro_batch in ((limit + 1024, 2), (limit - 1024, 1)):
        with AllocatorLimit(limit_bytes):
            model = build_model(config.model).train()
            optimizer = build_optimizer(model, config.training.optimizer)
            stepper = Stepper(model, optimizer, config.training, torch.device("cpu"), micro_batch=2)
            for _ in range(2):
                assert stepper.step(tokens, context) is not None
        assert stepper.micro_batch == micro_batch
        del model, optimizer, stepper
