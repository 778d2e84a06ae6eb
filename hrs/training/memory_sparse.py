"""Let fake tensors carry the sparse gradients of lazily updated tables through a traced step.

Autograd adds fake sparse gradients up to one without rows. Here the gradient that arrives, which on fake tensors has as
many rows as there can be, is kept beside autograd's, merged as a real step merges it, and put in its place. What is
planned is thus the most a step can take: a row for every lookup, up to the whole table.

Only two micro-batches are traced. The gradient of the first stands for the sum of all but the last.
"""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from hrs.training.lazy_adamw import lazy_parameters


def carry_sparse_gradients(optimizer: torch.optim.Optimizer, n_micro_batches: int) -> None:
    """From now on the backward pass leaves whole sparse gradients on the fake tables of ``optimizer``."""
    for table in lazy_parameters(optimizer):
        if is_fake(table):
            _carry(table, max(1, n_micro_batches - 1))


def _carry(table: nn.Parameter, n_before_last: int) -> None:
    arrived: list[Tensor] = []
    kept: list[Tensor] = []

    def keep(gradient: Tensor) -> None:
        if table.grad is None:
            kept.clear()
        arrived.append(gradient)

    def replace(_: Tensor) -> None:
        gradient = arrived.pop()
        if gradient.is_sparse:
            kept[:] = [_merge([kept[0], gradient]) if kept else _merge([gradient] * n_before_last)]
            table.grad = kept[0]

    table.register_hook(keep)
    table.register_post_accumulate_grad_hook(replace)


def _merge(gradients: list[Tensor]) -> Tensor:
    """The sum of coalesced gradients, if they share no row but those they must."""
    if len(gradients) == 1:
        return gradients[0]
    n_rows, shape = sum(len(g._values()) for g in gradients), gradients[0].shape
    # Autograd's sum, and its coalesced copy while the sum is still there.
    _uncoalesced = _rows(gradients[0], min(n_rows, 2 * shape[0]))
    return _rows(gradients[0], min(n_rows, shape[0]))


def _rows(like: Tensor, n: int) -> Tensor:
    """A coalesced gradient of ``n`` rows."""
    indices, values = like._indices().new_empty(1, n), like._values().new_empty(n, *like.shape[1:])
    return torch.sparse_coo_tensor(indices, values, like.shape, is_coalesced=True, check_invariants=False)


def empty_gradient(parameter: nn.Parameter, *, lazy: bool) -> Tensor:
    """A gradient that makes the optimiser create its state: zeros, or for a lazily updated table one without rows."""
    if not lazy:
        return torch.zeros_like(parameter)
    indices, values = torch.empty(1, 0, dtype=torch.int64), parameter.new_empty(0, *parameter.shape[1:])
    return torch.sparse_coo_tensor(indices, values, parameter.shape, is_coalesced=True, check_invariants=False)


def parts(gradient: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold the memory of a gradient."""
    return (gradient._indices(), gradient._values()) if gradient.is_sparse else (gradient,)
