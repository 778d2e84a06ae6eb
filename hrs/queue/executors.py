"""Where attempts are made: in this process, or in one process each. Ray's is in :mod:`hrs.cluster`.

An executor starts claims on the places that admission chose and tells which attempts have ended. What an attempt did
stands in the queue; an executor only adds what a process that died could not say itself.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hrs import strict_json
from hrs.queue.admission import Gpu, Host
from hrs.queue.attempts import LOG_FILE, run_attempt, stage_directory
from hrs.queue.database import ENVIRONMENT
from hrs.queue.leases import LEASE_SECONDS, Worker, host_name
from hrs.queue.queue import Queue
from hrs.queue.records import Claim, StageSpec

GRACE_SECONDS = 30.0
"""What an attempt that is asked to stop may take to keep what it has computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """An attempt whose process ended."""

    claim: Claim
    message: str
    """Why, if it could not say so itself."""


class Executor(ABC):
    """Starts attempts. All implementations pass ``tests/queue/test_executors.py``."""

    hosts: Sequence[Host]
    """What it can place stages on."""
    at_once: int = 10**9
    """Most attempts to start in one step of a dispatcher."""

    @abstractmethod
    def start(self, stage: StageSpec, places: tuple[tuple[str, str], ...]) -> Claim:
        """Claim a stage and begin its attempt.

        Raises:
            TransitionRefused: if another dispatcher was faster.
        """

    @abstractmethod
    def ended(self) -> list[Ended]:
        """Return the attempts that have ended since the last call."""

    @abstractmethod
    def stop(self, claim: Claim) -> None:
        """Ask an attempt to stop; one that does not within :data:`GRACE_SECONDS` is killed."""

    @abstractmethod
    def close(self) -> None:
        """Stop all attempts and wait for them."""


class InlineExecutor(Executor):
    """Makes attempts in this process, one after another: a debugger works."""

    at_once = 1

    def __init__(self, queue: Queue, root: Path, *, gpus: tuple[Gpu, ...] = ()) -> None:
        self._queue, self._root = queue, root
        self._worker = Worker(queue, root / "workers")
        self.hosts = (Host(name=host_name(), cpus=float("inf"), gpus=gpus),)
        self._ended: list[Ended] = []

    def start(self, stage: StageSpec, places: tuple[tuple[str, str], ...]) -> Claim:
        claim = self._queue.claim(stage.key, self._worker.id, device=places[0][1])
        run_attempt(self._queue, claim, self._root)
        self._ended.append(Ended(claim=claim, message=""))
        return claim

    def ended(self) -> list[Ended]:
        ended, self._ended = self._ended, []
        return ended

    def stop(self, claim: Claim) -> None:
        """Do nothing: no attempt is ever under way when this is called."""

    def close(self) -> None:
        self._worker.close()


@dataclass(kw_only=True, slots=True)
class _Child:
    claim: Claim
    process: subprocess.Popen[bytes]
    kill_at: float | None = None


class ProcessExecutor(Executor):
    """Makes every attempt in a process group of its own on this machine, without Ray.

    A process keeps its worker's lock as long as any of its group lives, and sees only the GPU that it was given.
    """

    def __init__(
        self, queue: Queue, root: Path, *, cpus: float | None = None, gpus: tuple[Gpu, ...] = (),
        lease_seconds: float = LEASE_SECONDS, grace_seconds: float = GRACE_SECONDS,
    ) -> None:  # fmt: skip
        self._queue, self._root = queue, root
        self._lease, self._grace = lease_seconds, grace_seconds
        cpus = float(len(os.sched_getaffinity(0))) if cpus is None else cpus
        self.hosts = (Host(name=host_name(), cpus=cpus, gpus=gpus),)
        self._children: list[_Child] = []

    def start(self, stage: StageSpec, places: tuple[tuple[str, str], ...]) -> Claim:
        gpu = places[0][1]
        worker = Worker(self._queue, self._root / "workers")
        claim = self._queue.claim(stage.key, worker.id, device=gpu)
        arguments = {"attempt": claim.attempt, "root": str(self._root), "lease_seconds": self._lease}
        directory = stage_directory(self._root, stage.key)
        directory.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": gpu.removeprefix("cuda:"), "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "HRS_GPU_BYTES": str(stage.resources.gpu_bytes), "HRS_WORKER_LOCK": str(worker.fileno()),
            ENVIRONMENT: self._queue.database.url,  # not an argument, which every user of the machine can read
        }  # fmt: skip
        with (directory / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "hrs.queue", strict_json.dumps(arguments)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                pass_fds=(worker.fileno(),), env=environment,
            )  # fmt: skip
        worker.hand_over()
        self._children.append(_Child(claim=claim, process=process))
        return claim

    def ended(self) -> list[Ended]:
        ended = []
        for child in list(self._children):
            if child.kill_at is not None and time.monotonic() > child.kill_at:
                _signal_group(child.process, signal.SIGKILL)
            if _has_ended(child.process):
                _signal_group(child.process, signal.SIGKILL)  # what it left behind would keep its GPU
                self._children.remove(child)
                ended.append(Ended(claim=child.claim, message=_death(child, child.process.wait())))
        return ended

    def stop(self, claim: Claim) -> None:
        for child in self._children:
            if child.claim.attempt == claim.attempt and child.kill_at is None:
                child.process.terminate()
                child.kill_at = time.monotonic() + self._grace

    def close(self) -> None:
        for child in self._children:
            self.stop(child.claim)
        while self._children:
            for ended in self.ended():
                self._queue.note_death(ended.claim, ended.message)
            time.sleep(0.02)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a child has ended, and leave it a zombie: until it is waited for, nobody else gets its id."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _death(child: _Child, code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        asked = f" after it had {GRACE_SECONDS:.0f} s to stop" if child.kill_at is not None else ""
        return f"process {child.process.pid} was ended by {name}{asked}"
    return f"process {child.process.pid} ended with status {code} before it could say why: see its log"
