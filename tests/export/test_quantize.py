"""Rounding by rows: error bounds, no floor, the entropy law, and GPTQ against rounding to nearest."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from properties import examples

from hrs.errors import HRSError
from hrs.export.as_built import quantize_as_built
from hrs.export.calibrate import quantize_calibrated
from hrs.export.quantize import BITS, Grid, quantize, rows_of

MATRICES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=24),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)


@examples(100)
@given(weight=MATRICES, bits=st.sampled_from(BITS))
@example(weight=np.full((1, 1), np.finfo(np.float32).tiny), bits=8)  # the step is subnormal
def test_a_weight_moves_by_half_a_step_of_its_row_at_most(weight: np.ndarray, bits: int) -> None:
    rows = torch.from_numpy(weight)
    grid = Grid(bits)
    quantized = quantize(rows, grid)
    steps = quantized.steps.double()
    error = (quantized.dequantize().double() - rows.double()).abs()
    assert quantized.levels.abs().max() <= grid.limit
    # Dividing moves a level by at most 2^-24 of it, multiplying out the product by as much: 2^-23 of |weight| and step.
    assert (error <= 0.5 * steps[:, None] * (1 + 2**-22) + 2**-22 * rows.double().abs()).all()
    wished = rows.double().abs().amax(1) / grid.limit
    smallest = 2.0**-24 * quantized.unit  # a row far below the largest one gets the finest step that can be stored
    # Rounded up to 11 bits, which float32 holds; the quotient itself is rounded to float64.
    assert (steps >= wished * (1 - 2**-52)).all()
    assert (steps <= wished * (1 + 2**-10) * (1 + 2**-52) + smallest).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e20])
def test_the_error_is_relative_because_no_step_has_a_floor(magnitude: float) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * magnitude
    error = (quantize(weight, Grid(8)).dequantize() / magnitude - weight / magnitude).norm() / 16 / 8
    assert error < 0.01
    if magnitude == 1e-6:
        levels, _ = quantize_as_built(weight)
        assert not levels.any(), "the floor of 1/127 turns small weights to nothing"


def test_the_floor_is_every_row_of_ordinary_weights() -> None:
    """0.098 is the size of the original's cell updates: error 2.3 % instead of 0.8 %, some 119 levels in use."""
    weight = 0.098 * torch.randn(256, 1000, generator=torch.Generator().manual_seed(0))
    levels, steps = quantize_as_built(weight)
    assert (steps == torch.tensor(1 / 127).half()).all()
    error = (levels * steps.float()[:, None] - weight).norm() / weight.norm()
    free, free_steps = quantize_as_built(weight, floor=0.0)
    assert error == pytest.approx(0.023, abs=0.001)
    assert (free * free_steps.float()[:, None] - weight).norm() / weight.norm() == pytest.approx(0.0075, abs=0.0015)
    assert levels.unique().numel() < 140 < free.unique().numel()


@pytest.mark.parametrize(("bits", "k"), [(8, 12.0), (7, 8.0), (6, 6.0), (6, 12.85)])
def test_gaussian_levels_carry_bits_minus_log2_k_plus_1_05(bits: int, k: float) -> None:
    weight = 0.07 * torch.randn(200, 2000, generator=torch.Generator().manual_seed(1))
    share = torch.bincount(quantize(weight, Grid(bits, k)).levels.flatten().int() + 128).double() / weight.numel()
    entropy = float(torch.special.entr(share).sum()) / math.log(2)
    assert entropy == pytest.approx(bits - math.log2(k) + 1.05, abs=0.06)


def test_zero_rows_stay_zero_and_constant_rows_survive() -> None:
    weight = torch.stack([torch.zeros(32), torch.full((32,), -3.0)])
    for grid in (Grid(4), Grid(8, 4.0)):
        restored = quantize(weight, grid).dequantize()
        assert not restored[0].any()
        assert torch.allclose(restored[1], weight[1], rtol=0.02)


def test_rows_are_vectors_along_the_last_dimension_unless_it_is_short() -> None:
    assert rows_of(torch.empty(2, 4, 32, 32)).shape == (256, 32)
    assert rows_of(torch.empty(128, 64, 3)).shape == (128, 192)
    assert rows_of(torch.empty(7)).shape == (1, 7)


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(HRSError, match="not finite"):
        quantize(torch.tensor([[1.0, math.nan]]), Grid(8))
    with pytest.raises(HRSError, match="bits must lie between 4 and 8, got 3"):
        Grid(3)
    with pytest.raises(HRSError, match="k must be above 0"):
        Grid(8, -1.0)


# ---- GPTQ ------------------------------------------------------------------------------------------------------------


def test_gptq_with_uncorrelated_inputs_is_rounding_to_nearest() -> None:
    weight = torch.randn(24, 200, generator=torch.Generator().manual_seed(0))
    nearest, calibrated = quantize(weight, Grid(5)), quantize_calibrated(weight, Grid(5), torch.eye(200).double())
    assert torch.equal(nearest.scales, calibrated.scales)
    # Nearest in float64 and in float32 differ only where a weight lies on the border.
    assert (nearest.levels != calibrated.levels).float().mean() < 1e-3


@pytest.mark.parametrize("bits", [4, 6])
def test_gptq_halves_the_output_error_on_correlated_inputs(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 40, generator=generator) @ torch.randn(40, 160, generator=generator)
    inputs += 0.3 * torch.randn(inputs.shape, generator=generator)
    weight = torch.randn(64, 160, generator=generator)
    hessian = inputs.double().T @ inputs.double() / len(inputs)

    def output_error(restored: torch.Tensor) -> float:
        return float((inputs @ (restored - weight).T).square().mean())

    nearest = output_error(quantize(weight, Grid(bits)).dequantize())
    calibrated = output_error(quantize_calibrated(weight, Grid(bits), hessian).dequantize())
    assert calibrated < 0.5 * nearest


def test_gptq_survives_inputs_that_calibration_never_saw() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    hessian = torch.zeros(32, 32, dtype=torch.float64)
    hessian[:4, :4] = 1.0
    for moments in (hessian, torch.zeros_like(hessian)):
        restored = quantize_calibrated(weight, Grid(8), moments).dequantize()
        assert (restored - weight)[:, 4:].abs().max() <= weight.abs().max() / 127
