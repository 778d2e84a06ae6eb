"""Memory for large results on the CPU that every step makes anew and drops again.

The C library takes blocks above 32 MiB from the system and gives them back at once, so each step pays for pages that
the system clears and maps: for two gradients of 134 MB as long as it takes to compute them. Here memory is kept, and
handed out again once the last tensor on it has died, whoever held that: ``.grad``, a view, a NumPy array or a bucket of
gradients. Of each of the last few sizes that were asked for, as much is kept as was in use at once.
"""

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

LARGE_BYTES = 32 * 2**20
"""From here on the C library keeps no free memory."""

SIZES = 4
"""How many sizes are kept: a model has tables of one or two."""

_free: dict[int, list[np.ndarray]] = {}
"""Memory that no tensor uses, by its bytes; the size that was asked for last comes last."""
_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype, *, most: int | None = None) -> Tensor:
    """Return a tensor on the CPU whose elements are anything.

    Args:
        shape: of the tensor.
        dtype: of its elements.
        most: elements of the largest tensor that will be asked for in its place, for results whose size depends on
            data; pages that nothing was written to take no memory.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    capacity = n_bytes if most is None else most * dtype.itemsize
    if capacity < LARGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        free = _free[capacity] = _free.pop(capacity, [])
        if len(_free) > SIZES:
            del _free[next(iter(_free))]
    try:
        memory = free.pop()
    except IndexError:
        memory = np.empty(capacity, np.uint8)
    # A tensor's memory keeps this very array alive, and the tensors made from that tensor share its memory.
    lent = memory[:n_bytes]
    weakref.finalize(lent, free.append, memory).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def release() -> None:
    """Give back to the system what no tensor uses."""
    with _lock:
        _free.clear()
