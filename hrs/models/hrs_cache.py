"""What the HRS language model remembers while decoding: of a batch of equal lengths, and of slots of unequal ones."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.models.base import Cache, SlotCache
from hrs.nn.block import BlockCache
from hrs.nn.cache import KeyValueSlots, TailSlots
from hrs.nn.test_time_memory import TestTimeCache


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

    def positions(self, n: int, device: torch.device) -> Tensor:
        """[n], of the next tokens."""
        return torch.arange(self.length, self.length + n, device=device)

    def advance(self, n: int) -> None:
        """Note that ``n`` more tokens were decoded."""
        self.length += n


@dataclass
class HRSSlots(HRSCache, SlotCache):
    """State of incremental decoding of sequences of unequal length. Its batch size is the number of slots in use."""

    memories: list[Tensor | None] = field(default_factory=list)
    """[S, d] for each slot in use, S may differ; None for no memory."""
    lengths: list[int] = field(default_factory=list)

    def parts(self) -> list[KeyValueSlots | TailSlots]:
        """All that remembers something, always in one order."""
        return [part for block in self.blocks for part in block.parts()]  # type: ignore[misc]

    def join(self, cache: Cache) -> None:
        assert isinstance(cache, HRSCache) and cache.batch_size == 1
        theirs = [part for block in cache.blocks for part in block.parts()]
        for own, other in zip(self.parts(), theirs, strict=True):
            own.join(other)  # type: ignore[arg-type]
        self.lengths.append(cache.length)
        self.memories.append(None if cache.memory is None else cache.memory[0])
        self._changed()

    def leave(self, slot: int) -> None:
        for part in self.parts():
            part.leave(slot)
        length, memory = self.lengths.pop(), self.memories.pop()
        if slot < len(self.lengths):
            self.lengths[slot], self.memories[slot] = length, memory
        self._changed()

    def set_memory(self, slot: int, memory: Tensor | None) -> None:
        self.memories[slot] = memory
        self._changed()

    def positions(self, n: int, device: torch.device) -> Tensor:
        """[B, 1], of each slot's next token."""
        return torch.tensor(self.lengths, device=device).unsqueeze(1)

    def advance(self, n: int) -> None:
        self.lengths = [length + n for length in self.lengths]
        self.length += n

    def _changed(self) -> None:
        self.batch_size, self.length = len(self.lengths), max(self.lengths, default=0)
        given = [memory for memory in self.memories if memory is not None]
        self.memory = None
        if given:
            most = max(len(memory) for memory in given)
            rows = (given[0][:0] if memory is None else memory for memory in self.memories)
            # Slots of zeros are absent.
            self.memory = torch.stack([F.pad(memory, (0, 0, 0, most - len(memory))) for memory in rows])  # [B, S, d]
