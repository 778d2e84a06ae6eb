"""Auxiliary objectives beside next-token prediction, and how their weights are found."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.errors import HRSError

PLACEHOLDER_WEIGHTS = {"hub": 0.1, "entropy": 0.01, "recon": 0.1}
"""Those of the losses whose place they take."""


class LossScales(nn.Module):
    """A learned factor for each of several already weighted losses.

    ``learned``: homoscedastic uncertainty (Kendall et al. 2018), exp(s) L - w s with s starting at ln w. It has a
    minimum, exp(s) = w / L: a loss of size 1 keeps its weight, a larger one is scaled down. Needs losses >= 0, so a
    negative entropy must come with its constant (1 - H / ln n).

    ``original``: exp(s) L - 0.001 s. Its minimum exp(s) = 0.001 / L is far from any start, and does not exist for the
    negative entropy loss: within a training run s only drifts, at the speed of the optimiser (the control that
    the original lacked: with constant signs the same values appear without any data).

    Args:
        weights: starting weight of each loss by name.
        original: the second form.
    """

    ORIGINAL_PULL = 0.001

    def __init__(self, weights: Mapping[str, float], *, original: bool) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.original = original
        self.raw = nn.ParameterDict({name: nn.Parameter(torch.tensor(math.log(w))) for name, w in weights.items()})

    def forward(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted scalar ``losses``, those that have a factor scaled by it, and the pull on the factors."""
        scaled = dict(losses)
        pull = torch.zeros((), device=next(iter(self.raw.values())).device)
        for name, raw in self.raw.items():
            if name in losses:
                scaled[name] = losses[name] / self.weights[name] * raw.exp()
            pull = pull - (self.ORIGINAL_PULL if self.original else self.weights[name]) * raw
        return scaled | {"loss_scales": pull}


class PlaceholderLosses(nn.Module):
    """Three losses without meaning on the mean final state, one in the place of each learned weight's loss.

    They ask whether learned weights help because of what they weigh. Unweighted:

    - ``hub``: squared distance of a d -> 8 projection from a random unit vector that never changes;
    - ``entropy``: minus the normalised entropy of a d -> 4 softmax;
    - ``recon``: squared distance between two d -> 16 projections.
    """

    target: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.hub = nn.Linear(d_model, 8, bias=False)
        self.entropy = nn.Linear(d_model, 4, bias=False)
        self.recon = nn.ModuleList(nn.Linear(d_model, 16, bias=False) for _ in range(2))
        self.register_buffer("target", F.normalize(torch.randn(8), dim=0))

    def forward(self, pooled: Tensor) -> dict[str, Tensor]:
        """Scalar losses by name of mean states [B, d]."""
        shares = self.entropy(pooled).softmax(dim=-1)  # [B, 4]
        entropy = -(shares * shares.clamp_min(1e-9).log()).sum(dim=-1).mean()
        first, second = (projection(pooled) for projection in self.recon)
        return {
            "hub": (self.hub(pooled) - self.target).square().mean(),
            "entropy": -entropy / math.log(4),
            "recon": (first - second).square().mean(),
        }


class CategoryHead(nn.Linear):
    """The topic of a window from the mean of its final states: one linear layer with bias."""

    def loss(self, logits: Tensor, category: Tensor) -> Tensor:
        """Mean cross-entropy, scalar, of logits [B, C] against topics [B]; those of -1 do not count, 0 if all are."""
        known = category >= 0
        nats = F.cross_entropy(logits.float(), category.clamp_min(0), reduction="none")
        return (nats * known).sum() / known.sum().clamp_min(1)


class AuxiliaryObjectives(nn.Module):
    """What a model is asked for besides the next token, on the mean of a window's final states.

    The mean sees the whole window; it names the window or feeds a loss, and never reaches a prediction.

    Raises:
        HRSError: if loss weights are to be learned and there is no such loss.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        category = config.category
        self.category_weight = category.weight
        self.category = CategoryHead(config.d_model, category.n_classes) if category.enabled else None
        self.placeholders = PlaceholderLosses(config.d_model) if config.placeholder_losses else None
        self.scales = None
        if config.loss_scales != "fixed":
            self.scales = LossScales(_learned_weights(config), original=config.loss_scales == "original")

    def category_logits(self, pooled: Tensor) -> Tensor | None:
        """Scores of topics [B, C] for mean states [B, d]; None without a head."""
        return None if self.category is None else self.category(pooled)

    def losses(
        self, losses: Mapping[str, Tensor], pooled: Tensor, logits: Tensor | None, category: Tensor | None
    ) -> dict[str, Tensor]:
        """All weighted scalar losses by name.

        Args:
            losses: those of the layers, weighted.
            pooled: mean final states [B, d].
            logits: what :meth:`category_logits` gave.
            category: topics [B], -1 for none; None if they are not known.
        """
        every = dict(losses)
        if self.placeholders is not None:
            every |= {name: PLACEHOLDER_WEIGHTS[name] * loss for name, loss in self.placeholders(pooled).items()}
        if self.scales is not None:
            if "entropy" in every and not self.scales.original:
                every["entropy"] = every["entropy"] + self.scales.weights["entropy"]  # 1 - H / ln n, not below 0
            every = self.scales(every)
        if self.category is not None and logits is not None:
            unknown = logits.new_full((len(logits),), -1, dtype=torch.int64)
            loss = self.category.loss(logits, unknown if category is None else category)
            every["category"] = self.category_weight * loss
        return every


def _learned_weights(config: ModelConfig) -> dict[str, float]:
    """Starting weights of the losses that the original learned the weights of: routing and reconstruction, or their
    placeholders."""
    weights = dict(PLACEHOLDER_WEIGHTS) if config.placeholder_losses else {}
    if config.routed and not config.placeholder_losses:
        weights["hub" if config.router.hub_exponent > 0 else "balance"] = config.router.balance_weight
        weights["entropy"] = config.router.entropy_weight
    if config.engram.kind not in ("none", "memory", "retrieved") and not config.placeholder_losses:
        weights["recon"] = config.engram.recon_weight
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if not weights:
        raise HRSError(
            f"loss_scales={config.loss_scales} has no loss to scale: it needs tiers, engrams or placeholder_losses"
        )
    return weights
