"""Any program as a stage: reserved, logged, measured, and told to stop like our own work.

    hrs queue add --gpu-gib 6 --name lr3e-4 -- python train.py --lr 3e-4

The program finds the GPU that it was given as its only one. It may print lines of JSON with numbers, such as
``{"step": 10, "loss": 2.3}``: they are the attempt's progress, and the last value of each name is the stage's result.
On SIGTERM it has a grace time to save what it has; a program that goes on from its own files when it is started again
loses nothing by that.
"""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import psutil

from hrs import strict_json
from hrs.errors import HRSError
from hrs.nvml import Nvml
from hrs.queue.attempts import Preempted, StageContext, TooLarge
from hrs.queue.records import Resources, RunSpec, StageSpec, StudySpec

FUNCTION = "hrs.queue.commands:run_command"
COMMANDS = "commands"
"""Title of the study of commands that belong to no other."""

_POLL_SECONDS = 0.5
_LAST_LINES = 20
_GROWTH = 1.25
"""What a command that ran out of memory reserves the next time, as a multiple of what it had."""

_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|CUDNN_STATUS_ALLOC_FAILED"
    r"|RESOURCE_EXHAUSTED",
    re.IGNORECASE,
)


def command_study(
    command: Sequence[str], *, name: str, cwd: Path, environment: Mapping[str, str], resources: Resources,
    study: str = COMMANDS, priority: int = 0,
) -> StudySpec:  # fmt: skip
    """Return a study of one command. The same command under the same name in the same folder is the same work.

    Raises:
        HRSError: if there is no command.
    """
    if not command:
        raise HRSError("there is no command: write it after --, as in 'hrs queue add -- python train.py'")
    payload = {"command": list(command), "cwd": str(cwd), "environment": dict(environment)}
    text = strict_json.dumps([name, payload], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    stage = StageSpec(key=key, kind="command", label=name, function=FUNCTION, payload=payload, resources=resources)
    run = RunSpec(key=key, label=name, definition={"command": list(command)}, stages=(key,))
    return StudySpec(title=study, definition={"kind": "commands"}, runs=(run,), stages=(stage,), priority=priority)


def run_command(context: StageContext, command: list[str], cwd: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a program to its end; returns the last value of each number that it printed, and its peak of memory.

    Raises:
        Preempted: if it was asked to stop and did.
        TooLarge: if it ran out of memory.
        HRSError: if it cannot be started, or ended with another status than 0.
    """
    try:
        process = subprocess.Popen(
            command, cwd=cwd, env=os.environ | dict(environment), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            pass_fds=_worker_lock(),
        )  # fmt: skip
    except OSError as error:
        raise HRSError(f"command {command[0]} cannot be started in {cwd} ({error.strerror}): check both") from error
    assert process.stdout is not None
    reader = _Reader(process.stdout, context)
    reader.start()
    asked = False
    peak = _Peak(process.pid, on_gpu=context.claim.stage.resources.gpu_bytes > 0)
    while process.poll() is None:
        if context.should_stop and not asked:
            process.terminate()
            asked = True
        peak.look()
        try:
            process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    reader.join()
    if asked and process.returncode != 0:
        raise Preempted("asked to stop")
    if process.returncode != 0:
        raise _failure(process.returncode, list(reader.last), context, peak)
    return {"metrics": reader.metrics, **peak.figures()}


def _worker_lock() -> tuple[int, ...]:
    """Return the descriptor that keeps this worker's lock, for the program to keep it, too: it holds the GPU."""
    number = os.environ.get("HRS_WORKER_LOCK")
    return (int(number),) if number else ()


def _failure(code: int, last: Sequence[str], context: StageContext, peak: "_Peak") -> HRSError:
    text = "\n".join(last)
    where = f"see 'hrs queue logs {context.claim.stage.key[:8]}'"
    if code < 0:
        name = signal.Signals(-code).name
        if -code == signal.SIGKILL:
            return TooLarge(f"the command was ended by {name}, as Linux does when memory is used up: {where}")
        return HRSError(f"the command was ended by {name}: {where}")
    ended = f"the command ended with status {code}: {last[-1].strip() if last else 'it printed nothing'} ({where})"
    if not _OUT_OF_MEMORY.search(text):
        return HRSError(ended)
    reserved = context.claim.stage.resources
    if not reserved.gpu_bytes:
        return TooLarge(ended)
    needed = max(int(reserved.gpu_bytes * _GROWTH), peak.gpu_bytes)
    return TooLarge(ended, replace(reserved, gpu_bytes=needed))


class _Reader(threading.Thread):
    """Copy what a program prints to our own output, and take numbers from lines of JSON."""

    def __init__(self, stream: IO[str], context: StageContext) -> None:
        super().__init__(name="output", daemon=True)
        self.metrics: dict[str, float] = {}
        self.last: deque[str] = deque(maxlen=_LAST_LINES)
        self._stream, self._context = stream, context

    def run(self) -> None:
        for line in self._stream:
            print(line, end="", flush=True)
            if line.strip():
                self.last.append(line)
            numbers = numbers_of(line)
            if numbers:
                self.metrics |= numbers
                self._context.report(**numbers)


def numbers_of(line: str) -> dict[str, float]:
    """Return the finite numbers of a line of JSON that is an object; empty for any other line."""
    if not line.lstrip().startswith("{"):
        return {}
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


class _Peak:
    """The most memory that a process and its descendants have held at the times when somebody looked."""

    def __init__(self, pid: int, *, on_gpu: bool) -> None:
        self.gpu_bytes = self.resident_bytes = 0
        self._process, self._on_gpu = psutil.Process(pid), on_gpu

    def look(self) -> None:
        """Measure now."""
        resident, pids = 0, set()
        try:
            for process in (self._process, *self._process.children(recursive=True)):
                resident += process.memory_info().rss
                pids.add(process.pid)
        except psutil.NoSuchProcess:
            return
        self.resident_bytes = max(self.resident_bytes, resident)
        if self._on_gpu:
            self.gpu_bytes = max(self.gpu_bytes, Nvml().used_by(pids))

    def figures(self) -> dict[str, int]:
        """Return what was seen."""
        found = {"peak_resident_bytes": self.resident_bytes}
        return found | ({"peak_gpu_bytes": self.gpu_bytes} if self.gpu_bytes else {})
