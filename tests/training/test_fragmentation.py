"""The room that plans leave for fragmentation, against a model of torch's caching allocator with expandable segments.

The traces are those of the memory planner: every storage of a training step, on fake tensors. The allocator's rules are
those of ``CUDACachingAllocator`` (torch 2.13) with ``expandable_segments:True``: blocks up to 1 MiB live in one growing
segment with pages of 2 MiB, larger ones in another with pages of 20 MiB; a request takes the smallest free range that
is mapped and fits, else maps pages at the smallest free range that fits; beyond the limit all pages without a block are
unmapped first.
"""

from dataclasses import dataclass, field

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from hrs.config import TrainingConfig
from hrs.presets import experiment
from hrs.training.memory import CUDA_BLOCK_BYTES, CUDA_OVERHEAD_BYTES, reserved_bytes
from hrs.training.memory_step import training_step_peak
from hrs.training.memory_trace import StorageCounter

MIB = 2**20
ENDLESS = 2**50


class AllocatorFull(Exception):
    """A request went beyond the limit."""


@dataclass
class Segment:
    """One growing range of addresses of which some pages are mapped."""

    page: int
    free: list[tuple[int, int]] = field(default_factory=lambda: [(0, ENDLESS)])
    """Ranges without a block: begin and end, in order, never adjacent."""
    mapped: set[int] = field(default_factory=set)
    blocks: dict[int, tuple[int, int]] = field(default_factory=dict)

    def pages(self, begin: int, end: int) -> range:
        return range(begin // self.page, (end - 1) // self.page + 1)

    def mapped_runs(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return the mapped parts of a free range."""
        pages = sorted(p for p in self.mapped if begin < (p + 1) * self.page and p * self.page < end)
        runs: list[tuple[int, int]] = []
        for page in pages:
            low, high = max(begin, page * self.page), min(end, (page + 1) * self.page)
            if runs and runs[-1][1] == low:
                runs[-1] = (runs[-1][0], high)
            else:
                runs.append((low, high))
        return runs

    def place(self, size: int) -> tuple[int, set[int]]:
        """Return where a block goes, and the pages that must be mapped for it."""
        runs = [run for begin, end in self.free for run in self.mapped_runs(begin, end) if run[1] - run[0] >= size]
        if runs:
            return min(runs, key=lambda run: run[1] - run[0])[0], set()
        begin, _ = min((r for r in self.free if r[1] - r[0] >= size), key=lambda r: r[1] - r[0])
        return begin, set(self.pages(begin, begin + size)) - self.mapped

    def take(self, key: int, begin: int, size: int) -> None:
        end = begin + size
        index = next(i for i, r in enumerate(self.free) if r[0] <= begin and end <= r[1])
        low, high = self.free[index]
        self.free[index : index + 1] = [r for r in ((low, begin), (end, high)) if r[0] < r[1]]
        self.blocks[key] = (begin, end)

    def release(self, key: int) -> None:
        begin, end = self.blocks.pop(key)
        before = [r for r in self.free if r[1] <= begin]
        after = [r for r in self.free if r[0] >= end]
        if before and before[-1][1] == begin:
            begin = before.pop()[0]
        if after and after[0][0] == end:
            end = after.pop(0)[1]
        self.free = [*before, (begin, end), *after]

    def unmap_idle(self) -> None:
        self.mapped = {page for begin, end in self.blocks.values() for page in self.pages(begin, end)}


class Allocator:
    """Both segments under one limit."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.peak_reserved = limit_bytes, 0
        self.small, self.large = Segment(2 * MIB), Segment(20 * MIB)

    @property
    def reserved(self) -> int:
        return sum(len(s.mapped) * s.page for s in (self.small, self.large))

    def allocate(self, key: int, size: int) -> None:
        segment = self.small if size <= MIB else self.large
        begin, missing = segment.place(size)
        if self.reserved + len(missing) * segment.page > self.limit_bytes:
            self.small.unmap_idle()
            self.large.unmap_idle()
            begin, missing = segment.place(size)
            if self.reserved + len(missing) * segment.page > self.limit_bytes:
                raise AllocatorFull
        segment.mapped |= missing
        segment.take(key, begin, size)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def release(self, key: int) -> None:
        (self.small if key in self.small.blocks else self.large).release(key)


def replay(events: list[tuple[int, int]], limit_bytes: int) -> Allocator:
    """Run a trace through the allocator."""
    allocator = Allocator(limit_bytes)
    for serial, change in events:
        if change > 0:
            allocator.allocate(serial, change)
        elif change < 0:
            allocator.release(serial)
    return allocator


def trace(preset: str, scale: str, micro_batch: int) -> tuple[list[tuple[int, int]], int]:
    """Return the storages of a training step of two micro-batches as a GPU has them, and their peak in bytes."""
    config = experiment(preset, scale)
    training = TrainingConfig(precision="bf16", optimizer=config.training.optimizer)
    counter = StorageCounter(block_bytes=CUDA_BLOCK_BYTES)
    with FakeTensorMode(), counter:
        training_step_peak(counter, config.model, training, micro_batch, 2, imitate_cuda=True)
    return counter.events, counter.peak_bytes


def test_blocks_fill_pages_and_leave_them() -> None:
    allocator = Allocator(100 * MIB)
    allocator.allocate(0, 512)
    allocator.allocate(1, MIB)
    assert allocator.reserved == 2 * MIB and allocator.small.blocks[1] == (512, 512 + MIB)
    allocator.allocate(2, 3 * MIB)
    assert allocator.reserved == 22 * MIB
    allocator.release(0)
    allocator.allocate(3, 256)  # the smallest hole that fits, not the end
    assert allocator.small.blocks[3] == (0, 256)
    assert allocator.reserved == 22 * MIB == allocator.peak_reserved


def test_idle_pages_are_given_back_before_a_request_fails() -> None:
    allocator = Allocator(70 * MIB)
    allocator.allocate(0, 30 * MIB)  # pages 0 and 1
    allocator.allocate(1, 10 * MIB)  # the rest of page 1
    allocator.release(0)
    allocator.allocate(2, 35 * MIB)  # behind it, pages 2 and 3: 80 MiB, were page 0 not unmapped
    assert allocator.reserved == 60 * MIB and allocator.large.mapped == {1, 2, 3}


def test_what_does_not_fit_is_refused() -> None:
    allocator = Allocator(41 * MIB)
    allocator.allocate(0, 30 * MIB)
    with pytest.raises(AllocatorFull):
        allocator.allocate(1, 15 * MIB)
    allocator.allocate(2, 10 * MIB)  # into the second page of the first block


@pytest.mark.parametrize(
    ("preset", "scale", "micro_batch"),
    [
        ("dense_baseline", "small", 8),
        ("full_hrs", "small", 4),
        ("v17_peer_only", "small", 2),
        ("dense_baseline", "paper", 2),
    ],
)
def test_a_step_fits_the_memory_that_is_reserved_for_its_peak(preset: str, scale: str, micro_batch: int) -> None:
    events, peak_bytes = trace(preset, scale, micro_batch)
    room = reserved_bytes(peak_bytes + CUDA_OVERHEAD_BYTES) - CUDA_OVERHEAD_BYTES
    allocator = replay(events, room)
    assert peak_bytes <= allocator.peak_reserved <= room
