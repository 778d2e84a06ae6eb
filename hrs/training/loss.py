"""Cross-entropy over large vocabularies without ever holding the logits of all positions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**24
"""Logits held at once: 64 MiB in float32. Fewer logits than this take the plain path."""


def cross_entropy(
    unembed: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    chunk_logits: int = CHUNK_LOGITS,
    vocab_size: int,
) -> Tensor:
    """Mean cross-entropy in nats, scalar float32, of hidden states [B, T, d] against token ids [B, T].

    Where B * T * vocab_size exceeds ``chunk_logits``, positions are scored chunk by chunk and every chunk's logits are
    computed again in the backward pass, so that [B, T, V] never exists. ``unembed`` must not draw random numbers.
    """
    rows, labels = hidden.flatten(0, 1), targets.flatten()  # [B * T, d], [B * T]

    def summed(rows: Tensor, labels: Tensor) -> Tensor:
        # float32 before the softmax: bf16 logits lose about three digits of a loss near 3.
        logits = unembed(rows).float()
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")

    size = max(1, chunk_logits // vocab_size)
    if size >= len(rows):
        return summed(rows, labels) / len(rows)
    total = rows.new_zeros((), dtype=torch.float32)
    for part, ids in zip(rows.split(size), labels.split(size), strict=True):
        total = total + checkpoint(summed, part, ids, use_reentrant=False, preserve_rng_state=False)
    return total / len(rows)
