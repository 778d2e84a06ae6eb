"""Training on simulated GPUs: the order of CUDA calls, memory, and what is reported of it."""

import json
from pathlib import Path

import pytest
import torch

import hrs.training.loop
from hrs.errors import HRSError
from hrs.evaluation import evaluate
from hrs.models import build_model
from hrs.training import Runtime, train
from hrs.training.memory import (
    CUDA_OVERHEAD_BYTES,
    cap_process_memory,
    card_fraction,
    fit_micro_batch,
    predict_peak,
    reserved_bytes,
)
from hrs.training.validation import Validation
from tests.simulated_gpu import GIB, GONE, OUT_OF_MEMORY, FailAbove, SimulatedGpu, simulated_gpus
from tests.training.training_checks import different, weights


def summary(directory: Path) -> dict:
    return json.loads((directory / "training.json").read_text())


# ---- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_process_is_capped_through_the_device_of_its_runtime(device: str) -> None:
    with simulated_gpus(SimulatedGpu(total_bytes=16 * GIB)) as cuda:
        cap_process_memory(0.5, Runtime(device=device).torch_device())
        assert cuda.calls[0] == "init"
        assert cuda.caps == {0: 8 * GIB - CUDA_OVERHEAD_BYTES}


def test_the_cpu_is_not_capped_even_beside_a_gpu() -> None:
    with simulated_gpus(SimulatedGpu()) as cuda:
        cap_process_memory(0.5, Runtime(device="cpu").torch_device())
        assert cuda.calls == []


def test_planning_opens_no_gpu(small_experiment) -> None:
    with simulated_gpus(SimulatedGpu()) as cuda:
        planned = predict_peak(small_experiment(), 2, Runtime())
        fit_micro_batch(small_experiment(), GIB, Runtime())
        assert cuda.calls == []
    assert planned == predict_peak(small_experiment(), 2, Runtime(device="cuda")), "auto means the GPU that is there"


def test_who_reserves_no_gpu_uses_the_cpu() -> None:
    assert Runtime().reserving(0.0).device == "cpu"
    assert Runtime(device="cuda:1").reserving(0.5) == Runtime(device="cuda:1")


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_on_a_gpu_resumes_with_the_gpus_generator(small_experiment, small_store, tmp_path: Path) -> None:
    config = small_experiment("full_hrs", {"training.steps": 4, "training.precision": "fp32"})
    runtime = Runtime(device="auto", log_every=1, checkpoint_every=2)
    with simulated_gpus(SimulatedGpu()) as cuda:
        list(train(config, small_store, tmp_path / "whole", runtime))
        assert cuda.calls[:3] == ["init", "set_device(0)", "init"] and "get_rng_state(0)" in cuda.calls
    with simulated_gpus(SimulatedGpu()):
        for progress in train(config, small_store, tmp_path / "parts", runtime):
            if progress.step == 3:
                break
        list(train(config, small_store, tmp_path / "parts", runtime))
    assert different(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == []


def test_peak_memory_is_the_runs_own_in_a_process_that_trained_another_one(
    small_experiment, small_store, tmp_path: Path
) -> None:
    small = small_experiment(changes={"training.steps": 1, "training.validations": 0})
    large = small_experiment(changes={"training.steps": 1, "training.validations": 0, "model.d_model": 64})
    runtime = Runtime(device="cuda", log_every=1)
    with simulated_gpus(SimulatedGpu(), count_memory=True):
        for name, config in (("alone", small), ("large", large), ("after", small)):
            list(train(config, small_store, tmp_path / name, runtime))
    alone, after = (summary(tmp_path / name)["peak_memory_bytes"] for name in ("alone", "after"))
    assert alone < summary(tmp_path / "large")["peak_memory_bytes"] / 2
    assert after < 1.2 * alone


# ---- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"micro_batch_limit": 4}, 2),  # planned to fit, but an earlier session ran out of memory
        ({"micro_batch_limit": 1}, 1),
        ({"micro_batch_limit": 3}, 2),
        ({"micro_batch": 4, "micro_batch_limit": 1}, 4),  # the user's wish
        ({}, 2),
    ],
)
def test_a_plan_does_not_override_the_smaller_micro_batch_of_an_earlier_session(
    second: dict, expected: int, small_experiment, small_store, tmp_path: Path
) -> None:
    config = small_experiment(changes={"training.steps": 2, "training.validations": 0})
    first = Runtime(device="cpu", log_every=1, checkpoint_every=1, micro_batch=2)
    for progress in train(config, small_store, tmp_path, first):
        if progress.step == 2:
            break
    list(train(config, small_store, tmp_path, Runtime(device="cpu", **second)))
    assert summary(tmp_path)["micro_batch"] == expected


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (2, 2), (3, 2), (64, 4)])
def test_a_new_run_starts_with_the_largest_divisor_within_the_plan(
    limit: int, expected: int, small_experiment, run, tmp_path: Path
) -> None:
    run(small_experiment(changes={"training.steps": 1}), tmp_path, micro_batch_limit=limit)
    assert summary(tmp_path)["micro_batch"] == expected


