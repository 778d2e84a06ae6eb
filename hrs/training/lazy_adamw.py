"""AdamW that updates only the touched rows of chosen tables: lookups of a few rows give sparse gradients.

The rule, for a row with a gradient at step t that was last updated at step s (0 before its first update), k = t - s,
and the group's learning rate lr and decay wd *of step t*:

    m   <- beta1 * beta1^(k-1) * m + (1 - beta1) * g
    v   <- beta2 * beta2^(k-1) * v + (1 - beta2) * g^2
    row <- (1 - lr wd)^k * row - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Steps are counted per table, and only those in which it has a gradient (one without rows counts): like dense AdamW, a
resting table does not age. The moments are those dense AdamW would have, had the row's gradients been the same.
A row touched at every step is updated by the same arithmetic as in dense AdamW. Otherwise the two differ in this:

- A row does not move by its old momentum in the k - 1 steps without a gradient.
- Decay is caught up when the row is next touched. Until then it is read as of its last update, by the forward pass
  whose gradient touches it and by whoever reads a checkpoint: larger by 1 / (1 - lr wd)^(k-1). A row that is never
  touched is never decayed.
- The caught-up decay takes the learning rate of step t for all k steps: exact while the rate is constant, too strong
  after warm-up, too weak at the end of a decay.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.optim.adamw import adamw

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**23}
"""Elements of a table updated at a time, by device type: what stays in a CPU's cache, few kernels on a card. Three
times as many are copied."""


class LazyAdamW(torch.optim.AdamW):
    """Fused AdamW; parameters [rows, width] of groups with ``"lazy": True`` are updated by the rule above.

    As with any fused optimiser of torch, a step changes nothing where the attribute ``found_inf``, a float scalar on
    the device, is 1.

    A lazy parameter takes sparse COO gradients with one sparse dimension, coalesced or not, and dense ones, which touch
    every row. Its state is that of AdamW, ``step``, ``exp_avg`` and ``exp_avg_sq``, and ``row_step``: int32 [rows], the
    step of each row's last update. Sparse gradients are coalesced after every backward pass, so that however many
    micro-batches they come from, they hold no row twice.

    Nothing waits for the device except the coalescing.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        for parameter in lazy_parameters(self):
            parameter.register_post_accumulate_grad_hook(_coalesce_gradient)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of everything that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("lazy")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group.get("lazy") else ():
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["row_step"] = torch.zeros(parameter.shape[0], dtype=torch.int32, device=parameter.device)
        assert parameter.grad is not None
        rows, values = _rows_and_values(parameter.grad)
        width = parameter.shape[1]
        n = max(1, CHUNK_ELEMENTS.get(parameter.device.type, CHUNK_ELEMENTS["cpu"]) // width)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        # Made once: to touch fresh pages for every chunk costs more than the arithmetic.
        copies = parameter.new_empty(3, min(n, len(rows)), width)
        for chunk, gradient in zip(rows.split(n), values.split(n), strict=True):
            _update_rows(parameter, state, chunk, gradient, group, copies[:, : len(chunk)], found_inf)
        state["step"] += 1
        if found_inf is not None:
            state["step"] -= found_inf


def _rows_and_values(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Touched rows [n] and their gradients [n, width]; all rows of a dense gradient."""
    if not gradient.is_sparse:
        return torch.arange(len(gradient), device=gradient.device), gradient
    gradient = coalesced(gradient)
    return gradient.indices()[0], gradient.values()


def _update_rows(
    table: Tensor,
    state: dict[str, Tensor],
    rows: Tensor,
    gradient: Tensor,
    group: dict[str, Any],
    copies: Tensor,
    found_inf: Tensor | None,
) -> None:
    """Update ``rows`` [n], all different, of ``table`` [rows, width] with ``gradient`` [n, width].

    The steps between are caught up on ``copies`` [3, n, width]; the last step is that of torch's fused AdamW.
    """
    (beta1, beta2), lr, weight_decay = group["betas"], group["lr"], group["weight_decay"]
    now = state["step"] + 1
    # In float64: float32 rounds 1 - lr * wd by 3e-8, a thousandth of a usual lr * wd, which the power would keep.
    row_step = state["row_step"].index_select(0, rows)
    between = (now - row_step - 1).double().unsqueeze(1)  # [n, 1]
    if found_inf is not None:
        between = between * (1 - found_inf)
    tensors = (table, state["exp_avg"], state["exp_avg_sq"])
    for tensor, copy, factor in zip(tensors, copies, (1 - lr * weight_decay, beta1, beta2), strict=True):
        torch.index_select(tensor, 0, rows, out=copy)
        copy.mul_(torch.pow(factor, between).to(copy.dtype))
    parameter, exp_avg, exp_avg_sq = copies
    adamw(
        [parameter],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [state["step"].clone()],  # every chunk counts it up in place
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
        found_inf=found_inf,
    )
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.index_copy_(0, rows, copy)
    done = now.to(row_step.dtype).expand(rows.shape)
    if found_inf is not None:
        done = torch.where(found_inf > 0, row_step, done)
    state["row_step"].index_copy_(0, rows, done)


def lazy_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that ``optimizer`` updates lazily."""
    return [p for group in optimizer.param_groups if group.get("lazy") for p in group["params"]]


def coalesced(gradient: Tensor) -> Tensor:
    """A sparse COO gradient with every row at most once, in ascending order.

    Autograd forgets that a gradient was coalesced, and to compare indices is far cheaper than to sort and copy the rows
    again.
    """
    if gradient.is_coalesced() or is_fake(gradient):  # a fake tensor has no indices to compare
        return gradient.coalesce()
    indices, values = gradient._indices(), gradient._values()
    if bool((indices[0, 1:] > indices[0, :-1]).all()):
        return torch.sparse_coo_tensor(indices, values, gradient.shape, is_coalesced=True, check_invariants=False)
    return gradient.coalesce()


def _coalesce_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None and parameter.grad.is_sparse:
        parameter.grad = coalesced(parameter.grad)
