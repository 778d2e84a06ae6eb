"""AdamW over parameter groups: role x (decayed, not, or lazily updated). Loshchilov & Hutter 2019."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hrs.config import OptimizerConfig
from hrs.models import LanguageModel
from hrs.training.lazy_adamw import LazyAdamW, coalesced


@runtime_checkable
class ExpertTables(Protocol):
    """A module with two tables [rows, width] of which a forward pass reads some rows."""

    down: nn.Parameter
    up: nn.Parameter
    sparse_gradients: bool
    """Whether their gradients are sparse COO tensors of the rows that were read."""


def build_optimizer(model: LanguageModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW whose groups carry their role under the key ``role``; rates are set by :func:`set_rates`.

    Only matrices are decayed, unless ``decay_vectors``: decay of a norm's gain or of a scalar gate pulls the function
    itself towards zero.

    ``config.expert_updates`` decides how every :class:`ExpertTables` module of the model is trained: its
    ``sparse_gradients`` is set accordingly. Lazily updated tables have groups of their own, in which ``lazy`` is True;
    the optimiser is then a :class:`hrs.training.lazy_adamw.LazyAdamW`.
    """
    roles = model.parameter_groups()
    _account(model, roles)
    lazy = config.expert_updates == "lazy"
    tables = _expert_tables(model, sparse_gradients=lazy)
    groups: list[dict[str, Any]] = []
    for role, parameters in roles.items():
        lazily = [p for p in parameters if lazy and id(p) in tables]
        dense = [p for p in parameters if not lazy or id(p) not in tables]
        decayed = [p for p in dense if p.ndim >= 2 or config.decay_vectors]
        kept = [p for p in dense if p.ndim < 2 and not config.decay_vectors]
        for members, decay in ((decayed, config.weight_decay), (kept, 0.0)):
            if members:
                groups.append({"params": members, "role": role, "weight_decay": decay})
        if lazily:
            groups.append({"params": lazily, "role": role, "weight_decay": config.weight_decay, "lazy": True})
    betas = (config.beta1, config.beta2)
    if lazy:
        return LazyAdamW(groups, lr=0.0, betas=betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)


def _expert_tables(model: nn.Module, *, sparse_gradients: bool) -> set[int]:
    """Make all expert tables of ``model`` give gradients of one kind; ids of the tables."""
    tables: set[int] = set()
    for module in model.modules():
        if isinstance(module, ExpertTables):
            module.sparse_gradients = sparse_gradients
            tables |= {id(module.down), id(module.up)}
    return tables


def _account(model: LanguageModel, roles: Mapping[str, list[nn.Parameter]]) -> None:
    """Every parameter belongs to exactly one role: one left out would silently never learn."""
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [id(p) for parameters in roles.values() for p in parameters]
    missing = [name for key, name in names.items() if key not in set(grouped)]
    assert not missing, f"parameter_groups() leaves out {', '.join(missing)}"
    assert len(grouped) == len(set(grouped)) == len(names), "parameter_groups() names a parameter twice, or a stranger"


def set_rates(optimizer: torch.optim.Optimizer, lr: float, multipliers: Mapping[str, float]) -> None:
    """Set every group's learning rate to ``lr`` times its role's multiplier, 1 where none is named."""
    for group in optimizer.param_groups:
        group["lr"] = lr * multipliers.get(group["role"], 1.0)


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Global L2 norm, scalar, of the gradients of everything that learns in this phase.

    Sparse gradients are coalesced on the way, and stay so.
    """
    return torch.nn.utils.get_total_norm([_elements(p) for p in _learning(optimizer)], foreach=True)


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float, norm: Tensor) -> None:
    """Scale the gradients in place so that their global ``norm`` is at most ``limit``."""
    learning = _learning(optimizer)
    dense = [p for p in learning if p.grad is not None and not p.grad.is_sparse]
    torch.nn.utils.clip_grads_with_norm_(dense, limit, norm, foreach=True)
    for parameter in learning:
        if parameter.grad is not None and parameter.grad.is_sparse:
            values = _elements(parameter)
            values.mul_(torch.clamp(limit / (norm + 1e-6), max=1.0).to(values.device))  # as torch does above


def _elements(parameter: nn.Parameter) -> Tensor:
    """The gradient; of a sparse one the values [n, width], which share its memory."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = coalesced(parameter.grad)
    return parameter.grad.values()


def _learning(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