# ---- room for fragmentation ------------------------------------------------------------------------------------------


def test_shares_and_micro_batches_leave_room_for_fragmentation(small_experiment) -> None:
    peak = predict_peak(small_experiment(), 4, Runtime(device="cuda"))
    assert reserved_bytes(peak) > 1.05 * peak
    assert card_fraction(peak, 16 * GIB) * 16 * GIB >= reserved_bytes(peak)
    assert fit_micro_batch(small_experiment(), reserved_bytes(peak), Runtime(device="cuda")).micro_batch == 4
    assert fit_micro_batch(small_experiment(), reserved_bytes(peak) - 1, Runtime(device="cuda")).micro_batch < 4
    with pytest.raises(HRSError, match=r"and the GPU has 0\.25 GiB free"):
        fit_micro_batch(small_experiment(), GIB // 4, Runtime(device="cuda"))


# ---- out of memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wording", OUT_OF_MEMORY)
def test_every_wording_of_out_of_memory_halves_the_micro_batch(
    wording: str, small_experiment, small_store, tmp_path: Path
) -> None:
    config = small_experiment(changes={"training.steps": 1, "training.validations": 1})
    with simulated_gpus(SimulatedGpu()) as cuda, FailAbove(2, OUT_OF_MEMORY[wording]) as memory:
        list(train(config, small_store, tmp_path, Runtime(device="cuda")))
        assert "empty_cache" in cuda.calls
    assert summary(tmp_path)["micro_batch"] == 2 and memory.failures == 1


def test_validation_and_evaluation_halve_their_batch_and_change_nothing(
    small_experiment, small_store, tmp_path: Path
) -> None:
    config = small_experiment(changes={"training.precision": "fp32"})
    model, device = build_model(config.model), torch.device("cpu")
    losses = []
    for rows in (99, 1):
        validation = Validation(small_store.validation, config)
        with FailAbove(rows, OUT_OF_MEMORY["driver"]) as memory:
            losses.append(validation.loss(model, device, 4))
            losses.append(validation.loss(model, device, 4))
            assert memory.failures == (0 if rows == 99 else 2), "the batch that fits is remembered"
            losses.append(evaluate(model, small_store).nats_per_token)
    assert model.training
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5)


def test_what_cannot_be_cut_is_one_sentence(small_experiment, small_store, tmp_path: Path, monkeypatch) -> None:
    config = small_experiment(changes={"training.averaging.decays": "0.9"})

    def full(*_: object) -> None:
        raise OUT_OF_MEMORY["driver"]()

    where = r"^the model does not fit on GPU 0 \(NVIDIA RTX 4080, 16\.0 GiB, 15\.6 free\): "
    with simulated_gpus(SimulatedGpu()) as cuda:
        monkeypatch.setattr(hrs.training.loop, "Averages", full)
        with pytest.raises(HRSError, match=where + "1 averages of the weights are too much .* larger GPU") as error:
            list(train(config, small_store, tmp_path, Runtime(device="cuda")))
        monkeypatch.setattr(cuda, "move", full)
        with pytest.raises(HRSError, match=where + r"its weights take 0\.00 GiB .* smaller scale"):
            list(train(config, small_store, tmp_path, Runtime(device="cuda")))
    assert "\n" not in str(error.value)
    with FailAbove(0, OUT_OF_MEMORY["cuBLAS"]), pytest.raises(HRSError, match="evaluation of one window at a time"):
        evaluate(build_model(config.model), small_store)


@pytest.mark.parametrize("wording", GONE)
def test_a_gpu_that_is_gone_is_one_sentence_and_not_used_again(
    wording: str, small_experiment, small_store, tmp_path: Path
) -> None:
    config, runtime = small_experiment(changes={"training.steps": 1}), Runtime(device="cuda")
    with simulated_gpus(SimulatedGpu()):
        with FailAbove(0, GONE[wording]) as gpu, pytest.raises(HRSError, match=r"GPU 0 failed .* check `nvidia-smi`"):
            list(train(config, small_store, tmp_path, runtime))
        assert gpu.failures == 1, "no smaller micro-batch is tried"
        with pytest.raises(HRSError, match="cannot be used again by this process"):
            runtime.torch_device()
