"""Matrix products of float32 on the CPU by oneDNN, where that is faster than torch's default, MKL.

MKL takes AVX-512 on Intel's processors only; on others that have it, it multiplies with half their width. oneDNN asks
the processor what it can do, whoever made it, and torch ships both. Which of the two multiplies follows from the
machine and the shapes alone, so that a run is repeated to the last bit. ``torch.backends.mkldnn.flags(enabled=False)``
leaves everything to torch.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from hrs.nn.eager import on_eager_cpu

FEWEST_MULTIPLICATIONS = 2**21
"""Below, a product takes less time than is gained: oneDNN's own start takes 5 to 10 microseconds."""
FEWEST_ROWS = 8
"""Products with thinner matrices only read memory, which MKL does better."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def mkl_is_slow() -> bool:
    """Return True on a processor that has AVX-512 but where MKL does not use it."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not (capabilities.get("avx512_f") and torch.backends.mkl.is_available() and _HAS_ONEDNN):
        return False
    return "intel" not in str(capabilities.get("cpu_name", "intel")).lower()


def by_onednn(x: Tensor, n_columns: int) -> bool:
    """Return True if oneDNN multiplies ``x`` [..., k] by a matrix [k, ``n_columns``]."""
    if not on_eager_cpu(x) or x.dtype is not torch.float32 or not mkl_is_slow():
        return False
    width = x.shape[-1]
    large = x.numel() * n_columns >= FEWEST_MULTIPLICATIONS
    return large and min(width, n_columns, x.numel() // width) >= FEWEST_ROWS and bool(torch.backends.mkldnn.enabled)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return x @ matrix of x [..., k] and matrix [k, n], of any strides; for code that takes its own gradients."""
    return _multiply(x, matrix.t()) if by_onednn(x, matrix.shape[1]) else x @ matrix


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight^T + bias, as ``torch.nn.functional.linear``, differentiable any number of times."""
    if by_onednn(x, len(weight)) and weight.dtype is x.dtype and not torch.is_autocast_enabled("cpu"):
        result: Tensor = _Linear.apply(x, weight, bias)
        return result
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return linear(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.t()) if wants_x else None,
            linear(rows.t(), x.flatten(0, -2).t()) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight^T + bias, contiguous."""
    # The operator that torch.compile puts in the place of linear layers on the CPU. It copies its first operand if that
    # is transposed, as both are in the gradient of a weight: let it be the smaller one.
    multiply = torch.ops.mkldnn._linear_pointwise
    result: Tensor
    if bias is None and x.ndim == 2 and x.t().is_contiguous() and weight.numel() < x.numel():
        result = multiply(weight, x, None, "none", [], "").t().contiguous()
    else:
        # For a weight with gaps between its rows oneDNN has only its reference code, a hundred times slower.
        dense = weight.is_contiguous() or weight.t().is_contiguous()
        result = multiply(x, weight if dense else weight.contiguous(), bias, "none", [], "")
    return result


if _HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]
