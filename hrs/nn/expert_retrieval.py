"""Product-key retrieval (Lample et al. 2019): the best k of S * S experts by comparing with only 2 * S keys.

Expert a * S + b has the score (query . key a of side 0) + (query . key b of side 1), so the best k experts are among
the sums of each side's best k. Shapes: T tokens, H heads, c the keys' width. ``query`` is [T, H, 1, c] if both sides
see the whole query, [T, H, 2, c] if each sees its half. ``keys`` is [2, H, S, c], or [2, 1, S, c] if heads share them.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrs.nn.expert_ops import chosen_sum, table_gradient
from hrs.nn.products import product

SCORE_BYTES = 2 * 2**20
"""Most that scores against one side's keys take at a time; larger on a GPU, which wants more work."""
CUDA_SCORE_BYTES = 128 * 2**20


def retrieve(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Experts [T, H, k] int64, best first, and their scores [T, H, k].

    Choosing has no gradient and the chosen scores have: none of the size of all scores [T, H, S] is ever made.
    """
    sides, scores = product_key_top_k(query, keys, k)
    return sides[:, :, 0] * keys.shape[2] + sides[:, :, 1], scores


def retrieve_naive(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`retrieve` through autograd of all scores, as the original did: the reference."""
    n_keys = keys.shape[2]
    query, keys = query.expand(-1, -1, 2, -1), keys.expand(-1, query.shape[1], -1, -1)
    best = torch.einsum("thpc,phsc->thps", query, keys).topk(k, dim=-1)
    sums = best.values[:, :, 0, :, None] + best.values[:, :, 1, None, :]  # [T, H, k, k]
    experts = best.indices[:, :, 0, :, None] * n_keys + best.indices[:, :, 1, None, :]
    scores, chosen = sums.flatten(-2).topk(k, dim=-1)
    return experts.flatten(-2).gather(-1, chosen), scores


@torch.library.custom_op("hrs::product_key_top_k", mutates_args=())
def product_key_top_k(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k experts with the highest scores, best first: key of each side [T, H, 2, k] int64, and score [T, H, k]."""
    n_tokens, n_heads, n_queries, _ = query.shape
    n_keys = keys.shape[2]
    # A CPU works on one head at a time, whose scores of many tokens fit its cache.
    n_together, limit = (n_heads, CUDA_SCORE_BYTES) if query.is_cuda else (1, SCORE_BYTES)
    n_at_a_time = max(1, limit // (n_together * n_keys * query.element_size()))
    out = torch.empty(n_tokens, n_heads, 2, k, dtype=torch.int64, device=query.device)
    best = query.new_empty(n_tokens, n_heads, k)
    pairs = _possible_pairs_on(k, query.device)
    for start in range(0, n_tokens, n_at_a_time):
        tokens = slice(start, start + n_at_a_time)
        for first in range(0, n_heads, n_together):
            heads = slice(first, first + n_together)
            values, indices = [], []
            for side in range(2):
                scores = _scores(query[tokens, heads, side % n_queries], keys[side], heads)
                indices.append(_best(scores, k))  # [h, t, k]
                values.append(scores.gather(-1, indices[side]))
            sums = values[0].index_select(-1, pairs[0]) + values[1].index_select(-1, pairs[1])
            chosen = _best(sums, k)
            best[tokens, heads] = sums.gather(-1, chosen).transpose(0, 1)
            for side in range(2):
                out[tokens, heads, side] = indices[side].gather(-1, pairs[side].take(chosen)).transpose(0, 1)
    return out, best


@product_key_top_k.register_fake
def _(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = query.shape[:2]
    return query.new_empty(*shape, 2, k, dtype=torch.int64), query.new_empty(*shape, k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[0])
    ctx.mark_non_differentiable(output[0])


def _backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A chosen score is a sum of two products: its gradient goes to both sides."""
    query, keys, sides = ctx.saved_tensors
    n_tokens, n_heads, n_queries, width = query.shape
    n_key_heads, n_keys = keys.shape[1:3]
    table = keys.flatten(0, 2)
    first = torch.arange(2 * n_key_heads, device=query.device).view(2, n_key_heads).t() * n_keys  # [1 or H, 2]
    rows = (sides + first.unsqueeze(-1)).view(n_tokens * n_heads * n_queries, -1)
    weights = grad.unsqueeze(2).expand_as(sides).reshape(rows.shape)
    grad_query = chosen_sum(weights, table, rows).view_as(query) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return grad_query, None, None
    grad_keys = table_gradient(weights, query.reshape(-1, width), rows, len(table))
    return grad_query, grad_keys.view_as(keys), None


product_key_top_k.register_autograd(_backward, setup_context=_save)
for _device in ("cpu", "cuda"):
    # Choosing in bfloat16 would take other experts than those whose float32 scores are highest.
    product_key_top_k.register_autocast(_device, torch.float32)


def _scores(query: Tensor, keys: Tensor, heads: slice) -> Tensor:
    """[h, t, S] of queries [t, h, c] of some heads and one side's keys [H, S, c], or [1, S, c] that all heads share."""
    own = keys if len(keys) == 1 else keys[heads]
    if query.shape[1] == 1:
        return product(query[:, 0], own[0].t()).unsqueeze(0)
    return torch.matmul(query.transpose(0, 1), own.mT)


def _best(scores: Tensor, k: int) -> Tensor:
    """Places of the k largest along the last dimension, largest first: ``topk``, several times faster on the CPU.

    The k largest of many are within the k groups with the largest maxima.
    """
    n, n_groups = scores.shape[-1], 4 * k
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return scores.topk(k, dim=-1).indices
    if n <= 2 * n_groups:
        return _best_of_few(scores, k)
    if n % n_groups:
        return scores.topk(k, dim=-1).indices
    columns = scores.unflatten(-1, (-1, n_groups))  # [..., n / n_groups, n_groups]: a group is a column
    groups = _best_of_few(columns.amax(dim=-2), k)
    kept = columns.gather(-1, groups.unsqueeze(-2).expand(*columns.shape[:-1], k))  # [..., n / n_groups, k]
    chosen = _best(kept.flatten(-2), k)
    return torch.div(chosen, k, rounding_mode="floor") * n_groups + groups.gather(-1, chosen % k)


def _best_of_few(scores: Tensor, k: int) -> Tensor:
    """:func:`_best` by sorting, which NumPy does to short rows with vector instructions.

    A float64 has 29 bits more than a finite float32 needs. Those get the place: sorting numbers that carry it takes
    half the time of sorting places by numbers.
    """
    if scores.dtype is not torch.float32:
        return torch.from_numpy(np.argsort(scores.numpy(), axis=-1)[..., : -k - 1 : -1].copy())
    carriers = scores.double()
    bits = carriers.view(torch.int64)
    bits |= torch.arange(scores.shape[-1])
    carriers.numpy().sort(axis=-1)
    return (bits[..., -k:] & (2**29 - 1)).flip(-1)


@cache
def _possible_pairs_on(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """:func:`_possible_pairs` on a device, copied once: a copy from the host waits for a GPU."""
    left, right = (torch.tensor(places, device=device) for places in _possible_pairs(k))
    return left, right


@cache
def _possible_pairs(k: int) -> tuple[list[int], list[int]]:
    """Ranks (i, j), from 0, on the two sorted sides whose sum can be among the k largest.

    (i + 1) * (j + 1) - 1 other sums are at least as large; for k = 16 this leaves 50 of 256 pairs.
    """
    pairs = [(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k]
    return [i for i, _ in pairs], [j for _, j in pairs]
