"""Batches of a run on their device: on a GPU the next one is prepared and pinned by a thread during a step."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hrs.gpu import Gpu
from hrs.models.base import WindowContext

Batch = tuple[Tensor, WindowContext | None]
"""Token ids [B, T + 1] and what the model is told of the windows besides."""


class Batches:
    """The batch of each step, moved to a device.

    On a GPU a thread prepares the batch of the following step in page-locked memory, from which the copy is
    asynchronous. On the CPU nothing would be gained: there each batch is prepared when it is asked for.
    """

    def __init__(
        self, prepare: Callable[[int], Batch], steps: int, device: torch.device, gpu: Gpu | None = None
    ) -> None:
        """``prepare`` gives the batch of a step on the CPU, a function of the step alone that draws no random numbers;
        it is called by one thread at a time. ``gpu`` is the GPU on which ``device`` lies."""
        self._prepare, self._steps, self._device, self._gpu = prepare, steps, device, gpu
        self._ahead: tuple[int, Future[Batch]] | None = None
        self._thread: ThreadPoolExecutor | None = None
        if gpu is not None:
            self._thread = ThreadPoolExecutor(1, "batches", initializer=gpu.use_in_this_thread)

    def of(self, step: int) -> Batch:
        """Return the batch of a step on the device, and begin to prepare the next one.

        Raises:
            Exception: what preparing this batch raised, whenever that was.
        """
        if self._gpu is None or self._thread is None:
            return _move(self._prepare(step), lambda tensor: tensor.to(self._device))
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != step:
            ahead = step, self._thread.submit(self._prepare_pinned, step)
        batch = ahead[1].result()
        if step + 1 < self._steps:
            self._ahead = step + 1, self._thread.submit(self._prepare_pinned, step + 1)
        return _move(batch, lambda tensor: tensor.to(self._device, non_blocking=True))

    def close(self) -> None:
        """End the thread; the batch it prepares is dropped."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _prepare_pinned(self, step: int) -> Batch:
        gpu = self._gpu
        assert gpu is not None
        return _move(self._prepare(step), lambda tensor: gpu.pinned_empty(tensor.shape, tensor.dtype).copy_(tensor))


def _move(batch: Batch, move: Callable[[Tensor], Tensor]) -> Batch:
    tokens, context = batch
    return move(tokens), None if context is None else context.map(move)
