"""What people see of a queue: its stages, and why each is where it is."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, select

from hrs.queue.queue import Queue
from hrs.queue.schema import attempts, events, inputs, members, runs, stages, studies
from hrs.queue.states import SETTLED, State, Wanted
from hrs.queue.targets import Target
from hrs.queue.transitions import AGEING_SECONDS

_VERBS = {Wanted.PAUSE: "pause", Wanted.CANCEL: "cancel"}


@dataclass(frozen=True, kw_only=True, slots=True)
class StageView:
    """One line of a list."""

    key: str
    kind: str
    label: str
    studies: tuple[str, ...]
    """Titles of the studies that need it."""
    state: str
    priority: float
    progress: dict[str, Any] | None
    """Of its last attempt."""
    device: str
    attempts: int
    why: str
    """Why it is where it is; empty if that goes without saying."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyView:
    """One study and how far it is."""

    title: str
    id: str
    wanted: str
    priority: int
    runs: int
    stages: dict[str, int]
    """Number of stages in each state."""


def list_studies(queue: Queue) -> list[StudyView]:
    """Return all studies, the oldest first."""
    with queue.database.read() as connection:
        per_study = select(runs.c.study_id, func.count()).group_by(runs.c.study_id)
        n_runs: dict[str, int] = {row[0]: row[1] for row in connection.execute(per_study)}
        needed = select(members.c.study_id, members.c.stage_key).distinct().subquery()
        counts: dict[str, dict[str, int]] = {}
        query = (
            select(needed.c.study_id, stages.c.state, func.count())
            .join(stages, stages.c.key == needed.c.stage_key)
            .group_by(needed.c.study_id, stages.c.state)
        )
        for study_id, state, n in connection.execute(query):
            counts.setdefault(study_id, {})[state] = n
        return [
            StudyView(
                title=row.title, id=row.id, wanted=Wanted(row.wanted).name.lower(), priority=row.priority,
                runs=n_runs.get(row.id, 0), stages=counts.get(row.id, {}),
            )
            for row in connection.execute(select(studies).order_by(studies.c.created, studies.c.id))
        ]  # fmt: skip


def list_stages(
    queue: Queue, target: Target | None = None, *, settled: bool = True, limit: int = 200
) -> list[StageView]:
    """Return stages in the order in which they run: running, queued, then those that wait, rest and are done.

    Args:
        target: only those of a study or a run, or one stage.
        settled: also those that are finished, failed or cancelled.
        limit: most stages.
    """
    with queue.database.read() as connection:
        query = select(stages)
        if target is not None:
            query = query.where(stages.c.key.in_(target.stage_keys(connection)))
        if not settled:
            query = query.where(stages.c.state.not_in([state.value for state in SETTLED]))
        rows = [
            row
            for state in _ORDER
            for row in connection.execute(
                query.where(stages.c.state == state.value)
                .order_by(stages.c.rank.desc(), stages.c.minutes.desc(), stages.c.key)
                .limit(limit)
            )
        ][:limit]
        return _views(connection, rows, queue.now())


_ORDER = (
    State.RUNNING, State.QUEUED, State.WAITING, State.PAUSED, State.FAILED, State.INFEASIBLE, State.FINISHED,
    State.CANCELLED,
)  # fmt: skip


def _views(connection: Connection, rows: Sequence[Row[Any]], now: float) -> list[StageView]:
    keys = [row.key for row in rows]
    titles: dict[str, set[str]] = {}
    query = select(members.c.stage_key, studies.c.title).join(studies, studies.c.id == members.c.study_id)
    for key, title in connection.execute(query.where(members.c.stage_key.in_(keys))):
        titles.setdefault(key, set()).add(title)
    tries = connection.execute(select(attempts).where(attempts.c.stage_key.in_(keys)).order_by(attempts.c.id)).all()
    last = {row.stage_key: row for row in tries}
    missing: dict[str, list[str]] = {}
    waits = (
        select(inputs.c.stage_key, stages.c.label, stages.c.state)
        .join(stages, stages.c.key == inputs.c.input_key)
        .where(inputs.c.stage_key.in_(keys), stages.c.state != State.FINISHED.value)
    )
    for key, label, state in connection.execute(waits):
        missing.setdefault(key, []).append(f"{label} ({state})")
    return [
        StageView(
            key=row.key, kind=row.kind, label=row.label, studies=tuple(sorted(titles.get(row.key, ()))),
            state=row.state, priority=round((row.rank + row.created) / AGEING_SECONDS, 3),
            progress=last[row.key].progress if row.key in last else None,
            device=last[row.key].device if row.key in last and row.state == State.RUNNING else "",
            attempts=sum(other.stage_key == row.key for other in tries),
            why=_why(row, missing.get(row.key, []), now),
        )
        for row in rows
    ]  # fmt: skip


def _why(row: Row[Any], missing: Sequence[str], now: float) -> str:
    wanted = Wanted(row.wanted)
    if row.state == State.RUNNING and wanted is not Wanted.RUN:
        return f"will {_VERBS[wanted]} when it has kept what it has"
    if row.state == State.WAITING:
        return f"waits for {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}"
    if row.state == State.QUEUED and row.not_before > now:
        return f"was lost ({row.message}), rests for {row.not_before - now:.0f} s"
    return str(row.message)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptView:
    """One try at a stage."""

    number: int
    device: str
    seconds: float
    outcome: str
    """``running`` if it has not ended."""
    message: str
    progress: dict[str, Any] | None


def list_attempts(queue: Queue, key: str) -> list[AttemptView]:
    """Return the attempts at a stage, the oldest first."""
    with queue.database.read() as connection:
        rows = connection.execute(select(attempts).where(attempts.c.stage_key == key).order_by(attempts.c.id)).all()
    return [
        AttemptView(
            number=row.token, device=row.device, seconds=round((row.ended or queue.now()) - row.claimed, 1),
            outcome=row.outcome or "running", message=row.message, progress=row.progress,
        )
        for row in rows
    ]  # fmt: skip


def list_events(queue: Queue, target: Target | None = None, *, limit: int = 50) -> list[dict[str, Any]]:
    """Return the last events, the oldest first: time, stage, kind, message."""
    with queue.database.read() as connection:
        query = select(events).order_by(events.c.id.desc()).limit(limit)
        if target is not None:
            keys = target.stage_keys(connection)
            query = query.where(
                events.c.stage_key.in_(keys) | ((events.c.study_id == target.study) & (target.study != ""))
            )
        rows = connection.execute(query).all()
    return [
        {"time": row.time, "stage": row.stage_key, "kind": row.kind, "message": row.message} for row in reversed(rows)
    ]


def to_json(views: Sequence[StageView | StudyView | AttemptView]) -> list[dict[str, Any]]:
    """Return views as JSON."""
    return [asdict(view) for view in views]
