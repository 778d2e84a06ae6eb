"""How a query is compared with a key: the score before the softmax.

Every kernel has an explicit ``score`` that makes the whole matrix of queries and keys. Those that are a scaled dot
product of *features* of the two, up to a term that is the same for all keys of a query and so drops out of the softmax,
are :class:`ProductKernel`; only these can run through fused attention, which never makes that matrix. Shapes: B batch,
H heads, n queries, S keys, F features.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig

_SMALLEST_RANGE = 1e-6
_ELEMENTS_AT_ONCE = 2**22


class Kernel(nn.Module, ABC):
    """A score for every pair of a query and a key."""

    @abstractmethod
    def score(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        """Scores [B, H, n, S] of queries [B, H, n, d_head] and keys [B, H, S, d_head], higher for a better match.

        Args:
            visible: [n, S], which keys a query may see. Scores of the others mean nothing; no score depends on them.
        """


class ProductKernel(Kernel):
    """``scale`` times the dot product of a query's and a key's features, plus what depends on the query alone."""

    scale: float

    @abstractmethod
    def queries(self, q: Tensor) -> Tensor:
        """Features [B, H, n, F] of queries [B, H, n, d_head]."""

    @abstractmethod
    def keys(self, k: Tensor) -> Tensor:
        """Features [B, H, S, F] of keys [B, H, S, d_head]."""

    def score(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return self.scale * self.queries(q) @ self.keys(k).mT


# ---- products --------------------------------------------------------------------------------------------------------


class Dot(ProductKernel):
    """q.k / sqrt(d_head) (Vaswani et al. 2017)."""

    def __init__(self, d_head: int) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(d_head)

    def queries(self, q: Tensor) -> Tensor:
        return q

    def keys(self, k: Tensor) -> Tensor:
        return k


class Exponential(ProductKernel):
    """-|q - k|^2 / d_head: the softmax of it weighs keys by a Gaussian of their distance.

    As |q|^2 is the same for all keys of a query, (2 / d_head) * (q.k - |k|^2 / 2) gives the same weights, and |k|^2 / 2
    becomes a further coordinate of the key.
    """

    def __init__(self, d_head: int) -> None:
        super().__init__()
        self.d_head = d_head
        self.scale = 2 / d_head

    def queries(self, q: Tensor) -> Tensor:
        return torch.cat((q, q.new_full((*q.shape[:-1], 2), -1.0)), dim=-1)

    def keys(self, k: Tensor) -> Tensor:
        half_square = k.to(torch.promote_types(k.dtype, torch.float32)).square().sum(dim=-1) / 2
        return torch.cat((k, coarse_and_rest(half_square).to(k.dtype)), dim=-1)

    def score(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return -_squared_distance(q, k) / self.d_head


class LearnedFeatures(ProductKernel):
    """The kernel ``mlp``: GELU(W_q q + b_q) . GELU(W_k k + b_k) / sqrt(features), learned, one map for all heads."""

    def __init__(self, d_head: int, n_features: int) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(n_features)
        # Bare parameters, drawn like nn.Linear's: models draw every nn.Linear anew, N(0, 0.02), and with a nonlinearity
        # on both sides scores and gradients would start at 1e-4.
        bound = 1 / math.sqrt(d_head)
        self.query_weight = nn.Parameter(torch.empty(n_features, d_head).uniform_(-bound, bound))
        self.query_bias = nn.Parameter(torch.empty(n_features).uniform_(-bound, bound))
        self.key_weight = nn.Parameter(torch.empty(n_features, d_head).uniform_(-bound, bound))
        self.key_bias = nn.Parameter(torch.empty(n_features).uniform_(-bound, bound))

    def queries(self, q: Tensor) -> Tensor:
        return F.gelu(F.linear(q, self.query_weight, self.query_bias))

    def keys(self, k: Tensor) -> Tensor:
        return F.gelu(F.linear(k, self.key_weight, self.key_bias))


class RandomProjection(ProductKernel):
    """ReLU(P_q q) . ReLU(P_k k) / sqrt(features) with projections per head that are drawn once, N(0, 0.1), and frozen.

    They belong to the state dict: another draw is another model.
    """

    query_projection: Tensor
    key_projection: Tensor

    def __init__(self, d_head: int, n_heads: int, n_features: int) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(n_features)
        for name in ("query_projection", "key_projection"):
            self.register_buffer(name, 0.1 * torch.randn(n_heads, d_head, n_features))

    def queries(self, q: Tensor) -> Tensor:
        return F.relu(q @ self.query_projection)

    def keys(self, k: Tensor) -> Tensor:
        return F.relu(k @ self.key_projection)


# ---- others ----------------------------------------------------------------------------------------------------------


class L1(Kernel):
    """-|q - k|_1 / d_head."""

    def score(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return -torch.cdist(q, k, p=1.0) / q.shape[-1]


class SinProduct(Kernel):
    """sum_i sin(q_i k_i)."""

    def score(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return _SumOfSines.apply(q, k)


class SoftRank(Kernel):
    """-d_head * (D - min D) / (max D - min D) with D = |q - k|^2: from 0 for the nearest to -d_head for the farthest.

    The original took minimum and maximum over the whole row of the matrix, later tokens included: an earlier token's
    attention then tells how far away the future lies, a leak behind a causal mask. Here both are taken over the keys
    that the query sees.
    """

    def score(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        distance = _squared_distance(q, k)
        hidden = visible.logical_not()
        nearest = distance.masked_fill(hidden, math.inf).amin(dim=-1, keepdim=True)
        farthest = distance.masked_fill(hidden, -math.inf).amax(dim=-1, keepdim=True)
        return -q.shape[-1] * (distance - nearest) / (farthest - nearest + _SMALLEST_RANGE)


class _SumOfSines(torch.autograd.Function):
    """Sums over a few coordinates at a time, forward and backward: autograd would keep a [B, H, n, S] for each."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        score = q.new_zeros(*q.shape[:-1], k.shape[-2])
        for part in _parts(q, k):
            score += _outer(q, k, part).sin_().sum(dim=-3)
        return score

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
        for part in _parts(q, k):
            slope = _outer(q, k, part).cos_().mul_(grad_outputs[0].unsqueeze(-3))  # [B, H, f, n, S]
            grad_q[..., part] = (slope @ k.mT[..., part, :].unsqueeze(-1)).squeeze(-1).mT
            grad_k[..., part] = (slope.mT @ q.mT[..., part, :].unsqueeze(-1)).squeeze(-1).mT
        return grad_q, grad_k


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    """Runs of coordinates whose matrices [B, H, n, S] together have some four million elements."""
    size = max(1, _ELEMENTS_AT_ONCE // max(1, q[..., 0].numel() * k.shape[-2]))
    return [slice(start, start + size) for start in range(0, q.shape[-1], size)]


def _outer(q: Tensor, k: Tensor, part: slice) -> Tensor:
    """Products q_i k_i [B, H, f, n, S] for the coordinates of ``part``."""
    return q.mT[..., part, :].unsqueeze(-1) * k.mT[..., part, :].unsqueeze(-2)


def _squared_distance(q: Tensor, k: Tensor) -> Tensor:
    """|q - k|^2, [B, H, n, S]."""
    return q.square().sum(dim=-1).unsqueeze(-1) + k.square().sum(dim=-1).unsqueeze(-2) - 2 * q @ k.mT


# ---- use -------------------------------------------------------------------------------------------------------------


def build_kernel(config: ModelConfig) -> Kernel:
    """The kernel that ``config.attention.kernel`` names; draws from the global torch generator."""
    d_head, n_features = config.d_model // config.n_heads, config.attention.features
    match config.attention.kernel:
        case "dot":
            return Dot(d_head)
        case "exponential":
            return Exponential(d_head)
        case "mlp":
            return LearnedFeatures(d_head, n_features)
        case "random_projection":
            return RandomProjection(d_head, config.n_heads, n_features)
        case "l1":
            return L1()
        case "sin_product":
            return SinProduct()
        case "soft_rank":
            return SoftRank()


def coarse_and_rest(x: Tensor) -> Tensor:
    """[...] to [..., 2] with the sum ``x``; the first is exact in bfloat16, and both together keep twice its digits."""
    coarse = x.detach().to(torch.bfloat16).to(x.dtype)
    return torch.stack((coarse, x - coarse), dim=-1)


def attend_by_scores(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    bias: Tensor | None = None,
    query_scale: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention through the whole matrix of scores, in float32 at least: distances cancel badly in half precision.

    Args:
        q: [B, H, n, d_head]; ``k``: [B, H, S, d_head]; ``v``: [B, H, S, d_value].
        visible: [n, S].
        bias: [H, n, S], added to the scaled scores.
        query_scale: [B, H, n], factor of a query's scores.
        dropout: probability that a weight is zero.

    Returns:
        [B, H, n, d_value], in the type of ``v``.
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        score = kernel.score(q.to(wide), k.to(wide), visible)
        if query_scale is not None:
            score = score * query_scale.to(wide).unsqueeze(-1)
        if bias is not None:
            score = score + bias.to(wide)
        weights = F.dropout(score.masked_fill(visible.logical_not(), -math.inf).softmax(dim=-1), dropout)
        return (weights @ v.to(wide)).to(v.dtype)
