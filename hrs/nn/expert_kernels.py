"""Arithmetic on chosen rows of large tables that never copies those rows out: R rows of width w, K choices per row.

CPU: sampled dense-dense products and ``embedding_bag``, each one pass over the chosen rows. CUDA: a Triton kernel for
the dot products, torch's own ``embedding_bag`` for the sums. Where neither serves (half precision on the CPU, no
Triton) dot products gather a bounded piece at a time. A row's result depends on that row alone, to the last bit.
"""

import functools
import itertools
import logging
import warnings
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.gpu import is_gone, is_out_of_memory
from hrs.nn import recycled_memory

_log = logging.getLogger(__name__)

GATHER_BYTES = 32 * 2**20
"""Most that :func:`gathered_dot` copies at a time where it has to copy."""
SUM_BYTES = 2**20
"""Of a large gradient of a table on the CPU, what is summed at a time: it stays in the second cache."""


def dot(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """x[r] . table[indices[r, j]], [R, K], of x [R, w], table [N, w] and indices [R, K]."""
    if x.is_cuda and triton_works(x.device):
        from hrs.nn.expert_triton import triton_dot

        return triton_dot(x, table, indices)
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return sampled_dot(x, table, indices)
    return gathered_dot(x, table, indices)


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Return True if Triton can compile and run a kernel on ``device``; if not, say why in one warning.

    Triton compiles the launcher of its first kernel with the C compiler of the machine and Python's header files, so
    the answer is known only after one was launched.
    """
    if find_spec("triton") is None:
        reason = "it is not installed"
    else:
        try:
            from hrs.nn.expert_triton import triton_dot

            one = torch.ones(1, 1, device=device)
            triton_dot(one, one, torch.zeros(1, 1, dtype=torch.int64, device=device))
            return True
        except Exception as error:  # of the compiler, the linker, the driver or Triton itself
            if is_out_of_memory(error) or is_gone(error):
                raise
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    _log.warning(
        "Triton cannot be used on %s (%s): product-key experts copy the chosen rows instead, which is slower; it needs "
        "a C compiler and Python's headers (Debian: apt install gcc python3-dev)",
        device,
        reason[:200],
    )
    return False


def sampled_dot(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """:func:`dot` as a matrix product evaluated at R x K places (SDDMM); float32 and float64."""
    n_rows, n_choices = indices.shape
    row_ends = torch.arange(0, indices.numel() + 1, n_choices, device=x.device)
    with warnings.catch_warnings():
        # Says once that CSR support is in beta, and once that its invariants go unchecked.
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)", category=UserWarning)
        places = torch.sparse_csr_tensor(
            row_ends,
            indices.reshape(-1),
            x.new_zeros(indices.numel()),
            size=(n_rows, len(table)),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(places, x, table.t(), beta=0.0).values().view(n_rows, n_choices)


def gathered_dot(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """:func:`dot` by copying the chosen rows, at most ``GATHER_BYTES`` of them at a time; every device and type."""
    n_at_a_time = max(1, GATHER_BYTES // (indices.shape[1] * table.shape[1] * table.element_size()))
    pieces = [
        torch.bmm(table[chosen], part.unsqueeze(-1)).squeeze(-1)
        for part, chosen in zip(x.split(n_at_a_time), indices.split(n_at_a_time), strict=True)
    ]
    return torch.cat(pieces)


def weighted_sum(weights: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """Sum over j of weights[r, j] * table[indices[r, j]], [R, w]."""
    return F.embedding_bag(indices, table, per_sample_weights=weights.contiguous(), mode="sum")


def table_gradient(weights: Tensor, x: Tensor, indices: Tensor, n_rows: int) -> Tensor:
    """Row e is the sum of weights[r, j] * x[r] over all (r, j) with indices[r, j] = e; [n_rows, w]."""
    chosen, order = _sorted(indices)
    if chosen.is_cuda:  # where bincount would wait for the device
        starts = torch.searchsorted(chosen, torch.arange(n_rows, dtype=chosen.dtype, device=chosen.device))
    else:
        counts = torch.bincount(chosen, minlength=n_rows)
        starts = counts.cumsum(0) - counts
    return _sum_of_groups(weights, x, order, starts, n_rows)


def touched_rows(weights: Tensor, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of :func:`table_gradient` that any choice met: their numbers [m], ascending, and values [m, w]."""
    chosen, order = _sorted(indices)
    rows, counts = chosen.unique_consecutive(return_counts=True)
    return rows.long(), _sum_of_groups(weights, x, order, counts.cumsum(0) - counts, indices.numel())


def _sorted(indices: Tensor) -> tuple[Tensor, Tensor]:
    # A radix sort of int32 takes half the passes, and tables do not have 2^31 rows.
    chosen = indices.reshape(-1).to(torch.int32).sort(stable=True)
    return chosen.values, chosen.indices


def _sum_of_groups(weights: Tensor, x: Tensor, order: Tensor, starts: Tensor, most: int) -> Tensor:
    """[len(starts), w], sums of weights * x over the groups, begun at ``starts``, of the pairs listed in ``order``.

    ``most`` is the largest number of groups that there can be at these shapes.
    """
    x = x.contiguous()
    rows = torch.div(order, weights.shape[1], rounding_mode="floor")
    sorted_weights = weights.reshape(-1).index_select(0, order)
    row_bytes = x.shape[1] * x.element_size()
    if x.is_cuda or most * row_bytes < recycled_memory.LARGE_BYTES:
        return F.embedding_bag(rows, x, starts, per_sample_weights=sorted_weights, mode="sum")
    # torch cannot sum into memory that is there: sums are made in the cache, a piece at a time, and copied.
    result = recycled_memory.empty((len(starts), x.shape[1]), x.dtype, most=most * x.shape[1])
    size = max(1, SUM_BYTES // row_bytes)
    begins = starts[::size]
    starts = starts - begins.repeat_interleave(size)[: len(starts)]
    for target, first, pairs in zip(result.split(size), starts.split(size), _slices(begins, len(rows)), strict=True):
        target.copy_(F.embedding_bag(rows[pairs], x, first, per_sample_weights=sorted_weights[pairs], mode="sum"))
    return result


def _slices(begins: Tensor, end: int) -> list[slice]:
    """From each of ``begins`` to the next one, and from the last one to ``end``."""
    edges = [*begins.tolist(), end]
    return [slice(*pair) for pair in itertools.pairwise(edges)]
