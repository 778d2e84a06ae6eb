"""The durable queue: what should be computed, what was, and who is computing what.

    queue = open_queue(storage.root)
    queue.submit(StudySpec(title="v1-tiny", ...))
    worker = queue.add_worker(host, pid)
    for candidate in queue.candidates():
        claim = queue.claim(candidate.key, worker)

Any number of processes may use one queue and die at any moment. A claim carries a token that grows with every claim of
its stage; what its holder does afterwards counts only while the token is the stage's present one.
"""

import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from hrs.errors import HRSError
from hrs.queue.database import Database, queue_url
from hrs.queue.records import Attempt, Claim, Resources, StageSpec, StudySpec, Submitted
from hrs.queue.schema import attempts, inputs, measurements, members, runs, stages, studies, workers
from hrs.queue.states import RESTING, Outcome, State, Wanted
from hrs.queue.targets import Target, find_target
from hrs.queue.transitions import batches, change, record, refresh, release, resting_state

MOST_LOST = 3
"""A stage that is lost more often than this in a row, without getting further in between, has failed."""
FIRST_BACK_OFF_SECONDS = 2.0
"""How long a lost stage rests before it is claimed again; doubled with every loss in a row."""


class LeaseLost(HRSError):
    """The holder of a claim was taken for dead, and its stage belongs to somebody else."""


