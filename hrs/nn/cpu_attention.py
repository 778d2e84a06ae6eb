"""Causal self-attention with its query, key and value projections, for training on the CPU.

Eager operators lose most of their time around the products there: rotary positions take five passes over strided halves
and a concatenation, autograd fills zeros for every part of the joint projection that it takes apart and joins, and
torch's fused kernel has no dropout, so torch multiplies out and keeps the whole matrix of scores with a slow mask.

- Rotation is one complex product in place. Dimensions i and i + d_head / 2 are made neighbours by permuting the rows of
  the weight, a small matrix, not the activations; queries and keys are permuted alike, so their products stay.
- The gradient of the joint projection is written into one tensor.
- With dropout, scores are made for a few queries at a time over the keys that at least one of them sees.

:class:`hrs.nn.attention.Attention` in plain operators is the reference.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrs.nn.dropout import keep_mask
from hrs.nn.products import product

QUERIES_AT_ONCE = 32
"""Queries scored together under dropout. Few: less is computed of the future, and scores stay in the cache."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def project_and_attend(
    x: Tensor, weight: Tensor, turns: Tensor | None, *, n_heads: int, scale: float, dropout: float
) -> Tensor:
    """Attend causally among the tokens of each sequence.

    Args:
        x: normalised tokens [B, T, d], float32 or float64.
        weight: projection [3 d, d] to queries, keys and values.
        turns: [T, d_head / 2] complex, cos + i sin of each position's angles; None for no rotation. Not differentiated.
        n_heads: H.
        scale: factor of the scores.
        dropout: probability, below 1, that an attention weight is dropped.

    Returns:
        [B, T, d], heads side by side.
    """
    return _Attention.apply(x, weight, turns, n_heads, scale, dropout)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, turns: Tensor | None, n_heads: int, scale: float, dropout: float
    ) -> Tensor:
        ctx.n_heads, ctx.scale, ctx.dropout = n_heads, scale, dropout
        matrix = weight if turns is None else _neighbours(weight, n_heads)
        joint = product(x, matrix.t())  # [B, T, 3 d]
        if turns is not None:
            _complex(joint, n_heads)[:, :, : 2 * n_heads].mul_(turns[:, None])
        q, k, v = _heads(joint, n_heads)
        if dropout:
            attended, saved = _attend_with_dropout(q, k, v, scale, dropout)
        else:
            attended, *rest = _flash(q, k, v, 0.0, True, scale=scale)
            saved = [attended, *rest]
        ctx.save_for_backward(x, matrix, turns, joint, *saved)
        return attended.transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix, turns, joint, *saved = ctx.saved_tensors
        q, k, v = _heads(joint, ctx.n_heads)
        grad = grad.unflatten(2, (ctx.n_heads, -1)).transpose(1, 2)  # [B, H, T, d_head]
        if ctx.dropout:
            parts = _attend_with_dropout_backward(grad, q, k, v, saved, ctx.scale, ctx.dropout)
        else:
            parts = _flash_backward(grad, q, k, v, *saved, 0.0, True, scale=ctx.scale)
        grad_joint = torch.empty_like(joint)
        for target, part in zip(_heads(grad_joint, ctx.n_heads), parts, strict=True):
            target.copy_(part)
        if turns is not None:
            _complex(grad_joint, ctx.n_heads)[:, :, : 2 * ctx.n_heads].mul_(turns.conj().resolve_conj()[:, None])
        grad_x = product(grad_joint, matrix) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = product(grad_joint.flatten(0, 1).t(), x.flatten(0, 1))
            if turns is not None:
                grad_weight = _halves(grad_weight, ctx.n_heads)
        return grad_x, grad_weight, None, None, None, None


# ---- layout ----------------------------------------------------------------------------------------------------------


def _neighbours(weight: Tensor, n_heads: int) -> Tensor:
    """Return [3 d, d] with rows i and i + d_head / 2 of each head of queries and keys next to each other."""
    return _swap(weight, n_heads, 2)


def _halves(weight: Tensor, n_heads: int) -> Tensor:
    """Undo :func:`_neighbours`."""
    return _swap(weight, n_heads, -1)


def _swap(weight: Tensor, n_heads: int, inner: int) -> Tensor:
    swapped = torch.empty_like(weight)
    rows = len(weight) // 3 * 2
    view = weight[:rows].view(2 * n_heads, inner, -1 if inner > 0 else 2, weight.shape[1])
    swapped[:rows] = view.transpose(1, 2).reshape(rows, -1)
    swapped[rows:] = weight[rows:]
    return swapped


def _complex(joint: Tensor, n_heads: int) -> Tensor:
    """View [B, T, 3 d] as complex [B, T, 3 H, d_head / 2]."""
    return torch.view_as_complex(joint.view(*joint.shape[:2], 3 * n_heads, -1, 2))


def _heads(joint: Tensor, n_heads: int) -> tuple[Tensor, ...]:
    """View [B, T, 3 d] as three of [B, H, T, d_head]."""
    return joint.view(*joint.shape[:2], 3, n_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


# ---- attention with dropout ------------------------------------------------------------------------------------------


def _attend_with_dropout(q: Tensor, k: Tensor, v: Tensor, scale: float, p: float) -> tuple[Tensor, list[Tensor]]:
    """Return the result [B, H, T, d_head], laid out as [B, T, H, d_head], and what the backward pass needs: the result,
    and of each group of queries the weights [B H, n, S] before and after dropout, unscaled."""
    n_sequences, n_heads, n, width = q.shape
    q, k, v = (t.reshape(-1, n, width) for t in (q, k, v))
    future = torch.full((n, n), -math.inf, dtype=q.dtype).triu_(1)
    attended = q.new_empty(n_sequences, n, n_heads, width).transpose(1, 2)
    saved = [attended]
    for start in range(0, n, QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, n)
        keys = k[:, :end].mT
        weights = torch.baddbmm(future[start:end, :end], q[:, start:end], keys, alpha=scale).softmax(-1)
        kept = keep_mask(weights.shape, p, weights.dtype).mul_(weights)
        part = torch.bmm(kept, v[:, :end]).mul_(1 / (1 - p))
        attended[:, :, start:end] = part.view(n_sequences, n_heads, -1, width)
        saved += [weights, kept]
    return attended, saved


def _attend_with_dropout_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: list[Tensor], scale: float, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients [B, H, T, d_head] for queries, keys and values.

    With weights w, mask m and a = grad . v / (1 - p), the gradient of a score is w (m a - sum of w m a), and that sum
    is the product of the gradient with the result.
    """
    shape, n = q.shape, q.shape[2]
    attended, *weights_and_kept = saved
    means = (grad * attended).sum(-1).reshape(-1, n, 1)  # [B H, T, 1]
    q, k, v, grad = (t.reshape(-1, n, shape[3]) for t in (q, k, v, grad))
    grad = grad * (1 / (1 - p))
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i, start in enumerate(range(0, n, QUERIES_AT_ONCE)):
        end = min(start + QUERIES_AT_ONCE, n)
        weights, kept = weights_and_kept[2 * i : 2 * i + 2]
        rows = grad[:, start:end]
        grad_v[:, :end].baddbmm_(kept.mT, rows)
        scores = torch.bmm(rows, v[:, :end].mT).mul_(kept).addcmul_(weights, means[:, start:end], value=-1.0)
        grad_q[:, start:end] = torch.bmm(scores, k[:, :end])
        grad_k[:, :end].baddbmm_(scores.mT, q[:, start:end], alpha=scale)
    return grad_q.mul_(scale).view(shape), grad_k.view(shape), grad_v.view(shape)
