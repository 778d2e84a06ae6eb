"""The Triton kernel of product-key experts: on a GPU, or through Triton's interpreter; and what happens without it."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hrs.gpu import has_gpu
from hrs.nn import expert_kernels
from hrs.nn.expert_kernels import gathered_dot, triton_works
from hrs.nn.expert_triton import triton_dot

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda", 0) if has_gpu() else torch.device("cpu")

# Products of w numbers are added in float32, in another order than the reference in float64: at most w rounding errors
# of 2^-24 each of the sum of magnitudes. Half precision rounds the result once; Triton's interpreter cuts float32 to
# bfloat16 where a GPU rounds it, so the whole distance of two neighbours counts.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


def draw(rows: int, choices: int, width: int, dtype: torch.dtype, n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * choices * width)
    x, table = (torch.randn(m, width, generator=generator).to(DEVICE, dtype) for m in (rows, n))
    return x, table, torch.randint(n, (rows, choices), generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(3, 16, 32), (5, 20, 200), (4, 1, 7), (2, 17, 1), (1, 3, 129)])
def test_kernel_equals_gathering(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, table, indices = draw(*shape, dtype)
    found = triton_dot(x, table, indices)
    products = x.double()[:, None] * table.double()[indices]  # [R, K, w]
    assert found.dtype is dtype and found.shape == indices.shape
    unit = ROUNDING[torch.float64 if dtype is torch.float64 else torch.float32]
    bound = shape[2] * unit * products.abs().sum(-1) + ROUNDING[dtype] * products.sum(-1).abs()
    assert bool(((found.double() - products.sum(-1)).abs() <= bound).all())


def test_a_row_may_choose_an_expert_twice_and_rows_the_last_one() -> None:
    x, table, indices = draw(3, 4, 8, torch.float32)
    indices[:, 1], indices[:, 3] = indices[:, 0], len(table) - 1
    torch.testing.assert_close(triton_dot(x, table, indices), gathered_dot(x, table, indices), rtol=1e-5, atol=1e-5)


def test_operands_need_not_be_contiguous() -> None:
    x, table, indices = draw(4, 6, 8, torch.float32)
    strided = triton_dot(x.t().contiguous().t(), table.t().contiguous().t(), indices.t().contiguous().t())
    assert torch.equal(strided, triton_dot(x, table, indices))


def test_a_row_depends_on_that_row_alone() -> None:
    x, table, indices = draw(6, 20, 33, torch.float32)
    whole = triton_dot(x, table, indices)
    assert torch.equal(torch.cat([triton_dot(x[i : i + 1], table, indices[i : i + 1]) for i in range(6)]), whole)


# ---- without it ------------------------------------------------------------------------------------------------------


def test_a_triton_that_works_is_used_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    triton_works.cache_clear()
    assert triton_works(DEVICE) and caplog.records == []


def test_a_triton_that_cannot_launch_is_told_once_and_done_without(caplog: pytest.LogCaptureFixture) -> None:
    """As on a machine without a C compiler: the first launch fails."""
    triton_works.cache_clear()
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("hrs.nn.expert_triton.triton_dot", no_compiler)
        assert not triton_works(DEVICE) and not triton_works(DEVICE)
    triton_works.cache_clear()
    (record,) = caplog.records
    assert "Failed to find C compiler" in record.getMessage() and "apt install gcc" in record.getMessage()


def no_compiler(*_: Tensor) -> Tensor:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nand more lines")


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUDA error: an illegal memory access was encountered"])
def test_a_gpu_in_trouble_is_not_taken_for_a_missing_compiler(text: str) -> None:
    def failing(*_: Tensor) -> Tensor:
        raise RuntimeError(text)

    triton_works.cache_clear()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match=text):
        patch.setattr("hrs.nn.expert_triton.triton_dot", failing)
        triton_works(DEVICE)
    triton_works.cache_clear()


@pytest.mark.skipif(has_gpu(), reason="on a GPU Triton does launch")
def test_a_real_launch_that_fails_falls_back() -> None:
    """Without the interpreter and without a GPU Triton finds no driver, one more reason for which a launch fails."""
    code = (
        "import torch; from hrs.nn.expert_kernels import triton_works; "
        "print(triton_works(torch.device('cpu')), triton_works(torch.device('cpu')))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
    assert done.stderr.count("Triton cannot be used on cpu (") == 1


def test_dot_on_a_gpu_takes_the_kernel_only_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice that :func:`dot` makes, with tensors that say that they are on a GPU."""

    class OnGpu(Tensor):
        is_cuda = True

    x, table, indices = draw(2, 3, 4, torch.float32)
    chosen = []
    monkeypatch.setattr("hrs.nn.expert_triton.triton_dot", lambda *_: chosen.append("triton"))
    monkeypatch.setattr(expert_kernels, "sampled_dot", lambda *_: chosen.append("other"))
    for works in (True, False):
        monkeypatch.setattr(expert_kernels, "triton_works", lambda _, works=works: works)
        expert_kernels.dot(x.as_subclass(OnGpu), table, indices)
    assert chosen == ["triton", "other"]