class Queue:
    """See the module. All methods raise HRSError in one sentence if the database cannot be used.

    Args:
        database: with its tables.
        clock: seconds since the epoch; for ages, back-off and what people read, never to judge who is alive.
        most_lost: see :data:`MOST_LOST`.
    """

    def __init__(
        self, database: Database, clock: Callable[[], float] = time.time, *, most_lost: int = MOST_LOST
    ) -> None:
        self.database = database
        self.now = clock
        self._most_lost = most_lost

    # ---- submitting --------------------------------------------------------------------------------------------------

    def submit(self, study: StudySpec, *, extend: bool = False) -> Submitted:
        """Put a study into the queue. Submitting the same study again changes nothing, but wants it to run.

        Args:
            extend: add the runs to a study of that title which has another definition; the new one takes its place.

        Raises:
            HRSError: if another study has that title and ``extend`` is False.
        """
        _check(study)
        now = self.now()
        with self.database.write() as connection:
            study_id = self._open_study(connection, study, now, extend=extend)
            new, finished = self._add_stages(connection, study.stages, now)
            known_runs = set(connection.execute(select(runs.c.key).where(runs.c.study_id == study_id)).scalars())
            added = [run for run in study.runs if run.key not in known_runs]
            rows = [
                {"study_id": study_id, "key": run.key, "label": run.label, "position": position,
                 "definition": dict(run.definition)}
                for position, run in enumerate(added, start=len(known_runs))
            ]  # fmt: skip
            if rows:
                connection.execute(insert(runs), rows)
            self._add_members(connection, study_id, study)
            # All of its stages: a study that rested may run again, with those that were submitted earlier.
            refresh(connection, Target(name=study.title, study=study_id).stage_keys(connection), now)
            record(connection, "submitted", now, message=f"{len(added)} runs, {new} new stages", study_id=study_id)
        return Submitted(study_id=study_id, new=new, finished=finished, shared=len(study.stages) - new - finished)

    def _open_study(self, connection: Connection, study: StudySpec, now: float, *, extend: bool) -> str:
        found = connection.execute(
            select(studies).where(studies.c.title == study.title).with_for_update()
        ).one_or_none()
        if found is None:
            study_id = uuid.uuid4().hex[:12]
            connection.execute(
                insert(studies).values(
                    id=study_id, title=study.title, definition=dict(study.definition), priority=study.priority,
                    created=now,
                )
            )  # fmt: skip
            return study_id
        if found.definition != dict(study.definition) and not extend:
            raise HRSError(
                f"study '{study.title}' exists with other runs: give this one another name, or extend that one"
            )
        connection.execute(
            update(studies)
            .where(studies.c.id == found.id)
            .values(definition=dict(study.definition), wanted=int(Wanted.RUN))
        )
        return str(found.id)

    def _add_stages(self, connection: Connection, specs: Sequence[StageSpec], now: float) -> tuple[int, int]:
        """Add the stages that are unknown; returns how many, and how many of the others are finished."""
        states: dict[str, str] = {}
        wanted = {spec.key for spec in specs} | {key for spec in specs for key in spec.inputs}
        for some in batches(sorted(wanted)):
            known = connection.execute(select(stages.c.key, stages.c.state).where(stages.c.key.in_(some)))
            states |= {row.key: row.state for row in known}
        new = [spec for spec in specs if spec.key not in states]
        rows: list[dict[str, Any]] = []
        edges: list[dict[str, str]] = []
        for spec in new:
            n_missing = sum(states.get(key) != State.FINISHED for key in spec.inputs)
            rows.append({
                "key": spec.key, "kind": spec.kind, "label": spec.label, "function": spec.function,
                "payload": dict(spec.payload), "resources": _to_json(spec.resources), "n_missing": n_missing,
                "minutes": spec.resources.minutes,
                "state": resting_state(n_missing, Wanted.RUN).value, "created": now,
            })  # fmt: skip
            edges += [{"stage_key": spec.key, "input_key": key} for key in spec.inputs]
        if rows:
            connection.execute(insert(stages), rows)
            record(connection, "added", now, [spec.key for spec in new])
        if edges:
            connection.execute(insert(inputs), edges)
        return len(new), sum(states.get(spec.key) == State.FINISHED for spec in specs)

    def _add_members(self, connection: Connection, study_id: str, study: StudySpec) -> None:
        pairs = {(run.key, key) for run in study.runs for key in run.stages} | {("", key) for key in study.own_stages}
        known = connection.execute(
            select(members.c.run_key, members.c.stage_key).where(members.c.study_id == study_id)
        ).all()
        missing = sorted(pairs - {(row.run_key, row.stage_key) for row in known})
        if missing:
            connection.execute(
                insert(members), [{"study_id": study_id, "run_key": run, "stage_key": key} for run, key in missing]
            )

    # ---- claims ------------------------------------------------------------------------------------------------------

    def add_worker(self, host: str, pid: int) -> str:
        """Register a process that makes attempts; returns the id of this incarnation of it."""
        worker = uuid.uuid4().hex
        with self.database.write() as connection:
            connection.execute(insert(workers).values(id=worker, host=host, pid=pid, started=self.now()))
        return worker

    def candidates(self, limit: int = 100) -> list[StageSpec]:
        """Return the stages that may be claimed now, the next one first: by rank, and of one rank the longest."""
        query = (
            select(stages)
            .where(stages.c.state == State.QUEUED.value, stages.c.wanted == int(Wanted.RUN))
            .where(stages.c.not_before <= self.now())
            .order_by(stages.c.rank.desc(), stages.c.minutes.desc(), stages.c.key)
            .limit(limit)
        )
        with self.database.read() as connection:
            return [_spec(row) for row in connection.execute(query)]

    def claim(self, key: str, worker: str, *, device: str = "", reserved: Resources | None = None) -> Claim:
        """Begin an attempt at a queued stage.

        Args:
            device: on which it will run, for people and measurements.
            reserved: what is set aside for it; None for what the stage asks for.

        Raises:
            TransitionRefused: if somebody else was faster, or it is not wanted any more.
        """
        now = self.now()
        with self.database.write() as connection:
            change(connection, key, [State.QUEUED], State.RUNNING, now, token=stages.c.token + 1)
            row = connection.execute(select(stages).where(stages.c.key == key)).one()
            read = connection.execute(select(inputs.c.input_key).where(inputs.c.stage_key == key)).scalars()
            spec = replace(_spec(row), inputs=tuple(sorted(read)))
            attempt = connection.execute(
                insert(attempts).values(
                    stage_key=key, token=row.token, worker_id=worker, device=device, claimed=now, seen=now,
                    reserved=_to_json(reserved or spec.resources),
                )
            ).inserted_primary_key  # fmt: skip
            assert attempt is not None
            return Claim(attempt=attempt[0], token=row.token, stage=spec, rung=row.rung)

    def renew(self, claim: Claim, progress: dict[str, Any] | None = None) -> Wanted:
        """Show that the holder of a claim is alive; returns what is wanted of its stage by now.

        Raises:
            LeaseLost: if the claim was taken away.
        """
        with self.holding(claim) as connection:
            values: dict[str, Any] = {"beats": attempts.c.beats + 1, "seen": self.now()}
            if progress is not None:
                values["progress"] = progress
            connection.execute(update(attempts).where(attempts.c.id == claim.attempt).values(**values))
            return Wanted(
                connection.execute(select(stages.c.wanted).where(stages.c.key == claim.stage.key)).scalar_one()
            )

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[Connection]:
        """Open a transaction in which the claim holds until its end: what is renamed inside it is published by the
        holder alone.

        Raises:
            LeaseLost: if the claim was taken away.
        """
        with self.database.write() as connection:
            row = connection.execute(
                select(stages.c.token, stages.c.state).where(stages.c.key == claim.stage.key).with_for_update()
            ).one_or_none()
            if row is None or row.token != claim.token or row.state != State.RUNNING:
                raise LeaseLost(
                    f"attempt {claim.token} at stage {claim.stage.key} was given up because nothing was heard of it: "
                    "its result does not count"
                )
            yield connection

    def finish(self, claim: Claim, publish: Callable[[], None] = lambda: None) -> None:
        """End an attempt whose stage is done, after ``publish`` has renamed its result to its place.

        Raises:
            LeaseLost: if the claim was taken away; ``publish`` was not called.
        """
        with self.holding(claim) as connection:
            publish()
            self._end(connection, claim, Outcome.FINISHED, "")
            change(connection, claim.stage.key, [State.RUNNING], State.FINISHED, self.now(), n_lost=0)
            release(connection, claim.stage.key, self.now(), finished=True)

    def give_up(self, claim: Claim, outcome: Outcome, message: str, *, resources: Resources | None = None) -> State:
        """End an attempt that did not finish its stage; returns the stage's new state.

        Args:
            outcome: decides what follows. Lost stages are queued again after a pause, at most :data:`MOST_LOST` times
                in a row without a larger ``step`` in their progress; failed ones are not. Too large ones are queued
                with other ``resources``, or are infeasible without. Preempted ones are queued again, paused or
                cancelled, as is wanted of them.
            message: one sentence for people.

        Raises:
            LeaseLost: if the claim was taken away.
        """
        now = self.now()
        with self.holding(claim) as connection:
            self._end(connection, claim, outcome, message)
            row = connection.execute(select(stages).where(stages.c.key == claim.stage.key)).one()
            progress = connection.execute(
                select(attempts.c.progress).where(attempts.c.id == claim.attempt)
            ).scalar_one()
            target, also = _after(row, outcome, resources, now, _step(progress), self._most_lost)
            change(connection, claim.stage.key, [State.RUNNING], target, now, message, **also)
        return target

    def _end(self, connection: Connection, claim: Claim, outcome: Outcome, message: str) -> None:
        connection.execute(
            update(attempts)
            .where(attempts.c.id == claim.attempt)
            .values(ended=self.now(), outcome=outcome.value, message=message)
        )

    def open_attempts(self) -> list["Attempt"]:
        """Return the attempts that have not ended, the oldest first."""
        query = (
            select(stages, workers.c.host, workers.c.pid, *(c.label(f"attempt_{c.name}") for c in attempts.c))
            .select_from(attempts)
            .join(stages, stages.c.key == attempts.c.stage_key)
            .join(workers, workers.c.id == attempts.c.worker_id)
            .where(attempts.c.ended.is_(None))
            .order_by(attempts.c.id)
        )
        with self.database.read() as connection:
            return [_attempt(row) for row in connection.execute(query)]

    def open_claim(self, attempt: int) -> Claim:
        """Return the claim of an attempt that has not ended: the right that another process has got for this one.

        Raises:
            LeaseLost: if it has ended.
        """
        for found in self.open_attempts():
            if found.claim.attempt == attempt:
                return found.claim
        raise LeaseLost(f"attempt {attempt} has ended before it began")

    def note_death(self, claim: Claim, message: str) -> None:
        """Give up an attempt whose process has ended, if it did not say itself how."""
        with suppress(LeaseLost):
            self.give_up(claim, Outcome.LOST, message)

    def rule_out(self, key: str, message: str) -> None:
        """Note that a queued stage fits nowhere."""
        with self.database.write() as connection:
            change(connection, key, [State.QUEUED], State.INFEASIBLE, self.now(), message)

    # ---- results that were there, or are gone ------------------------------------------------------------------------

    def adopt(self, key: str) -> None:
        """Note that the result of a queued stage is there already, so that nobody computes it."""
        with self.database.write() as connection:
            change(connection, key, [State.QUEUED], State.FINISHED, self.now(), "its result was there")
            release(connection, key, self.now(), finished=True)

    def disown(self, key: str, message: str) -> None:
        """Note that the result of a finished stage is missing or damaged, so that it is computed again."""
        now = self.now()
        with self.database.write() as connection:
            row = connection.execute(select(stages).where(stages.c.key == key).with_for_update()).one()
            target = State.WAITING if row.n_missing else State.QUEUED
            change(connection, key, [State.FINISHED], target, now, message)
            release(connection, key, now, finished=False)
            refresh(connection, [key], now)

    # ---- what the user wants -----------------------------------------------------------------------------------------

    def want(self, wanted: Wanted, target: Target) -> int:
        """Pause, resume or cancel a study, a run or a stage. Resting stages follow at once, running ones when their
        worker hears of it. Returns how many stages it concerns."""
        now = self.now()
        with self.database.write() as connection:
            keys = target.stage_keys(connection)
            target.set(connection, wanted=int(wanted))
            refresh(connection, keys, now)
            verb = {Wanted.RUN: "resumed", Wanted.PAUSE: "pause wanted", Wanted.CANCEL: "cancel wanted"}[wanted]
            record(connection, verb, now, keys if target.stage else ("",), message=target.name, study_id=target.study)
        return len(keys)

    def prioritise(self, priority: int, target: Target) -> int:
        """Give a study, a run or a stage a priority, 0 by default; returns how many stages it concerns."""
        now = self.now()
        with self.database.write() as connection:
            keys = target.stage_keys(connection)
            target.set(connection, priority=priority)
            refresh(connection, keys, now)
            message = f"{target.name}: priority {priority}"
            record(connection, "priority", now, message=message, study_id=target.study)
        return len(keys)

    def retry(self, target: Target) -> int:
        """Queue failed and infeasible stages again; returns how many."""
        now = self.now()
        again = 0
        with self.database.write() as connection:
            for some in batches(target.stage_keys(connection)):
                ended = (State.FAILED.value, State.INFEASIBLE.value)
                rows = connection.execute(select(stages).where(stages.c.key.in_(some), stages.c.state.in_(ended))).all()
                for row in rows:
                    target_state = State.WAITING if row.n_missing else State.QUEUED
                    change(connection, row.key, [State(row.state)], target_state, now, n_lost=0, rung=0, not_before=0)
                refresh(connection, [row.key for row in rows], now)
                again += len(rows)
        return again

    def remove(self, study: str) -> None:
        """Forget a study of which nothing runs; stages that nobody else needs go with it, their results stay.

        Raises:
            HRSError: if one of its stages runs.
        """
        target = self.target(study)
        with self.database.write() as connection:
            keys = target.stage_keys(connection)
            for some in batches(keys):
                query = select(func.count()).where(stages.c.key.in_(some), stages.c.state == State.RUNNING.value)
                if connection.execute(query).scalar_one():
                    raise HRSError(f"study {target.name} is running: cancel it first")
            connection.execute(delete(members).where(members.c.study_id == target.study))
            connection.execute(delete(runs).where(runs.c.study_id == target.study))
            connection.execute(delete(studies).where(studies.c.id == target.study))
            needed = set(connection.execute(select(members.c.stage_key).distinct()).scalars())
            gone = [key for key in keys if key not in needed]
            for some in batches(gone):
                connection.execute(delete(attempts).where(attempts.c.stage_key.in_(some)))
                connection.execute(delete(stages).where(stages.c.key.in_(some)))

    def target(self, name: str) -> Target:
        """Find what a user names: a study by title or id, RUN@STUDY, or a stage by its key or the beginning of it.

        Raises:
            HRSError: if nothing or more than one thing has that name.
        """
        with self.database.read() as connection:
            return find_target(connection, name)

    # ---- measurements ------------------------------------------------------------------------------------------------

    def measure(
        self, shape: str, device: str, micro_batch: int, *, tenants: int = 1, peak_bytes: int | None = None,
        seconds_per_step: float | None = None,
    ) -> None:  # fmt: skip
        """Remember how much memory and time a shape took on a device."""
        with self.database.write() as connection:
            connection.execute(
                insert(measurements).values(
                    shape=shape, device=device, micro_batch=micro_batch, tenants=tenants, peak_bytes=peak_bytes,
                    seconds_per_step=seconds_per_step, time=self.now(),
                )
            )  # fmt: skip

    def measured(self, shape: str, device: str) -> list[Row[Any]]:
        """Return what was measured, the newest first."""
        query = (
            select(measurements)
            .where(measurements.c.shape == shape, measurements.c.device == device)
            .order_by(measurements.c.id.desc())
        )
        with self.database.read() as connection:
            return list(connection.execute(query))


