"""What the HRS language model remembers while decoding: of a batch of equal lengths, and of slots of unequal ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.models.base import Cache, SlotCache
from hrs.nn.block import BlockCache, BlockSlots
from hrs.nn.cache import SlotTable, TailSlots
from hrs.nn.cpu_step import CpuStep
from hrs.nn.engrams import WindowSlots
from hrs.nn.test_time_memory import TestTimeCache, TestTimeSlots


@dataclass
class HRSCache(Cache):
    """State of incremental decoding."""

    batch_size: int
    blocks: list[BlockCache]
    engram: Any = None
    recalled: Tensor | None = None
    """What the engrams keep of the text before."""
    memory: Tensor | None = None
    test_time: TestTimeCache | None = None
    tokens: Tensor | None = None
    """Token ids so far, kept only for engrams that must be made anew from the whole text."""

    def advance(self, n: int) -> None:
        """Note that ``n`` more tokens were decoded."""
        self.length += n


class HRSSlots(SlotCache):
    """State of incremental decoding of sequences of unequal length.

    Args:
        table: says how many there are.
        blocks: of every block.
        engram: of the engrams; None for engrams without a memory.
        test_time: of the memory that learns the text; None without one.
        cpu_step: the step through the blocks on the CPU; None for models whose blocks it does not cover.
    """

    recalled = None

    def __init__(
        self,
        table: SlotTable,
        blocks: list[BlockSlots],
        engram: Any = None,
        test_time: TestTimeSlots | None = None,
        cpu_step: CpuStep | None = None,
    ) -> None:
        super().__init__(table)
        self.blocks, self.engram, self.test_time, self.cpu_step = blocks, engram, test_time, cpu_step
        self._memories: list[Tensor | None] = []

    @property
    def is_plain(self) -> bool:
        pieces = [part.window for part in self._others() if isinstance(part, WindowSlots)]
        pieces += [] if self.test_time is None else [self.test_time.chunk]
        return not any(self.table.completing(size) for size in pieces)

    def snapshot(self) -> Callable[[], None]:
        # Writing keys and values again changes nothing.
        parts = [part for block in self.blocks for part in block.parts() if isinstance(part, TailSlots)]
        tensors = [tensor for part in (*parts, *self._others()) for tensor in part.tensors()]
        kept = [tensor.clone() for tensor in tensors]

        def restore() -> None:
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.copy_(before)

        return restore

    def _others(self) -> list[Any]:
        """What is remembered besides what the blocks do."""
        return [part for part in (self.engram, self.test_time) if part is not None]

    def join(self, cache: Cache) -> None:
        assert isinstance(cache, HRSCache)
        slot, batch_size = len(self.lengths), cache.batch_size
        parts = [part for block in self.blocks for part in block.parts()]
        theirs = [part for block in cache.blocks for part in block.parts()]
        for own, other in zip(parts, theirs, strict=True):
            own.join(other, slot)  # type: ignore[arg-type]
        if self.engram is not None:
            self.engram.join(cache.engram, slot)
        if self.test_time is not None and cache.test_time is not None:
            self.test_time.join(cache.test_time, slot)
        self.table.join(batch_size, cache.length)
        self._memories += [None] * batch_size if cache.memory is None else list(cache.memory)
        self._changed()

    def leave(self, slot: int) -> None:
        last = len(self.lengths) - 1
        if slot < last:
            for block in self.blocks:
                for part in block.parts():
                    part.leave(slot, last)
            for other in self._others():
                other.leave(slot, last)
        self.table.leave(slot)
        memory = self._memories.pop()
        if slot < last:
            self._memories[slot] = memory
        self._changed()

    def set_memory(self, slot: int, memory: Tensor | None) -> None:
        self._memories[slot] = memory
        self._changed()

    def _changed(self) -> None:
        given = [memory for memory in self._memories if memory is not None]
        self.memory = None
        if given:
            most = max(len(memory) for memory in given)
            rows = (given[0][:0] if memory is None else memory for memory in self._memories)
            # Slots of zeros are absent.
            self.memory = torch.stack([F.pad(memory, (0, 0, 0, most - len(memory))) for memory in rows])  # [B, S, d]
