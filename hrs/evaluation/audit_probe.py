"""What the causality audit tries a model with: tokens and their changes, magnified weights, passes without chance."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hrs.models.base import LanguageModel

Pass = Callable[[nn.Module, Tensor], Tensor]
"""From a model and tokens [B, T] to logits [B, T, V]."""
_OPENING = 0.02  # added noise that opens a path which a zero initialisation keeps shut


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditTest:
    """The outcome of one check."""

    name: str
    passed: bool
    detail: str
    """One sentence."""
    positions: tuple[int, ...] = ()
    """Positions whose logits depended on what they must not see; of ``gradient``, the positions that were seen."""
    module: str | None = None
    """Dotted name of the module through which they did; empty for the model's own forward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A float64 model in evaluation mode, and the tokens to try it with."""

    model: LanguageModel
    tokens: Tensor
    """[2, T]"""
    changed: Tensor
    """[2, T], different from ``tokens`` everywhere."""
    seed: int
    frugal: bool = False
    """Make do with ``few_cuts`` for ``cuts``."""

    @property
    def few_cuts(self) -> list[int]:
        """Where suffixes begin, for the dearer checks: the ends and the middle."""
        n = self.tokens.shape[1]
        return sorted({1, n // 2, n - 1})

    @property
    def cuts(self) -> list[int]:
        """Those, their neighbours, the quarters, and three at random."""
        if self.frugal:
            return self.few_cuts
        n = self.tokens.shape[1]
        drawn = torch.randint(1, n, (3,), generator=torch.Generator().manual_seed(self.seed)).tolist()
        more = {2, n // 4, n // 2 - 1, n // 2 + 1, 3 * n // 4, n - 2}
        return sorted(c for c in {*self.few_cuts, *more, *drawn} if 0 < c < n)

    def flipped(self, cut: int) -> Tensor:
        """The tokens with everything from ``cut`` on changed."""
        return torch.cat([self.tokens[:, :cut], self.changed[:, cut:]], dim=1)


# ---- passes ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [B, T, V]."""
    logits: Tensor = model(tokens).logits
    return logits


def training_logits(seed: int) -> Pass:
    """A pass in training mode whose noise depends on nothing but ``seed``, on a copy, as passes may leave state."""

    def run(model: nn.Module, tokens: Tensor) -> Tensor:
        model = copy.deepcopy(model).train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        torch.manual_seed(seed)
        return logits_of(model, tokens)

    return run


def magnified(model: LanguageModel, factor: int, seed: int) -> LanguageModel:
    """The model itself for 1; else a copy with every parameter moved by N(0, 0.02) and multiplied by ``factor``."""
    if factor == 1:
        return model
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise.to(parameter.device), alpha=_OPENING).mul_(factor)
    return model


def moved_positions(first: Tensor, second: Tensor, bound: float = 0.0) -> tuple[int, ...]:
    """Positions at which logits [B, n, V] differ by more than ``bound``. A NaN differs from everything."""
    differs = ~((first - second).abs() <= bound)
    return tuple(differs.any(-1).any(0).nonzero().flatten().tolist())