def open_queue(root: Path) -> Queue:
    """Open the queue of a storage root, or the one that ``HRS_QUEUE`` names; made at first use."""
    return Queue(Database(queue_url(root)))


def _after(
    row: Row[Any], outcome: Outcome, resources: Resources | None, now: float, step: float, most_lost: int
) -> tuple[State, dict[str, Any]]:
    """Return the state of a stage after an attempt that reached ``step``, and further columns to set."""
    resting = resting_state(row.n_missing, Wanted(row.wanted))
    if outcome is Outcome.PREEMPTED:
        return resting, {"n_lost": 0}
    if outcome is Outcome.LOST:
        n_lost = 1 if step > row.reached else row.n_lost + 1
        also = {"n_lost": n_lost, "reached": max(step, row.reached)}
        if n_lost > most_lost and resting in RESTING:
            return State.FAILED, also
        return resting, also | {"not_before": now + FIRST_BACK_OFF_SECONDS * 2 ** min(n_lost - 1, 5)}
    if outcome is Outcome.TOO_LARGE:
        if resources is None:
            return State.INFEASIBLE, {}
        return resting, {"rung": row.rung + 1, "resources": _to_json(resources)}
    if outcome is Outcome.FAILED:
        return State.FAILED, {}
    raise ValueError(f"an attempt that is given up is not {outcome}")


