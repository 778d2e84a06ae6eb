"""Make fake CPU tensors take the memory that the same code takes on CUDA.

Autograd cannot run on fake CUDA tensors in a build of torch without CUDA (it aborts the process), so the planner traces
fake *CPU* tensors and this mode replaces what the CPU would do otherwise:

- Attention saves what the fused CUDA kernels save: q, k, v, the output and one float per query, never a T x T matrix.
  A boolean mask becomes an additive one in the type of q, its rows padded to 16, as the memory-efficient kernel wants.
  The backward pass of half-precision kernels adds up in a float32 buffer of the size of q.
- Dropout keeps a mask of one byte per element; the CPU keeps a float.
- Autocast runs the operators of CUDA's float32 list in float32; the CPU's list is shorter.

Scratch space inside other kernels is not imitated.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hrs.models import LanguageModel

_FLOAT32_UNDER_AUTOCAST = frozenset({
    "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "exp", "group_norm", "kl_div", "layer_norm", "log",
    "log1p", "log_softmax", "logsumexp", "mse_loss", "nll_loss", "norm", "normalize", "pow", "prod", "reciprocal",
    "rsqrt", "softmax", "softplus", "sum",
})  # fmt: skip
"""The operators of CUDA's float32 autocast list that occur in language models (torch's autocast operator reference)."""

_MASK_ALIGNMENT = 16
"""Elements to which the memory-efficient attention kernel pads the rows of its additive mask."""


class ImitateCuda(TorchFunctionMode):
    """Fake CPU tensors cost what CUDA tensors would. Results are garbage: for fake tensors only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in _FLOAT32_UNDER_AUTOCAST:
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        return func(*args, **kwargs)

    def cover(self, model: LanguageModel) -> None:
        """Turn the mode on in every block and the unembedding by itself: autograd, which may recompute them, has it
        not."""
        for block in model.blocks:
            block.forward = self._covered(block.forward)
        # A chunked loss recomputes it, too.
        model.unembed = self._covered(model.unembed)  # type: ignore[method-assign]

    def _covered(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def covered(*args: Any, **kwargs: Any) -> Any:
            with self:
                return forward(*args, **kwargs)

        return covered


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        *rows, columns = attn_mask.shape
        attn_mask = query.new_empty(*rows, -(-columns // _MASK_ALIGNMENT) * _MASK_ALIGNMENT)
    return _FusedAttention.apply(query, key, value, attn_mask)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sum_exp = torch.empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _, log_sum_exp = ctx.saved_tensors
        # Held until the kernel ends, like the gradients themselves.
        scratch = [torch.empty_like(log_sum_exp)]
        if query.dtype is not torch.float32:
            scratch.append(torch.empty_like(query, dtype=torch.float32))
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
