"""Half precision by what the GPU computes in hardware, and the loss scale of fp16."""

from pathlib import Path

import pytest
import torch
from torch import nn
from training_checks import curve, different, weights

from hrs.errors import HRSError
from hrs.models import build_model
from hrs.training import Runtime, train
from hrs.training.checkpoint import read_latest
from hrs.training.loss_scale import GROWTH_STEPS, INITIAL, LARGEST, LossScale
from hrs.training.optimizer import build_optimizer
from hrs.training.runtime import half_type
from hrs.training.step import Stepper
from tests.simulated_gpu import SimulatedGpu, simulated_gpus

CPU = torch.device("cpu")
TURING = SimulatedGpu(name="Tesla T4", capability=(7, 5))
PLAIN = {"training.steps": 6, "training.validations": 1, "model.dropout": 0.0}


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_auto_is_what_the_gpu_computes_in_hardware(capability: tuple[int, int], expected: torch.dtype) -> None:
    with simulated_gpus(SimulatedGpu(capability=capability)) as cuda:
        device = Runtime().torch_device()
        assert half_type("auto", device) is expected
        assert half_type("fp16", device) is torch.float16 and half_type("bf16", device) is torch.bfloat16
        assert half_type("fp32", device) is half_type("auto", CPU) is None
        assert cuda.tf32, "what remains float32 uses TF32"


def test_fp16_on_the_cpu_is_refused(small_experiment, run, tmp_path: Path) -> None:
    with pytest.raises(HRSError, match="precision=fp16 needs a GPU: on the CPU choose auto, fp32 or bf16"):
        run(small_experiment(changes={"training.precision": "fp16"}), tmp_path)


# ---- the scale -------------------------------------------------------------------------------------------------------


def test_scale_halves_after_overflow_doubles_after_a_long_time_and_has_bounds() -> None:
    scale, yes, no = LossScale(CPU), torch.tensor(True), torch.tensor(False)
    scale.update(no)
    assert scale.scale == INITIAL / 2
    for _ in range(GROWTH_STEPS - 1):
        scale.update(yes)
    assert scale.scale == INITIAL / 2
    scale.update(yes)
    assert scale.scale == INITIAL and scale.state() == [INITIAL, 0]
    for _ in range(40):
        scale.update(no)
    assert scale.scale == 1
    scale.restore([LARGEST, GROWTH_STEPS - 1])
    scale.update(yes)
    assert scale.scale == LARGEST


def test_only_an_overflow_of_gradients_at_a_scale_above_1_is_excused() -> None:
    scale, finite, infinite = LossScale(CPU), torch.tensor(1.0), torch.tensor(float("inf"))
    assert scale.overflowed(finite, infinite)
    assert not scale.overflowed(finite, finite) and not scale.overflowed(infinite, infinite)
    scale.restore([1.0, 0])
    assert not scale.overflowed(finite, infinite)


def test_unscaling_is_exact_and_reaches_sparse_gradients() -> None:
    dense, sparse, resting = (nn.Parameter(torch.zeros(4, 2)) for _ in range(3))
    values = torch.randn(3, 2)
    dense.grad = values[:1].expand(4, 2) * INITIAL
    sparse.grad = torch.sparse_coo_tensor(torch.tensor([[0, 2, 2]]), values * INITIAL, (4, 2), check_invariants=True)
    LossScale(CPU).unscale([dense, sparse, resting])
    assert torch.equal(dense.grad, values[:1].expand(4, 2)) and torch.equal(sparse.grad._values(), values)


@pytest.mark.parametrize("changes", [{}, {"training.optimizer.expert_updates": "lazy", "model.n_layers": 2}])
def test_scaled_gradients_are_those_of_float32(changes: dict, small_experiment, monkeypatch) -> None:
    """The scale alone, without rounding to half precision: equal to the bit, whatever the micro-batches."""
    config = small_experiment("v17_unphased" if changes else "dense_baseline", {"model.dropout": 0.0} | changes)
    tokens = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(0))
    found = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = build_model(config.model).train()
        stepper = Stepper(model, build_optimizer(model, config.training.optimizer), config.training, CPU, 2)
        stepper.loss_scale = LossScale(CPU) if scaled else None
        stepper._everyones_gradients(tokens, None)
        found.append([p.grad.to_dense() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["dense_baseline", "full_hrs"])
def test_a_turing_gpu_trains_in_fp16_and_resumes_exactly(
    preset: str, small_experiment, small_store, tmp_path: Path
) -> None:
    config = small_experiment(preset, PLAIN | {"training.steps": 10})
    runtime = Runtime(device="auto", log_every=1, checkpoint_every=2)
    with simulated_gpus(TURING):
        whole = list(train(config, small_store, tmp_path / "whole", runtime))
    with simulated_gpus(TURING):
        for progress in train(config, small_store, tmp_path / "parts", runtime):
            if progress.step == 3:
                break
        list(train(config, small_store, tmp_path / "parts", runtime))
    assert different(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == []
    scales = [read_latest(tmp_path / name).state["loss_scale"] for name in ("whole", "parts")]
    assert scales[0] == scales[1] and scales[0][1] > 0
    if preset == "dense_baseline":  # the routed one skips steps until its scale is small enough
        exact = list(train(config, small_store, tmp_path / "exact", Runtime(device="cpu", log_every=1)))
        assert whole[-1].loss == pytest.approx(exact[-1].loss, rel=0.02)


@pytest.mark.parametrize("check_every", [None, 3])
def test_steps_that_the_scale_skips_are_not_taken_for_divergence(
    check_every: int | None, small_experiment, small_store, tmp_path: Path, monkeypatch
) -> None:
    """Gradients overflow until the scale has fallen below 16: thirteen steps in a row, more than a diverged run may."""

    def overflowing(self, parameters) -> None:
        if self.scale >= 16:
            next(iter(parameters)).grad.fill_(float("inf"))
        else:
            real(self, parameters)

    real = LossScale.unscale
    monkeypatch.setattr(LossScale, "unscale", overflowing)
    config = small_experiment(changes=PLAIN | {"training.steps": 16, "training.validations": 0})
    with simulated_gpus(TURING):
        runtime = Runtime(device="cuda", log_every=4, check_every=check_every)
        reports = list(train(config, small_store, tmp_path, runtime))
    assert curve(reports)[16]["skipped_steps"] == 13
    assert read_latest(tmp_path).state["loss_scale"] == [8.0, 3.0]


def test_a_loss_that_is_not_finite_is_divergence_in_fp16_too(
    small_experiment, small_store, tmp_path: Path, monkeypatch
) -> None:
    def poisoned(*args, **kwargs):
        return real(*args, **kwargs) * float("nan")

    from hrs.training.loss import cross_entropy as real

    monkeypatch.setattr("hrs.training.step.cross_entropy", poisoned)
    config = small_experiment(changes=PLAIN | {"training.steps": 12})
    with simulated_gpus(TURING), pytest.raises(HRSError, match="not finite 10 steps in a row"):
        list(train(config, small_store, tmp_path, Runtime(device="cuda")))
