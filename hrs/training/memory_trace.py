"""Count live tensor storages while code runs: the ground of memory prediction and of the CPU's out-of-memory error.

A dispatch mode sees every tensor that an operator reads or writes, on real and on fake tensors, in the forward pass, in
the backward pass (autograd hands the mode to its threads) and in the optimiser. A storage counts from the first time
it is seen until it dies. Not seen: scratch space that a kernel takes and returns within one call.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageCounter(TorchDispatchMode):
    """Live bytes of the storages seen while the mode is on; their lives are followed after it is left, too.

    ``block_bytes`` rounds every storage up, as an allocator does. Beyond ``limit_bytes`` an operator raises
    ``torch.OutOfMemoryError`` and what it allocated is released with the error.
    """

    def __init__(self, *, block_bytes: int = 1, limit_bytes: int | None = None) -> None:
        super().__init__()
        self.block_bytes = block_bytes
        self.limit_bytes = limit_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self.events: list[tuple[int, int]] = []
        """(serial number of the storage, bytes gained or lost), in order of time."""
        self._live: dict[int, tuple[int, int]] = {}  # StorageImpl address -> (serial, bytes)
        self._storages = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(tree_iter((args, kwargs)))
        self.see(tree_iter(result))
        if self.limit_bytes is not None and self.live_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"out of memory: {func} needs {self.live_bytes} bytes of live tensors, the limit is {self.limit_bytes}"
            )
        return result

    def see(self, values: Iterable[Any]) -> None:
        """Count the storages of those ``values`` that are tensors and were not counted before."""
        for value in values:
            # A sparse tensor has no storage of its own; its parts are counted when an operator touches them.
            if isinstance(value, Tensor) and value.layout is torch.strided:
                self._see_storage(value.untyped_storage())

    def serial(self, tensor: Tensor) -> int:
        """The number under which the tensor's storage stands in :attr:`events`."""
        self.see([tensor])
        return self._live[tensor.untyped_storage()._cdata][0]

    def _see_storage(self, storage: torch.UntypedStorage) -> None:
        address, n_bytes = storage._cdata, -(-storage.nbytes() // self.block_bytes) * self.block_bytes
        if address not in self._live:
            self._storages += 1
            self._live[address] = (self._storages, 0)
            # torch keeps one Python object per storage alive as long as the storage, so this fires at its true end.
            weakref.finalize(storage, self._release, address).atexit = False
        serial, counted = self._live[address]
        if n_bytes != counted:  # new, or resized in place
            self._live[address] = (serial, n_bytes)
            self._record(serial, n_bytes - counted)

    def _release(self, address: int) -> None:
        serial, n_bytes = self._live.pop(address)
        self._record(serial, -n_bytes)

    def _record(self, serial: int, change_bytes: int) -> None:
        self.live_bytes += change_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.events.append((serial, change_bytes))


class Peak(NamedTuple):
    """The highest point of a trace."""

    bytes: int
    """All live storages together."""
    by_category: dict[str, int]
    """The same bytes, split; sums to ``bytes``."""


def peak(events: Sequence[tuple[int, int]], category: dict[int, str], default: str) -> Peak:
    """Replay a trace and split its highest point by the categories of its storages.

    ``category`` may be made after the trace: only then is it known which storages ended as gradients. A storage
    without an entry belongs to ``default``.
    """
    live, best = dict.fromkeys({*category.values(), default}, 0), Peak(0, {})
    total = 0
    for serial, change_bytes in events:
        live[category.get(serial, default)] += change_bytes
        total += change_bytes
        if total > best.bytes:
            best = Peak(total, dict(live))
    return best
