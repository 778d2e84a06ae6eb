"""Disturb a queue while two dispatchers work on it, and compare what comes out with a calm run, byte by byte.

    python -m benchmarks.chaos --faults 200 --seed 1

The stages compute random walks step by step, keep their state in a file as training keeps checkpoints, and read each
other's results. Faults are drawn by the seed: attempts, whole process groups and dispatchers are killed, attempts are
stopped for longer than their lease and wake up as zombies, dispatchers are stopped, the database is locked, and
everything is killed at once. Prints the number of faults by kind, and of stages that were lost, done twice or stuck.
"""

import argparse
import collections
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import select

from hrs.queue import Outcome, Queue, Resources, RunSpec, StageSpec, State, StudySpec, open_queue
from hrs.queue.attempts import Preempted, StageContext, read_result
from hrs.queue.database import Database, queue_url
from hrs.queue.dispatcher import Dispatcher
from hrs.queue.executors import ProcessExecutor
from hrs.queue.schema import attempts, stages

LEASE_SECONDS = 2.0
MOST_LOST = 1000
"""Attempts are killed far more often here than they get further."""


# ---- the work --------------------------------------------------------------------------------------------------------


def walk(context: StageContext, seed: int, steps: int, seconds: float, inputs: list[str]) -> dict[str, Any]:
    """Take ``steps`` random steps from the sum of the inputs' results."""
    path = context.directory / "state.json"
    if path.exists():
        state = json.loads(path.read_text())
    else:
        state = {"step": 0, "place": sum(context.input_result(key)["place"] for key in inputs)}
    while state["step"] < steps:
        if context.should_stop:
            raise Preempted
        move = random.Random(f"{seed}/{state['step']}").gauss(0, 1)
        state = {"step": state["step"] + 1, "place": state["place"] + move}
        part = path.with_name(f"state.{context.claim.token}.part")
        part.write_text(json.dumps(state))
        part.rename(path)
        context.report(step=state["step"], steps=steps)
        time.sleep(seconds)
    return {"place": state["place"]}


def study_of(n_chains: int, length: int, seconds: float) -> StudySpec:
    """Return chains of stages over a common first one, and a last one that reads them all."""
    made = [_stage("first", [], 0, seconds)]
    for chain in range(n_chains):
        before = "first"
        for place in range(length):
            key = f"c{chain}-{place}"
            made.append(_stage(key, [before], len(made), seconds))
            before = key
    made.append(_stage("last", [f"c{chain}-{length - 1}" for chain in range(n_chains)], len(made), seconds))
    run = RunSpec(key="run", label="run", definition={}, stages=tuple(stage.key for stage in made))
    return StudySpec(title="chaos", definition={}, runs=(run,), stages=tuple(made))


def _stage(key: str, inputs: list[str], seed: int, seconds: float) -> StageSpec:
    payload = {"seed": seed, "steps": 25, "seconds": seconds, "inputs": inputs}
    return StageSpec(
        key=key, kind="walk", label=key, function="benchmarks.chaos:walk", payload=payload, inputs=tuple(inputs),
        resources=Resources(cpus=0.5),
    )  # fmt: skip


def dispatch(root: Path) -> None:
    """Work on the queue below ``root`` until all its stages are finished or can never be."""
    queue = Queue(Database(queue_url(root)), most_lost=MOST_LOST)
    executor = ProcessExecutor(queue, root, cpus=2, lease_seconds=LEASE_SECONDS, grace_seconds=5)
    Dispatcher(queue, executor, root, lease_seconds=LEASE_SECONDS).run(lambda: _settled(queue), poll_seconds=0.05)


def _settled(queue: Queue) -> bool:
    with queue.database.read() as connection:
        states = set(connection.execute(select(stages.c.state)).scalars())
    return not states & {State.QUEUED, State.RUNNING} and (State.WAITING not in states or State.FAILED in states)


# ---- the faults ------------------------------------------------------------------------------------------------------


