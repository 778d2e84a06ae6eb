"""Claims of dead holders are taken away, those of living ones are not: whatever clocks say."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from queue_studies import Clock, study
from sqlalchemy import URL
from waiting import wait_until

from hrs.queue import Heartbeat, LeaseLost, Outcome, Queue, Reaper, State, Wanted, Worker, database
from hrs.queue.database import Database
from hrs.queue.leases import LEASE_SECONDS, host_name, is_alive


@pytest.fixture
def local(tmp_path: Path) -> Queue:
    queue = Queue(Database(URL.create("sqlite", database=str(tmp_path / "queue.db"))))
    queue.submit(study("s", "a"))
    return queue


def test_a_silent_holder_elsewhere_loses_its_claim_after_a_lease(queue: Queue, tmp_path: Path) -> None:
    queue.submit(study("s", "a"))
    claim = queue.claim("tokens", queue.add_worker("another host", 1))
    clock = Clock()
    reaper = Reaper(queue, tmp_path, clock=clock)
    assert reaper.reap() == []
    clock.time += LEASE_SECONDS - 1
    assert reaper.reap() == []
    queue.renew(claim)
    clock.time += LEASE_SECONDS - 1
    assert reaper.reap() == []
    clock.time += LEASE_SECONDS
    assert [lost.attempt for lost in reaper.reap()] == [claim.attempt]
    with pytest.raises(LeaseLost):
        queue.renew(claim)


def test_a_clock_that_jumps_takes_nothing_away(queue: Queue, clock: Clock, tmp_path: Path) -> None:
    queue.submit(study("s", "a"))
    claim = queue.claim("tokens", queue.add_worker("another host", 1))
    reaper = Reaper(queue, tmp_path, clock=Clock())
    for jump in (10**6, -2 * 10**6):
        clock.time += jump
        assert reaper.reap() == []
    assert queue.renew(claim) is Wanted.RUN


def test_a_new_reaper_watches_a_whole_lease_itself(queue: Queue, tmp_path: Path) -> None:
    queue.submit(study("s", "a"))
    queue.claim("tokens", queue.add_worker("another host", 1))
    clock = Clock()
    clock.time += 10 * LEASE_SECONDS
    assert Reaper(queue, tmp_path, clock=clock).reap() == []


def test_of_two_reapers_one_takes_the_claim(queue: Queue, tmp_path: Path) -> None:
    queue.submit(study("s", "a"))
    queue.claim("tokens", queue.add_worker(host_name(), 1))  # holds no lock
    assert len(Reaper(queue, tmp_path).reap()) == 1
    assert Reaper(queue, tmp_path).reap() == []


_CLAIM = """
import sys, time
from pathlib import Path
from hrs.queue import Worker, open_queue
queue = open_queue(Path(sys.argv[1]))
worker = Worker(queue, Path(sys.argv[2]))
queue.claim("tokens", worker.id)
print(worker.id, flush=True)
time.sleep(600)
"""


def test_a_killed_process_of_this_host_is_known_at_once(local: Queue, tmp_path: Path) -> None:
    locks = tmp_path / "locks"
    process = subprocess.Popen(
        [sys.executable, "-c", _CLAIM, str(tmp_path), str(locks)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    worker = process.stdout.readline().strip()
    assert is_alive(locks, worker)
    reaper = Reaper(local, locks)
    assert reaper.reap() == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_alive(locks, worker)
    (lost,) = reaper.reap()
    assert lost.stage.key == "tokens"


def test_a_stopped_process_loses_its_claim_and_hears_of_it(local: Queue, tmp_path: Path) -> None:
    """Its lock is held, but it does nothing."""
    clock, worker = Clock(), Worker(local, tmp_path)
    claim = local.claim("tokens", worker.id)
    reaper = Reaper(local, tmp_path, clock=clock)
    reaper.reap()
    clock.time += LEASE_SECONDS
    assert len(reaper.reap()) == 1
    with Heartbeat(local, claim, every_seconds=0.01) as heart:
        wait_until(lambda: heart.lost)
    worker.close()


def test_a_heart_beats_and_hears_what_is_wanted(local: Queue, tmp_path: Path) -> None:
    worker = Worker(local, tmp_path)
    claim = local.claim("tokens", worker.id)
    steps = iter(range(10**6))
    with Heartbeat(local, claim, every_seconds=0.01, progress=lambda: {"step": next(steps)}) as heart:
        local.want(Wanted.PAUSE, local.target("s"))
        wait_until(lambda: heart.wanted is Wanted.PAUSE)
        wait_until(lambda: (local.open_attempts()[0].progress or {"step": 0})["step"] > 1)
    beats = local.open_attempts()[0].beats
    assert beats > 1
    time.sleep(0.05)
    assert local.open_attempts()[0].beats == beats, "no beat after the end"
    assert local.give_up(claim, Outcome.PREEMPTED, "") is State.PAUSED
    worker.close()


def test_a_heart_survives_a_database_that_is_locked_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    queue = Queue(Database(URL.create("sqlite", database=str(tmp_path / "queue.db"))))
    queue.submit(study("s", "a"))
    claim = queue.claim("tokens", queue.add_worker(host_name(), os.getpid()))
    other = sqlite3.connect(tmp_path / "queue.db", isolation_level=None)
    with Heartbeat(queue, claim, every_seconds=0.01) as heart:
        other.execute("BEGIN IMMEDIATE")
        wait_until(lambda: "claim not renewed: queue database" in caplog.text)
        other.execute("ROLLBACK")
        beats = queue.open_attempts()[0].beats
        wait_until(lambda: queue.open_attempts()[0].beats > beats)
        assert not heart.lost
    other.close()
