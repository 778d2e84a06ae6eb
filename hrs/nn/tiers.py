"""Parallel paths of unequal cost that a router mixes, token by token, in place of the MLP.

All tiers are computed for all tokens: routing decides what a token gets, it saves no work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.attention import Attention
from hrs.nn.cache import CachePart, KeyValueSlots, SlotPart, SlotTable, TailCache, TailSlots
from hrs.nn.conv_mixer import CausalConv
from hrs.nn.dropout import Dropout
from hrs.nn.peer import Peer
from hrs.nn.products import Linear
from hrs.nn.router import Router

# Every tier is called as tier(x, positions, cache); those without a memory take no notice of the last two.


class ConvTier(nn.Module):
    """Causal depthwise convolution, normalised; no mixing of channels and no nonlinearity."""

    def __init__(self, d_model: int, kernel: int, *, dropout: float) -> None:
        super().__init__()
        self.conv = CausalConv(d_model, kernel)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def new_cache(self) -> TailCache:
        return self.conv.new_cache()

    def forward(self, x: Tensor, positions: Tensor, cache: TailCache | None = None) -> Tensor:
        return self.dropout(self.norm(self.conv(x, cache)))


class ExpertTier(nn.Module):
    """Top-1 mixture of small experts (Fedus et al. 2022), weighted by the chosen expert's probability.

    All experts are computed and the hidden units of those not chosen set to zero, so the shapes do not depend on the
    routing: a token's result cannot depend on the others in its batch, and nothing waits for the device.
    """

    def __init__(
        self, d_model: int, n_experts: int, expert_hidden: int, *, dropout: float, renormalise_gate: bool
    ) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.renormalise_gate = renormalise_gate
        self.gate = Linear(d_model, n_experts, bias=False)
        self.hidden = Linear(d_model, n_experts * expert_hidden, bias=False)
        self.output = Linear(n_experts * expert_hidden, d_model, bias=False)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def new_cache(self) -> None:
        return None

    def forward(self, x: Tensor, positions: Tensor, cache: None = None) -> Tensor:
        weight, chosen = self.gate(x).softmax(dim=-1).max(dim=-1, keepdim=True)  # [B, T, 1]
        if self.renormalise_gate:
            weight = weight / (weight + 1e-8)
        hidden = F.gelu(self.hidden(x)).unflatten(-1, (self.n_experts, -1))
        # In the type of the hidden units: one in that of x, float32 under autocast, would widen all of them.
        is_chosen = (chosen == torch.arange(self.n_experts, device=x.device)).to(hidden.dtype)  # [B, T, n_experts]
        hidden = hidden * is_chosen.unsqueeze(-1)
        # The weight comes after the norm: in front of it, scale has no effect and the gate would not learn.
        return self.dropout(weight * self.norm(self.output(hidden.flatten(-2))))


class SinkTier(nn.Module):
    """Passes the token on, scaled down; optionally shrinks the residual stream by the share routed here."""

    def __init__(self, *, rescale: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.kappa = nn.Parameter(torch.tensor(0.1)) if rescale else None

    def new_cache(self) -> None:
        return None

    def forward(self, x: Tensor, positions: Tensor, cache: None = None) -> Tensor:
        return self.scale.abs() * x

    def rescale(self, residual: Tensor, share: Tensor) -> Tensor:
        """Residual [B, T, d] times 1 - share * (1 - abs(kappa)), share [B, T, 1]."""
        return residual if self.kappa is None else residual * (1 - share * (1 - self.kappa.abs()))


@dataclass(slots=True)
class TiersCache:
    """What the router and those tiers that look back remember."""

    router: TailCache
    tiers: dict[str, Any]

    def parts(self) -> list[CachePart]:
        """All of it that remembers something, always in one order."""
        return [self.router, *(part for part in self.tiers.values() if part is not None)]

    def slots(self, table: SlotTable) -> "TiersSlots":
        """The same for sequences of unequal length."""
        tiers = {name: None if part is None else part.slots(table) for name, part in self.tiers.items()}
        return TiersSlots(self.router.slots(table), tiers)


@dataclass(slots=True)
class TiersSlots:
    """What the router and those tiers that look back remember of sequences of unequal length."""

    router: TailSlots
    tiers: dict[str, Any]

    def parts(self) -> list[SlotPart]:
        """All of it that remembers something, in the order of :meth:`TiersCache.parts`."""
        return [self.router, *(part for part in self.tiers.values() if part is not None)]


def sparsify(x: Tensor, density: float) -> Tensor:
    """softplus of [..., d] with only the ``density`` share of its largest entries kept, at least one."""
    positive = F.softplus(x)
    kept = positive.topk(max(1, int(density * x.shape[-1])), dim=-1)
    return torch.zeros_like(positive).scatter(-1, kept.indices, kept.values)


class RoutedTiers(nn.Module):
    """The router and its tiers: residual stream + gate * sum_k weight_k * tier_k, then the sink's rescaling.

    With ``tiers.input_density`` below 1 the tiers read a sparse copy of their input (:func:`sparsify`); the router
    always reads the dense one.
    """

    def __init__(self, config: ModelConfig, n_positions: int) -> None:
        super().__init__()
        tiers, d, dropout = config.tiers, config.d_model, config.dropout
        make: dict[str, Callable[[], nn.Module]] = {
            "conv": lambda: ConvTier(d, tiers.conv_kernel, dropout=dropout),
            "expert": lambda: ExpertTier(
                d, tiers.n_experts, tiers.expert_hidden, dropout=dropout, renormalise_gate=tiers.renormalise_gate
            ),
            "peer": lambda: Peer(config.peer, d, dropout=dropout),
            "attention": lambda: Attention(config, n_positions=n_positions),
            "sink": lambda: SinkTier(rescale=tiers.sink_rescale),
        }
        self.tiers = nn.ModuleDict({name: make[name]() for name in tiers.names})
        self.router = Router(config.router, d, len(tiers.names), n_positions)
        self.output_gate = nn.Parameter(torch.full((d,), 0.1))
        self.sink_index = tiers.names.index("sink") if "sink" in tiers.names else None
        self.input_density = tiers.input_density

    def new_cache(self) -> TiersCache:
        caches = {name: None if isinstance(tier, Peer) else tier.new_cache() for name, tier in self.tiers.items()}  # type: ignore[operator]
        return TiersCache(self.router.new_cache(), caches)

    def forward(
        self, residual: Tensor, x: Tensor, positions: Tensor, cache: TiersCache | TiersSlots | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Update the residual stream [B, n, d] from its normalised copy ``x``.

        Returns:
            The new residual stream, the routing weights [B, n, n_tiers], and in eval mode the weight that each expert
            of a ``peer`` tier got, [n_experts].
        """
        routing = self.router(x, None if cache is None else cache.router, positions)
        weights = routing.to(residual.dtype).unsqueeze(-1).unbind(dim=-2)  # n_tiers of [B, n, 1]
        if self.input_density < 1:
            x = sparsify(x, self.input_density)
        mixed, usage = torch.zeros_like(residual), None
        for weight, (name, tier) in zip(weights, self.tiers.items(), strict=True):
            memory = None if cache is None else cache.tiers[name]
            if isinstance(tier, Peer):
                output, usage = tier(x)
            elif isinstance(tier, Attention) and isinstance(memory, KeyValueSlots):
                output = tier.output(tier.step(x, memory))
            else:
                output = tier(x, positions, memory)
            mixed = mixed + weight * output
        residual = residual + self.output_gate * mixed
        if self.sink_index is not None:
            residual = self.tiers["sink"].rescale(residual, weights[self.sink_index])  # type: ignore[operator]
        return residual, routing, usage
