"""AdamW over parameter groups: role x (decayed or not). Loshchilov & Hutter 2019."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hrs.config import OptimizerConfig
from hrs.models import LanguageModel


def build_optimizer(model: LanguageModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW whose groups carry their role under the key ``role``; rates are set by :func:`set_rates`.

    Only matrices are decayed, unless ``decay_vectors``: decay of a norm's gain or of a scalar gate pulls the function
    itself towards zero.
    """
    roles = model.parameter_groups()
    _account(model, roles)
    groups = []
    for role, parameters in roles.items():
        decayed = [p for p in parameters if p.ndim >= 2 or config.decay_vectors]
        kept = [p for p in parameters if p.ndim < 2 and not config.decay_vectors]
        for members, decay in ((decayed, config.weight_decay), (kept, 0.0)):
            if members:
                groups.append({"params": members, "role": role, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


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
    """Global L2 norm, scalar, of the gradients of everything that learns in this phase."""
    return torch.nn.utils.get_total_norm([p.grad for p in _learning(optimizer) if p.grad is not None], foreach=True)


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float, norm: Tensor) -> None:
    """Scale the gradients in place so that their global ``norm`` is at most ``limit``."""
    torch.nn.utils.clip_grads_with_norm_(_learning(optimizer), limit, norm, foreach=True)


def _learning(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
