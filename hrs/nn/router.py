"""Soft routing of every token over the tiers, its temporal smoothing, and the losses that shape it."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import RouterConfig
from hrs.nn.cache import TailCache
from hrs.nn.products import Linear

RELATIVE_COST = {"conv": 0.0015, "expert": 0.111, "peer": 0.111, "attention": 0.111, "sink": 0.0002}
"""Cost of a tier as a share of the original's dense layer, for the FLOPs loss. A table, not a measurement."""


class Router(nn.Module):
    """Two-layer router: Gumbel-softmax in training (Jang et al. 2017, never hard), plain softmax in evaluation.

    Temporal routing consistency (TRC) replaces each token's logits by their mean over the last ``trc_window`` tokens.
    """

    temperature: Tensor

    def __init__(self, config: RouterConfig, d_model: int, n_tiers: int, max_seq_len: int) -> None:
        super().__init__()
        self.config = config
        self.trc_window = min(config.trc_window, max_seq_len)
        self.hidden = Linear(d_model, config.hidden, bias=False)
        self.output = Linear(config.hidden, n_tiers, bias=False)
        # A tensor, so that a compiled graph does not depend on its value.
        self.register_buffer("temperature", torch.tensor(config.temperature_start), persistent=False)

    def set_progress(self, fraction: float) -> None:
        """Anneal the training temperature linearly over the first ``temperature_decay_frac`` of training."""
        config = self.config
        done = min(1.0, fraction / config.temperature_decay_frac) if config.temperature_decay_frac > 0 else 1.0
        self.temperature.fill_(config.temperature_start + done * (config.temperature_end - config.temperature_start))

    def new_cache(self) -> TailCache:
        """Remembers the logits that the next tokens' means reach back to."""
        return TailCache(max(self.trc_window - 1, 0))

    def forward(self, x: Tensor, cache: TailCache | None = None, positions: Tensor | None = None) -> Tensor:
        """Routing weights [B, n, n_tiers], positive with sum 1, of normalised tokens [B, n, d].

        ``positions`` [n] or [B, n] are needed with slots alone, whose rows differ in how far they reach back.
        """
        logits = self.output(F.gelu(self.hidden(x)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bf16 is too coarse for the noise
        if self.trc_window > 1:
            logits = self._causal_mean(logits, cache, positions)
        if self.training:
            gumbel = -torch.empty_like(logits).exponential_().log()
            return ((logits + gumbel) / self.temperature).softmax(dim=-1)
        return (logits / self.config.temperature_end).softmax(dim=-1)

    def _causal_mean(self, logits: Tensor, cache: TailCache | None, positions: Tensor | None) -> Tensor:
        n, window = logits.shape[1], self.trc_window
        joined = logits if cache is None else cache.extend(logits)
        known = joined.shape[1] - n  # logits before these, at most window - 1
        sums = F.pad(joined, (0, 0, window - 1 - known, 0)).unfold(1, window, 1).sum(dim=-1)  # [B, n, n_tiers]
        counts = torch.arange(known + 1, known + n + 1, device=logits.device) if positions is None else positions + 1
        return sums / counts.clamp(max=window).unsqueeze(-1)


def routing_statistics(routings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean weights [n_layers, n_tiers] and mean entropy in nats [n_layers] of each layer's weights [B, T, n_tiers]."""
    shares = torch.stack([r.mean(dim=(0, 1)) for r in routings])
    # Clamped inside the logarithm: a weight that underflows to 0 must not give a NaN gradient.
    entropies = torch.stack([-(r * r.clamp_min(1e-9).log()).sum(dim=-1).mean() for r in routings])
    return shares, entropies


def zipf_shares(n: int, exponent: float) -> list[float]:
    """Shares of ranks 1 .. n by Zipf's law, k^-exponent over their sum: one hub, and ever less for the others."""
    weights = [k**-exponent for k in range(1, n + 1)]
    return [weight / sum(weights) for weight in weights]


def routing_losses(
    shares: Tensor, entropies: Tensor, config: RouterConfig, tier_names: Sequence[str]
) -> dict[str, Tensor]:
    """Weighted scalar losses, averaged over layers, from :func:`routing_statistics`.

    ``balance`` is n * sum p_k^2 (1 when uniform), ``entropy`` minus the entropy over ln n (in [-1, 0]), ``flops`` the
    expected relative cost, present only if it has a weight. With a ``hub_exponent``, ``hub`` takes the place of
    ``balance``, and its weight: the squared distance of the shares, largest first, from :func:`zipf_shares`. The
    original's text speaks of a Kullback-Leibler divergence there; its code, and this, do not compute one.
    """
    n_tiers = len(tier_names)
    losses: dict[str, Tensor] = {}
    if config.hub_exponent > 0:
        ranked = shares.sort(dim=-1, descending=True).values  # [n_layers, n_tiers]
        target = _filled(shares, zipf_shares(n_tiers, config.hub_exponent))
        losses["hub"] = config.balance_weight * (ranked - target).square().sum(dim=-1).mean()
    else:
        losses["balance"] = config.balance_weight * n_tiers * shares.square().sum(dim=-1).mean()
    losses["entropy"] = -config.entropy_weight * entropies.mean() / max(math.log(n_tiers), 1e-9)
    if config.flops_weight > 0:
        costs = _filled(shares, [RELATIVE_COST[name] for name in tier_names])
        losses["flops"] = config.flops_weight * (shares @ costs).mean()
    return losses


def _filled(like: Tensor, values: Sequence[float]) -> Tensor:
    """Return ``values`` [k] with the type and device of ``like``, made there: a copy from the host waits for a GPU."""
    return torch.stack([like.new_full((), value) for value in values])
