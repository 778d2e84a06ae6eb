"""Cross-entropy over large vocabularies without ever holding the logits of all positions.

Where the output layer is linear (:meth:`hrs.models.LanguageModel.unembedding`), loss and gradients are computed
together in the forward pass, chunk by chunk, after the idea of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989): three
matrix products instead of the four of recomputation, one copy of the weight in the type of computation instead of one
per chunk, and the weight's gradient summed in float32. Other output layers are scored in chunks that are computed again
in the backward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from hrs.models.base import Unembedding
from hrs.nn.products import by_onednn, product

IGNORED = -100
"""The target that adds neither loss nor gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunking:
    """How the logits of a batch are cut into pieces. Changes results by rounding only."""

    logits: int
    """Logits held at once."""
    multiple: int = 1
    """The vocabulary is padded to a multiple of this inside the loss, the rows of a chunk are rounded down to one."""
    plain: int = 0
    """Batches of fewer logits are left to autograd, which calls fewer operators."""

    def rows(self, n: int, vocab_size: int) -> int:
        """Return the rows per chunk of ``n`` rows: at least 1, all chunks but the last alike."""
        most = max(1, self.logits // vocab_size)
        if most >= n:
            return n
        return most // self.multiple * self.multiple or most


CPU_CHUNKING = Chunking(logits=2**24, plain=2**19)
GPU_CHUNKING = Chunking(logits=2**26, multiple=128)
"""256 MiB of float32 and 128 MiB of bfloat16. At 50,257 ids a chunk has 1,280 rows: enough arithmetic per byte of the
weight and of its gradient, which every chunk reads and writes once. Tensor cores want rows of a multiple of 16 bytes,
which an odd vocabulary does not give."""


def chunking_for(device: torch.device) -> Chunking:
    """Return the default for a device."""
    return GPU_CHUNKING if device.type == "cuda" else CPU_CHUNKING


def cross_entropy(
    unembed: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    unembedding: Unembedding | None = None,
    label_smoothing: float = 0.0,
    chunking: Chunking = CPU_CHUNKING,
) -> Tensor:
    """Return the mean cross-entropy in nats, scalar float32 (float64 for float64), of hidden states against token ids.

    Targets of :data:`IGNORED` add nothing, but count in the denominator of the mean. Gradients can be taken once.

    Args:
        unembed: gives logits [..., V]; must not draw random numbers.
        hidden: states [B, T, k].
        targets: token ids [B, T].
        vocab_size: V.
        unembedding: what ``unembed`` computes, if it is linear.
        label_smoothing: share of the target spread over the vocabulary.
        chunking: pieces in which logits [B * T, V] are computed.
    """
    rows, labels = hidden.flatten(0, 1), targets.flatten()  # [B * T, k], [B * T]
    if unembedding is None or len(rows) * vocab_size < chunking.plain:
        total = _recomputed(unembed, rows, labels, label_smoothing, chunking.rows(len(rows), vocab_size))
    else:
        dtype = _type_of_computation(rows)
        weight, bias, softcap = unembedding
        total = _fused(rows, weight, bias, labels, softcap, label_smoothing, dtype, chunking)
    return total / len(rows)


# ---- any output layer ------------------------------------------------------------------------------------------------


def _recomputed(
    unembed: Callable[[Tensor], Tensor], rows: Tensor, labels: Tensor, label_smoothing: float, size: int
) -> Tensor:
    def summed(rows: Tensor, labels: Tensor) -> Tensor:
        # float32 before the softmax: bf16 logits lose about three digits of a loss near 3.
        logits = unembed(rows)
        logits = logits.to(_at_least_float32(logits.dtype))
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")

    if size == len(rows):
        return summed(rows, labels)
    total = rows.new_zeros((), dtype=_at_least_float32(rows.dtype))
    for part, ids in zip(rows.split(size), labels.split(size), strict=True):
        total = total + checkpoint(summed, part, ids, use_reentrant=False, preserve_rng_state=False)
    return total


# ---- linear output layers --------------------------------------------------------------------------------------------


def _fused(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float,
    label_smoothing: float,
    dtype: torch.dtype,
    chunking: Chunking,
) -> Tensor:
    """Return the summed loss of rows [N, d]; float32 at least."""
    arguments = (labels, softcap, label_smoothing, dtype, chunking)
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(rows, weight, bias, *arguments)
    return _loss_and_gradients(rows, weight, bias, *arguments, wanted=(False, False, False))[0]


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass scales them in place, so it can run once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        total, *gradients = _loss_and_gradients(rows, weight, bias, *arguments, wanted=ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("the fused cross-entropy has no second derivative: use the loss of model.unembed")
        gradients = [g if g is None else g.mul_(grad) for g in ctx.saved_tensors]
        return (*gradients, None, None, None, None, None)


def _loss_and_gradients(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float,
    label_smoothing: float,
    dtype: torch.dtype,
    chunking: Chunking,
    *,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the summed cross-entropy of rows [N, d] and its gradients for rows, weight [V, d] and bias [V].

    With logits z and probabilities p the gradient of a row's loss for z is p - q, where the target distribution q is
    1 - s for the label and s / V for every id, s the label smoothing. For the label it is written as expm1(log p) + s:
    where p is close to 1, half precision would round it to 0.

    Args:
        wanted: which of the three gradients; the others are None. Without any, only the loss is computed.
    """
    exact = _at_least_float32(dtype)
    n_ids, width = weight.shape
    n_columns = -(-n_ids // chunking.multiple) * chunking.multiple
    share = label_smoothing / n_ids
    with torch.autocast(rows.device.type, enabled=False):
        table = _padded(weight, n_columns, dtype)  # [n_columns, d]
        offset = None if bias is None else _padded(bias, n_columns, exact)
        total = rows.new_zeros((), dtype=exact)
        grad_rows = torch.empty_like(rows) if wanted[0] else None
        grad_table = rows.new_zeros(n_columns, width, dtype=exact) if wanted[1] else None
        grad_offset = rows.new_zeros(1, n_columns, dtype=exact) if wanted[2] and bias is not None else None
        size = chunking.rows(len(rows), n_columns)
        for start in range(0, len(rows), size):
            part = rows[start : start + size].to(dtype)
            labels_of_part = labels[start : start + size, None]  # [n, 1]
            ignored = labels_of_part == IGNORED
            label = labels_of_part.masked_fill(ignored, 0)
            logits, capped = _product(part, table.t()), None
            if offset is not None:
                logits += offset
            if softcap:
                capped = logits.div_(softcap).tanh_()
                logits = capped * softcap
            if n_columns > n_ids:
                logits[:, n_ids:] = float("-inf")
            log_p = logits.log_softmax(dim=-1)
            del logits
            own = log_p.gather(1, label)  # [n, 1]
            loss = own * -(1 - label_smoothing)
            if label_smoothing:
                loss = loss - share * log_p[:, :n_ids].sum(dim=-1, keepdim=True)
            total += loss.masked_fill_(ignored, 0.0).sum()
            if not any(wanted):
                continue
            own = own.expm1_().add_(label_smoothing - share)
            if label_smoothing or softcap or dtype == exact:
                grad = log_p.exp_()
                if label_smoothing:
                    grad[:, :n_ids] -= share
                grad.scatter_(1, label, own)
                if capped is not None:
                    grad.addcmul_(grad * capped, capped, value=-1.0)
                grad = grad.to(dtype)
            else:
                grad = torch.exp(log_p, out=torch.empty_like(log_p, dtype=dtype))
                grad.scatter_(1, label, own.to(dtype))
            del log_p, capped
            if grad_rows is not None:
                torch.mul(_product(grad, table), ~ignored, out=grad_rows[start : start + size])
            if grad_table is not None:
                _add_product(grad_table, grad.t(), part.masked_fill(ignored, 0.0))
            if grad_offset is not None:
                _add_product(grad_offset, (~ignored).t().to(dtype), grad)
            del grad
    return (
        total,
        grad_rows,
        None if grad_table is None else grad_table[:n_ids].to(weight.dtype),
        None if grad_offset is None or bias is None else grad_offset[0, :n_ids].to(bias.dtype),
    )


def _type_of_computation(rows: Tensor) -> torch.dtype:
    """Return the type in which matrices are multiplied: autocast's where it is on, as for any linear layer."""
    device = rows.device.type
    if torch.is_autocast_enabled(device) and rows.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return rows.dtype


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _padded(values: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Return the first dimension filled up with zeros to ``n``, in ``dtype``; the tensor itself if it is so already."""
    if len(values) == n:
        return values.detach().to(dtype)
    padded = values.new_zeros(n, *values.shape[1:], dtype=dtype)
    padded[: len(values)] = values.detach()
    return padded


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32 at least, not rounded to half precision in between."""
    if a.dtype == _at_least_float32(a.dtype):
        return product(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else _half_product(a, b)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to ``total``, which is float32 at least, in place."""
    if a.dtype == total.dtype and by_onednn(a, b.shape[1]):
        total.add_(product(a, b))
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        _add_half_product(total, a, b)


# Only CUDA has a product of half-precision matrices in float32. As operators of their own these take on fake tensors
# what that one takes, and nothing for the copies.


@torch.library.custom_op("hrs::half_product", mutates_args=())
def _half_product(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float()


@_half_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


@torch.library.custom_op("hrs::add_half_product", mutates_args=("total",))
def _add_half_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.addmm_(a.float(), b.float())


@_add_half_product.register_fake
def _(total: Tensor, a: Tensor, b: Tensor) -> None:
    return None


@register_flop_formula(torch.ops.hrs.half_product)
def _half_product_flops(a: Sequence[int], b: Sequence[int], **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


@register_flop_formula(torch.ops.hrs.add_half_product)
def _add_half_product_flops(total: Sequence[int], a: Sequence[int], b: Sequence[int], **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]
