"""The memory of a run on the CPU is its own, whatever its process did before."""

import pytest
import torch

from hrs.training.progress import MemoryMeter

MIB = 2**20
CPU = torch.device("cpu")


def growth(n_mib: int) -> float:
    """MiB that a run measures which fills one tensor and gives it back."""
    meter = MemoryMeter(CPU)
    tensor = torch.ones(n_mib * MIB // 4)
    del tensor
    return meter.peak_bytes() / MIB


def test_a_run_is_measured_alike_before_and_after_a_large_one() -> None:
    growth(1)  # what the first call loads
    before, large, after = growth(48), growth(400), growth(48)
    assert before == pytest.approx(48, abs=24) and after == pytest.approx(before, abs=24)
    assert large == pytest.approx(400, abs=48)
    kept = torch.ones(200 * MIB // 4)
    assert growth(48) == pytest.approx(before, abs=24), "what was there before the run is not the run's"
    del kept
