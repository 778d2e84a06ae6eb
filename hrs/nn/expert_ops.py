"""Differentiable operators on chosen rows of large tables, and mixtures of single-neuron experts made of them.

Two operators are each other's derivative: ``chosen_dot`` (rows with chosen rows of a table) and ``chosen_sum``
(weighted sums of chosen rows). For both, what the table gets back is a sum over all pairs (row, choice) grouped by
table row. Nothing of shape [R, K, w] exists in the forward or the backward pass. They are operators of torch's library,
so they work on fake tensors, under autocast (in float32) and in compiled graphs.

A table's ``gradient`` is ``dense``; or ``sparse``, a coalesced sparse tensor of the rows that were chosen, in ascending
order (autograd forgets the coalesced mark when it stores it in ``.grad``, though the rows stay as they are); or
``padded``, for compiled graphs, whose shapes must not depend on data: sparse with zeros for row 0 added, not coalesced.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.nn import expert_kernels


@torch.library.custom_op("hrs::chosen_dot", mutates_args=())
def chosen_dot(x: Tensor, table: Tensor, indices: Tensor, gradient: str = "dense") -> Tensor:
    """x[r] . table[indices[r, j]], [R, K], of x [R, w], table [N, w] and indices [R, K] int64."""
    return expert_kernels.dot(x, table, indices)


@torch.library.custom_op("hrs::chosen_sum", mutates_args=())
def chosen_sum(weights: Tensor, table: Tensor, indices: Tensor, gradient: str = "dense") -> Tensor:
    """Sum over j of weights[r, j] * table[indices[r, j]], [R, w], of weights [R, K]."""
    return expert_kernels.weighted_sum(weights, table, indices)


@torch.library.custom_op("hrs::table_gradient", mutates_args=())
def table_gradient(weights: Tensor, x: Tensor, indices: Tensor, n_rows: int) -> Tensor:
    """Row e is the sum of weights[r, j] * x[r] over all (r, j) with indices[r, j] = e: [n_rows, w]; no gradient."""
    return expert_kernels.table_gradient(weights, x, indices, n_rows)


@torch.library.custom_op("hrs::touched_rows", mutates_args=())
def _touched_rows(
    weights: Tensor, x: Tensor, indices: Tensor, n_rows: int, padded: bool = False
) -> tuple[Tensor, Tensor]:
    """``padded`` adds zeros for row 0 up to a length that does not depend on data."""
    rows, values = expert_kernels.touched_rows(weights, x, indices)
    if not padded:
        return rows, values
    missing = min(indices.numel(), n_rows) - len(rows)
    return F.pad(rows, (0, missing)), F.pad(values, (0, 0, 0, missing))


@chosen_dot.register_fake
def _(x: Tensor, table: Tensor, indices: Tensor, gradient: str = "dense") -> Tensor:
    return x.new_empty(indices.shape)


@chosen_sum.register_fake
def _(weights: Tensor, table: Tensor, indices: Tensor, gradient: str = "dense") -> Tensor:
    return weights.new_empty(len(weights), table.shape[1])


@table_gradient.register_fake
def _(weights: Tensor, x: Tensor, indices: Tensor, n_rows: int) -> Tensor:
    return x.new_empty(n_rows, x.shape[1])


@_touched_rows.register_fake
def _(weights: Tensor, x: Tensor, indices: Tensor, n_rows: int, padded: bool = False) -> tuple[Tensor, Tensor]:
    # How many rows are touched is known only from data; memory is planned for the most there can be.
    most = min(indices.numel(), n_rows)
    return indices.new_empty(most), x.new_empty(most, x.shape[1])


def _gradient_of_table(ctx: Any, weights: Tensor, x: Tensor, table: Tensor, indices: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[1]:
        return None
    if ctx.gradient == "dense":
        return table_gradient(weights, x, indices, len(table))
    padded = ctx.gradient == "padded"
    rows, values = _touched_rows(weights, x, indices, len(table), padded)
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, table.shape, is_coalesced=not padded, check_invariants=False
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.gradient = inputs
    ctx.save_for_backward(*tensors)


def _chosen_dot_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, table, indices = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = chosen_sum(grad, table, indices) if ctx.needs_input_grad[0] else None
    return grad_x, _gradient_of_table(ctx, grad, x, table, indices), None, None


def _chosen_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, table, indices = ctx.saved_tensors
    grad = grad.contiguous()
    grad_weights = chosen_dot(grad, table, indices) if ctx.needs_input_grad[0] else None
    return grad_weights, _gradient_of_table(ctx, weights, grad, table, indices), None, None


chosen_dot.register_autograd(_chosen_dot_backward, setup_context=_save)
chosen_sum.register_autograd(_chosen_sum_backward, setup_context=_save)
for _operator in (chosen_dot, chosen_sum):
    for _device in ("cpu", "cuda"):
        _operator.register_autocast(_device, torch.float32)


def mix_experts(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    indices: Tensor,
    weights: Tensor,
    activation: Callable[[Tensor], Tensor],
    *,
    sparse_gradients: bool = False,
) -> Tensor:
    """Sum over j of weights[r, j] * activation(down[e] . x[r]) * up[e] with e = indices[r, j]; [R, w].

    An expert may be chosen more than once by a row.

    Args:
        x: inputs [R, w].
        down: first layers of the experts [N, w].
        up: second layers of the experts [N, w].
        indices: chosen experts [R, K], int64.
        weights: of the chosen experts [R, K].
        activation: of the experts' hidden unit, elementwise.
        sparse_gradients: whether ``down`` and ``up`` get sparse gradients.
    """
    sparse = "padded" if torch.compiler.is_compiling() else "sparse"
    gradient = sparse if sparse_gradients else "dense"
    hidden = activation(chosen_dot(x, down, indices, gradient))
    return chosen_sum(weights * hidden, up, indices, gradient)


def mix_experts_naive(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    indices: Tensor,
    weights: Tensor,
    activation: Callable[[Tensor], Tensor],
    *,
    sparse_gradients: bool = False,
) -> Tensor:
    """:func:`mix_experts` with both layers of every chosen expert copied out, two tensors [R, K, w]: the reference."""
    hidden = activation(torch.einsum("rw,rkw->rk", x, down[indices]))
    return torch.einsum("rk,rkw->rw", weights * hidden, up[indices])
