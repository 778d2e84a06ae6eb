"""Who is alive: holders of claims show it, reapers take claims away from those that do not.

A reaper trusts no clock but its own: a lease ends when the reaper itself has watched its counter stand still for
:data:`LEASE_SECONDS`, so a clock that jumps, or one of another machine that is wrong, takes nothing away from anybody.
On its own host it also has a second witness, which knows at once: a file that every worker keeps locked, and that the
kernel unlocks when the process ends, whatever ended it.
"""

import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from hrs.errors import HRSError
from hrs.queue.queue import LeaseLost, Queue
from hrs.queue.records import Attempt, Claim
from hrs.queue.states import Outcome, Wanted

LEASE_SECONDS = 30.0
"""A claim whose holder was not heard of for so long is taken away."""

_log = logging.getLogger(__name__)


@cache
def host_name() -> str:
    """Return a name of this machine since it was started: process ids mean nothing after that."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text(encoding='utf-8').strip()[:8] if boot.exists() else '?'}"


class Worker:
    """A process that makes attempts: registered in the queue, and alive as long as its file is locked.

    Args:
        folder: of the lock files, the same for all processes of a host.
    """

    def __init__(self, queue: Queue, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.id = queue.add_worker(host_name(), os.getpid())
        self._path = folder / f"{self.id}.lock"
        self._file: IO[str] = self._path.open("w", encoding="utf-8")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def fileno(self) -> int:
        """Return the descriptor of the locked file, for a child process that shall keep it locked."""
        return self._file.fileno()

    def hand_over(self) -> None:
        """Close this process's descriptor; the lock is held as long as a child has one."""
        self._file.close()

    def close(self) -> None:
        """Unlock and remove the file."""
        self._path.unlink(missing_ok=True)
        self._file.close()


def is_alive(folder: Path, worker: str) -> bool:
    """Return whether a worker of this host holds its lock."""
    try:
        with (folder / f"{worker}.lock").open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


class Heartbeat:
    """Renew a claim from a thread while the ``with`` block runs, from before its set-up to its end.

    Args:
        progress: called at each renewal for what people see of the attempt, as JSON.
    """

    def __init__(
        self, queue: Queue, claim: Claim, *, every_seconds: float = LEASE_SECONDS / 3,
        progress: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:  # fmt: skip
        self.wanted = Wanted.RUN
        """What the user wants of the stage, as of the last renewal."""
        self.lost = False
        """True if the claim was taken away: nothing that its holder does counts any more."""
        self._queue, self._claim, self._every, self._progress = queue, claim, every_seconds, progress
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        done = False
        while not self.lost:
            try:
                self.wanted = self._queue.renew(self._claim, self._progress())
            except LeaseLost:
                self.lost = True
            except HRSError as error:  # a database that is locked or gone for a moment: the next beat may come through
                _log.warning("claim not renewed: %s", error)
            if done:  # that was the last one, with the last progress
                return
            done = self._done.wait(self._every)


class Reaper:
    """Take claims away from holders that are dead; part of every dispatcher.

    Args:
        folder: of the lock files of this host's workers.
        clock: seconds that never jump.
    """

    def __init__(
        self, queue: Queue, folder: Path, *, lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._queue, self._folder, self._lease, self._clock = queue, folder, lease_seconds, clock
        self._watched: dict[int, tuple[int, float]] = {}

    def reap(self) -> list[Claim]:
        """Give up the attempts of dead holders as lost; returns their claims."""
        now, reaped, watched = self._clock(), [], {}
        for attempt in self._queue.open_attempts():
            claim = attempt.claim
            beats, since = self._watched.get(claim.attempt, (-1, now))
            since = since if beats == attempt.beats else now
            watched[claim.attempt] = (attempt.beats, since)
            reason = self._death(attempt, now - since)
            if reason is not None:
                try:
                    self._queue.give_up(claim, Outcome.LOST, reason)
                except LeaseLost:
                    continue  # it ended, or another reaper was faster
                reaped.append(claim)
        self._watched = watched
        return reaped

    def _death(self, attempt: Attempt, silent_seconds: float) -> str | None:
        """Return why a holder counts as dead; None if it does not."""
        if attempt.host == host_name() and not is_alive(self._folder, attempt.worker):
            return f"process {attempt.pid} is gone"
        if silent_seconds >= self._lease:
            host = attempt.host.split("/")[0]
            return f"nothing was heard of process {attempt.pid} on {host} for {silent_seconds:.0f} s"
        return None
