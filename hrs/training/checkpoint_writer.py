"""Checkpoints written by a thread while training goes on, and the rule that says after which steps.

The training thread copies the state of one step into host memory that is used again for every checkpoint. On a GPU the
copies are queued behind the step and in front of the next one, so that nothing waits. A thread then hashes, writes,
syncs and renames (:func:`hrs.training.checkpoint.write_checkpoint`). One checkpoint is in flight at a time, so the host
memory that this takes is that of one checkpoint (:attr:`CheckpointWriter.host_bytes`).
"""

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hrs import strict_json
from hrs.gpu import Gpu
from hrs.training.averaging import Averages
from hrs.training.checkpoint import AVERAGES, KEPT, TRAINER, WEIGHTS, write_checkpoint
from hrs.training.randomness import get_rng
from hrs.training.runtime import Runtime

SHORTEST_SECONDS, LONGEST_SECONDS = 10.0, 600.0
"""Bounds of the time between two checkpoints when the runtime does not say it."""
BYTES_PER_SECOND = 1e6
"""Mean rate of writing within these bounds: a disk that takes 100 MB/s is busy 1 % of the time."""

THREAD_NAME = "checkpoint writer"


def interval_seconds(checkpoint_bytes: int) -> float:
    """Return the seconds between two checkpoints of this size, when the runtime does not say it."""
    return min(max(checkpoint_bytes / BYTES_PER_SECOND, SHORTEST_SECONDS), LONGEST_SECONDS)


class CheckpointSchedule:
    """Decide after which steps a checkpoint is due: after the last one, and by steps or by time in between."""

    def __init__(self, runtime: Runtime, steps: int) -> None:
        self.by_time = runtime.checkpoint_every is None
        self._every, self._minutes, self._steps = runtime.checkpoint_every, runtime.checkpoint_minutes, steps
        self._last_seconds = time.monotonic()

    def due(self, step: int, checkpoint_bytes: int) -> bool:
        """Return True if a checkpoint is due after ``step`` steps; ``checkpoint_bytes`` is its size."""
        if step == self._steps:
            return True
        if self._every is not None:
            return step % self._every == 0
        interval = interval_seconds(checkpoint_bytes) if self._minutes is None else 60 * self._minutes
        return time.monotonic() - self._last_seconds >= interval

    def taken(self) -> None:
        """Measure the time to the next checkpoint from now."""
        self._last_seconds = time.monotonic()


class CheckpointWriter:
    """Write checkpoints of one run in a thread, one at a time."""

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        averages: Averages | None = None,
        gpu: Gpu | None = None,
    ) -> None:
        """``gpu`` is the GPU on which ``device`` lies; None copies synchronously."""
        self._directory, self._model, self._optimizer, self._device = directory, model, optimizer, device
        self._averages, self._gpu = averages, gpu
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._checkpoint_bytes = 0

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the tensors of the last checkpoint; before there is one, of the state at the first call."""
        if not self._checkpoint_bytes:
            self._checkpoint_bytes = _bytes_of(self._state_tensors())
        return self._checkpoint_bytes

    @property
    def host_bytes(self) -> int:
        """Host memory held for copies; pinned if there is a GPU."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def begin(self, state: Mapping[str, Any]) -> None:
        """Copy the state of this moment and write it in the background, after waiting for the write in flight.

        Args:
            state: JSON values, with ``step``; what the caller changes afterwards is not seen.

        Raises:
            HRSError: if the write before failed.
        """
        self.wait()
        files = self._copies()
        self._checkpoint_bytes = _bytes_of(files)
        event = None if self._gpu is None else self._gpu.record_event()
        state = json.loads(strict_json.dumps(state))
        thread = threading.Thread(target=self._write, args=(state, files, event), name=THREAD_NAME)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending and starts no thread any more
            self._write(state, files, event)
        else:
            self._thread = thread

    def wait(self) -> None:
        """Wait for the write in flight, if there is one.

        Raises:
            HRSError: if it failed, or one before that was not waited for; once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        """Raise what :meth:`wait` raises, without waiting."""
        if self._error is not None and not self.busy:
            error, self._error = self._error, None
            raise error

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything but random states, by file and name; tensors that training goes on changing."""
        moments = {
            f"moments/{kind}/{name}": value
            for name, parameter in self._model.named_parameters()
            for kind, value in self._optimizer.state.get(parameter, {}).items()  # none of parameters that only rested
        }
        files = {WEIGHTS: self._model.state_dict(), TRAINER: moments}
        if self._averages is not None and (averages := self._averages.tensors()):
            files[AVERAGES] = averages
        if self._averages is not None and self._averages.kept is not None:
            files[KEPT] = self._averages.kept.weights
        return files

    @torch.no_grad()
    def _copies(self) -> dict[str, dict[str, Tensor]]:
        found = self._state_tensors()
        kept = {file: found.pop(file) for file in (KEPT,) if file in found}  # never changed once they are set aside
        files = {
            file: {name: self._copy((file, name), value.detach()) for name, value in content.items()}
            for file, content in found.items()
        }
        files[TRAINER] |= {f"rng/{kind}": value for kind, value in get_rng(self._device).items()}
        return files | kept

    def _copy(self, key: tuple[str, str], value: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            allocate = torch.empty if self._gpu is None else self._gpu.pinned_empty
            buffer = self._buffers[key] = allocate(value.shape, dtype=value.dtype)
        return buffer.copy_(value, non_blocking=True)

    def _write(self, state: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]], event: Any) -> None:
        try:
            if self._gpu is not None:
                self._gpu.use_in_this_thread()
                event.synchronize()
            write_checkpoint(self._directory, state, files)
        except BaseException as error:
            self._error = error


def _bytes_of(files: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(tensor.nbytes for content in files.values() for tensor in content.values())


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    device: torch.device,
    averages: Averages | None = None,
) -> Path:
    """Write one checkpoint and return its folder when it is on the disk.

    Raises:
        HRSError: if the disk refuses; checkpoints written before stay as they are.
    """
    return write_checkpoint(directory, state, CheckpointWriter(directory, model, optimizer, device, averages)._copies())
