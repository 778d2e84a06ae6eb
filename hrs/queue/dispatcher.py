"""Feed an executor from the queue: claim what fits, carry out what the user wants, take over from the dead.

Any number of dispatchers may work on one queue and die at any moment. One that starts finds the attempts of others that
still live, counts what they hold, and reaps the rest.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from hrs.queue.admission import FOREVER, Host, Tenant, admit
from hrs.queue.executors import Executor
from hrs.queue.leases import LEASE_SECONDS, Reaper
from hrs.queue.queue import Queue
from hrs.queue.records import Attempt, Claim, StageSpec
from hrs.queue.states import Wanted
from hrs.queue.transitions import TransitionRefused

GIB = 2**30


class Dispatcher:
    """Works on a queue through an executor.

    Args:
        root: of the storage.
    """

    def __init__(self, queue: Queue, executor: Executor, root: Path, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._queue, self._executor = queue, executor
        self._reaper = Reaper(queue, root / "workers", lease_seconds=lease_seconds)
        self._mine: dict[int, Claim] = {}

    def run(self, until: Callable[[], bool], *, poll_seconds: float = 0.1) -> None:
        """Work until ``until`` returns True, then stop what still runs. It is asked after every step."""
        try:
            while True:
                self.step()
                if until():
                    return
                time.sleep(poll_seconds)
        finally:
            self._executor.close()

    def step(self) -> int:
        """Do what can be done now; returns how many attempts were started."""
        for ended in self._executor.ended():
            self._mine.pop(ended.claim.attempt, None)
            self._queue.note_death(ended.claim, ended.message)
        self._reaper.reap()
        opened = self._queue.open_attempts()
        for attempt in opened:
            if attempt.wanted is not Wanted.RUN and attempt.claim.attempt in self._mine:
                self._executor.stop(attempt.claim)
        decision = admit(
            self._queue.candidates(), self._executor.hosts, self._tenants(opened), time.time() / 60,
            limit=self._executor.at_once,
        )  # fmt: skip
        for stage in decision.impossible:
            self._queue.rule_out(stage.key, _too_large(stage, self._executor.hosts))
        started = 0
        for placement in decision.placements:
            try:
                claim = self._executor.start(placement.stage, placement.places)
            except TransitionRefused:  # another dispatcher was faster, or it is not wanted any more
                continue
            self._mine[claim.attempt] = claim
            started += 1
        return started

    def _tenants(self, opened: Iterable[Attempt]) -> list[Tenant]:
        """Return what the attempts of all dispatchers hold."""
        return [
            Tenant(
                host=attempt.host, gpu=attempt.device, cpus=attempt.reserved.cpus,
                gpu_bytes=attempt.reserved.gpu_bytes, busy_frac=attempt.reserved.busy_frac,
                ends_minutes=attempt.claimed / 60 + attempt.reserved.minutes if attempt.reserved.minutes else FOREVER,
            )
            for attempt in opened
        ]  # fmt: skip


def _too_large(stage: StageSpec, hosts: Iterable[Host]) -> str:
    """Return a sentence that says why a stage fits nowhere."""
    wanted = stage.resources
    if wanted.gpu_bytes:
        largest = max((gpu.bytes for host in hosts for gpu in host.gpus), default=0)
        if wanted.gpu_bytes > largest:
            found = f"the largest here has {largest / GIB:.1f} GiB for it" if largest else "there is none here"
            return f"it needs a GPU with {wanted.gpu_bytes / GIB:.1f} GiB and {found}"
    cpus = max((host.cpus for host in hosts), default=0)
    return f"it needs {wanted.workers} x {wanted.cpus:g} cores and the largest machine has {cpus:g}"
