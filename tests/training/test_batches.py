"""Batches prepared ahead are the same batches, in the same order, with the same errors."""

import pytest
import torch
from simulated_gpu import SimulatedGpu, simulated_gpus
from training_checks import curve, different, weights

from hrs.gpu import open_gpu
from hrs.models.base import WindowContext
from hrs.training import Runtime, train
from hrs.training.batches import Batches

CPU = torch.device("cpu")


def prepare(step: int) -> tuple[torch.Tensor, WindowContext | None]:
    if step == 5:
        raise OSError("the text of step 5 is gone")
    memory = torch.full((2, 1, 3), step + 0.5)
    return torch.full((2, 4), step), WindowContext(memory=memory) if step % 2 else None


def taken(batches: Batches, steps: list[int]) -> list[tuple[float, float | None]]:
    found = []
    for step in steps:
        tokens, context = batches.of(step)
        found.append((tokens.unique().item(), None if context is None else context.memory.unique().item()))
    batches.close()
    return found


@pytest.mark.parametrize("steps", [[0, 1, 2, 3], [2, 3, 4], [3, 1, 1, 4]])
def test_batches_prepared_ahead_are_those_prepared_on_demand(steps: list[int]) -> None:
    with simulated_gpus(SimulatedGpu()) as cuda:
        gpu = open_gpu("cuda")
        state = torch.get_rng_state()
        ahead = taken(Batches(prepare, 5, gpu.device, gpu), steps)
        assert torch.equal(torch.get_rng_state(), state)
        assert any("pinned_empty" in call for call in cuda.calls)
        assert "set_device(0)" in cuda.calls[2:], "a thread begins with GPU 0"
    assert ahead == taken(Batches(prepare, 5, CPU), steps)


def test_an_error_comes_at_the_step_it_belongs_to_and_the_next_step_can_be_tried() -> None:
    with simulated_gpus(SimulatedGpu()):
        gpu = open_gpu("cuda")
        batches = Batches(prepare, 9, gpu.device, gpu)
        assert batches.of(4)[0].unique().item() == 4
        for _ in range(2):
            with pytest.raises(OSError, match="step 5 is gone"):
                batches.of(5)
        assert batches.of(6)[0].unique().item() == 6
        batches.close()


@pytest.mark.parametrize("preset", ["dense_baseline", "full_hrs"])
def test_a_run_that_prepares_ahead_ends_with_the_same_bits(preset, small_experiment, small_store, tmp_path) -> None:
    """With history of the same document and dropout; the GPU is simulated, its numbers are the CPU's."""
    config = small_experiment(preset, {"training.steps": 5, "model.dropout": 0.1, "training.precision": "fp32"})
    curves = {}
    for device in ("cpu", "cuda"):
        with simulated_gpus(SimulatedGpu()) as cuda:
            runtime = Runtime(device=device, log_every=1, checkpoint_every=2)
            curves[device] = curve(list(train(config, small_store, tmp_path / device, runtime)))
            assert any("pinned_empty" in call for call in cuda.calls) == (device == "cuda")
    assert different(weights(tmp_path / "cpu"), weights(tmp_path / "cuda")) == []
    assert curves["cpu"] == curves["cuda"]
