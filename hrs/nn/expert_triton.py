"""Dot products of rows with chosen rows of a table on a CUDA device. Needs Triton, which CUDA builds of torch bring.

With ``TRITON_INTERPRET=1`` the kernel also runs on CPU tensors, slowly: that is how its arithmetic is tested without a
card.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _dot_kernel(  # type: ignore[no-untyped-def]
    x, table, indices, out, n_choices, width, TYPE: tl.constexpr, CHOICES: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    choice = tl.program_id(1) * CHOICES + tl.arange(0, CHOICES)
    exists = choice < n_choices
    # int64 from here on: a table may have more than 2^31 elements.
    chosen = tl.load(indices + row * n_choices + choice, mask=exists, other=0)
    total = tl.zeros([CHOICES], dtype=TYPE)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = column < width
        left = tl.load(x + row * width + column, mask=inside, other=0.0).to(TYPE)
        mask = exists[:, None] & inside[None, :]
        right = tl.load(table + chosen[:, None] * width + column[None, :], mask=mask, other=0.0).to(TYPE)
        total += tl.sum(right * left[None, :], axis=1)
    tl.store(out + row * n_choices + choice, total, mask=exists)


def triton_dot(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """x[r] . table[indices[r, j]], [R, K], of x [R, w], table [N, w] and indices [R, K] int64; adds up in float32
    (float64 in float64)."""
    x, table, indices = x.contiguous(), table.contiguous(), indices.contiguous()
    n_rows, n_choices = indices.shape
    width = x.shape[1]
    out = torch.empty(n_rows, n_choices, dtype=x.dtype, device=x.device)
    choices, columns = 16, min(128, triton.next_power_of_2(width))
    _dot_kernel[(n_rows, triton.cdiv(n_choices, choices))](
        x,
        table,
        indices,
        out,
        n_choices,
        width,
        TYPE=tl.float64 if x.dtype is torch.float64 else tl.float32,
        CHOICES=choices,
        WIDTH=columns,
    )
    return out