def _step(progress: dict[str, Any] | None) -> float:
    """Return the ``step`` of a progress; 0 if it tells none."""
    step = (progress or {}).get("step")
    return float(step) if isinstance(step, int | float) and math.isfinite(step) else 0.0


def _check(study: StudySpec) -> None:
    """Raise ValueError if a study's stages do not fit together."""
    keys = [stage.key for stage in study.stages]
    if len(set(keys)) != len(keys):
        raise ValueError("a study lists each stage once")
    used = {key for run in study.runs for key in run.stages} | set(study.own_stages)
    if used != set(keys):
        raise ValueError(f"stages of the study and of its runs differ: {sorted(used ^ set(keys))[:3]}")
    known: set[str] = set()
    for stage in study.stages:
        if unknown := set(stage.inputs) & set(keys) - known:
            raise ValueError(f"stage {stage.key} comes before its inputs {sorted(unknown)}")
        known.add(stage.key)


def _to_json(resources: Resources) -> dict[str, float]:
    return {name: getattr(resources, name) for name in ("cpus", "gpu_bytes", "busy_frac", "workers", "minutes")}


def _attempt(row: Row[Any]) -> Attempt:
    claim = Claim(attempt=row.attempt_id, token=row.attempt_token, stage=_spec(row), rung=row.rung)
    return Attempt(
        claim=claim, worker=row.attempt_worker_id, host=row.host, pid=row.pid, device=row.attempt_device,
        reserved=Resources(**row.attempt_reserved), claimed=row.attempt_claimed, beats=row.attempt_beats,
        progress=row.attempt_progress, wanted=Wanted(row.wanted),
    )  # fmt: skip


def _spec(row: Row[Any]) -> StageSpec:
    return StageSpec(
        key=row.key, kind=row.kind, label=row.label, function=row.function, payload=row.payload,
        resources=Resources(**row.resources),
    )  # fmt: skip