class Disturber:
    """Draws faults and carries them out."""

    def __init__(self, root: Path, n_dispatchers: int, seed: int) -> None:
        self.root, self.draw = root, random.Random(seed)
        self.done: collections.Counter[str] = collections.Counter()
        self.dispatchers = [self._new_dispatcher() for _ in range(n_dispatchers)]
        self.queue = open_queue(root)
        self._waking: list[tuple[float, int]] = []
        self.faults: dict[str, Callable[[], bool]] = {
            "attempt killed": lambda: self._signal_attempt(signal.SIGKILL),
            "process group killed": lambda: self._signal_attempt(signal.SIGKILL, group=True),
            "attempt stopped beyond its lease": lambda: self._stop_attempt(3 * LEASE_SECONDS),
            "attempt stopped for a moment": lambda: self._stop_attempt(0.5),
            "dispatcher killed": lambda: self._signal_dispatcher(signal.SIGKILL),
            "dispatcher interrupted": lambda: self._signal_dispatcher(signal.SIGINT),
            "dispatcher stopped": self._stop_dispatcher,
            "database locked": self._lock,
            "everything killed": self._kill_all,
        }

    def _new_dispatcher(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.chaos", "--dispatch", str(self.root)]
        with (self.root / "dispatchers.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def disturb(self) -> None:
        """Do one fault, if there is something to disturb."""
        weights = [1 if name == "everything killed" else 12 if "attempt" in name else 4 for name in self.faults]
        (name,) = self.draw.choices(list(self.faults), weights)
        if self.faults[name]():
            self.done[name] += 1

    def tend(self, *, start: bool = True) -> None:
        """Wake what was stopped long enough, and start dispatchers in place of dead ones."""
        for wake_at, pid in list(self._waking):
            if time.monotonic() >= wake_at:
                self._waking.remove((wake_at, pid))
                _signal(pid, signal.SIGCONT)
        for i, dispatcher in enumerate(self.dispatchers):
            if dispatcher.poll() is not None and start:
                self.dispatchers[i] = self._new_dispatcher()

    def _attempt_pids(self) -> list[int]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if "hrs.queue" in command and str(self.root) in command[-1]:
                found.append(process.pid)
        return sorted(found)

    def _signal_attempt(self, number: signal.Signals, *, group: bool = False) -> bool:
        pids = self._attempt_pids()
        return bool(pids) and _signal(self.draw.choice(pids), number, group=group)

    def _stop_attempt(self, seconds: float) -> bool:
        pids = self._attempt_pids()
        if not pids:
            return False
        pid = self.draw.choice(pids)
        self._waking.append((time.monotonic() + seconds, pid))
        return _signal(pid, signal.SIGSTOP)

    def _signal_dispatcher(self, number: signal.Signals) -> bool:
        dispatcher = self.draw.choice(self.dispatchers)
        return dispatcher.poll() is None and _signal(dispatcher.pid, number)

    def _stop_dispatcher(self) -> bool:
        dispatcher = self.draw.choice(self.dispatchers)
        self._waking.append((time.monotonic() + 2 * LEASE_SECONDS, dispatcher.pid))
        return dispatcher.poll() is None and _signal(dispatcher.pid, signal.SIGSTOP)

    def _lock(self) -> bool:
        other = sqlite3.connect(self.root / "queue.db", isolation_level=None, timeout=60)
        other.execute("BEGIN IMMEDIATE")
        time.sleep(0.5)
        other.execute("ROLLBACK")
        other.close()
        return True

    def _kill_all(self) -> bool:
        for dispatcher in self.dispatchers:
            _signal(dispatcher.pid, signal.SIGKILL)
        for pid in self._attempt_pids():
            _signal(pid, signal.SIGKILL)
        return True

    def close(self) -> None:
        """Wake and wait for everything."""
        for _, pid in self._waking:
            _signal(pid, signal.SIGCONT)
        for dispatcher in self.dispatchers:
            dispatcher.wait()
        self.queue.database.close()


def _signal(pid: int, number: signal.Signals, *, group: bool = False) -> bool:
    try:
        os.killpg(pid, number) if group else os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


# ---- the verdict -----------------------------------------------------------------------------------------------------


def verdict(root: Path, calm: Path, keys: list[str]) -> dict[str, int]:
    """Return the number of stages that were lost, finished twice, or differ from the calm run."""
    queue = open_queue(root)
    with queue.database.read() as connection:
        states = {row.key: row.state for row in connection.execute(select(stages))}
        tries = connection.execute(select(attempts)).all()
    queue.database.close()
    finished = collections.Counter(row.stage_key for row in tries if row.outcome == Outcome.FINISHED)
    return {
        "lost": sum(states.get(key) != State.FINISHED for key in keys),
        "doubled": sum(finished[key] > 1 for key in keys),
        "stuck": sum(row.ended is None for row in tries),
        "different": sum(
            states.get(key) == State.FINISHED and read_result(root, key) != read_result(calm, key) for key in keys
        ),
    }


def run(folder: Path, *, faults: int, seed: int, chains: int, length: int, seconds: float) -> dict[str, Any]:
    """Run the study in peace and in chaos; returns the faults by kind and the verdict."""
    study = study_of(chains, length, seconds)
    roots = folder / "calm", folder / "chaos"
    for root in roots:
        root.mkdir()
        queue = open_queue(root)
        queue.submit(study)
        queue.database.close()
    dispatch(roots[0])
    disturber = Disturber(roots[1], 2, seed)
    try:
        while not _settled(disturber.queue):
            disturber.tend()
            if sum(disturber.done.values()) < faults:
                disturber.disturb()
            time.sleep(disturber.draw.uniform(0.0, 0.6))
    finally:
        disturber.close()
    found = verdict(roots[1], roots[0], [stage.key for stage in study.stages])
    return {"stages": len(study.stages), "faults": dict(disturber.done), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--length", type=int, default=6, help="stages in each chain")
    parser.add_argument("--seconds", type=float, default=0.05, help="per step, of 25 in each stage")
    parser.add_argument("--dispatch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dispatch:
        dispatch(args.dispatch)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = run(
            Path(folder), faults=args.faults, seed=args.seed, chains=args.chains, length=args.length,
            seconds=args.seconds,
        )  # fmt: skip
    kinds = found.pop("faults")
    for name, n in sorted(kinds.items()):
        print(f"{n:5}  {name}")
    print(f"{sum(kinds.values()):5}  faults over {found.pop('stages')} stages, two dispatchers")
    print(", ".join(f"{n} {name}" for name, n in found.items()))
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
