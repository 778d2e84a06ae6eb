"""Changes of a stage's state: each one a single conditional update, with its event.

A stage follows what is wanted of it (:func:`refresh`), and the stages that read its result follow it (:func:`release`).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, case, func, select, update

from hrs.errors import HRSError
from hrs.queue.schema import events, inputs, members, runs, stages, studies
from hrs.queue.states import RESTING, TRANSITIONS, State, Wanted

AGEING_SECONDS = 3600.0
"""A stage that has waited this much longer than another comes first although its priority is one lower."""

_BATCH = 500
"""Keys in one statement: databases limit the number of parameters."""


class TransitionRefused(HRSError):
    """A stage is not in a state from which the change exists."""


def batches(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut keys into pieces that one statement can take."""
    return (keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH))


def change(
    connection: Connection,
    key: str,
    sources: Sequence[State],
    target: State,
    now: float,
    message: str = "",
    **also: Any,
) -> None:
    """Change the state of one stage if it is one of ``sources``; ``also`` are further columns to set.

    Raises:
        TransitionRefused: if it is in another state; the sentence names it.
    """
    for source in sources:
        assert target in TRANSITIONS[source], f"{source} -> {target} does not exist"
    changed = connection.execute(
        update(stages)
        .where(stages.c.key == key, stages.c.state.in_([source.value for source in sources]))
        .values(state=target.value, message=message, **also)
    )
    if changed.rowcount != 1:
        found = connection.execute(select(stages.c.state).where(stages.c.key == key)).scalar_one_or_none()
        if found is None:
            raise TransitionRefused(f"there is no stage {key}: see 'hrs queue list'")
        raise TransitionRefused(f"stage {key} is {found}, so it cannot become {target.value}")
    record(connection, target.value, now, [key], message)


def record(
    connection: Connection,
    kind: str,
    now: float,
    stage_keys: Sequence[str] = ("",),
    message: str = "",
    study_id: str = "",
) -> None:
    """Append one event for each stage."""
    rows = [{"time": now, "stage_key": k, "study_id": study_id, "kind": kind, "message": message} for k in stage_keys]
    if rows:
        connection.execute(events.insert(), rows)


def resting_state(n_missing: int, wanted: Wanted) -> State:
    """Return the state of a stage that nobody works on and that has no result."""
    if wanted is Wanted.CANCEL:
        return State.CANCELLED
    if wanted is Wanted.PAUSE:
        return State.PAUSED
    return State.WAITING if n_missing else State.QUEUED


def refresh(connection: Connection, keys: Sequence[str], now: float) -> None:
    """Compute again what is wanted of stages, and their rank, from all that need them; resting ones follow at once.

    What is wanted of a stage is the least restrictive of its runs and studies: a paused study does not stop what
    another one needs. Its rank is its priority and its age; studies that do not run lend it no priority.
    """
    for some in batches(keys):
        needs = _needs(connection, some)
        rows = connection.execute(select(stages).where(stages.c.key.in_(some)).with_for_update()).all()
        changed, moved = [], {}
        for row in rows:
            need = needs.get(row.key)
            wanted = max(Wanted(row.own_wanted), Wanted.CANCEL if need is None else Wanted(need.wanted))
            rank = (row.own_priority + ((need.priority or 0) if need else 0)) * AGEING_SECONDS - row.created
            if (row.wanted, row.rank) != (wanted, rank):
                changed.append({"the_key": row.key, "wanted": int(wanted), "rank": rank})
            if State(row.state) in (*RESTING, State.PAUSED, State.CANCELLED):
                moved[row.key] = (State(row.state), resting_state(row.n_missing, wanted))
        if changed:
            statement = update(stages).where(stages.c.key == bindparam("the_key"))
            connection.execute(statement.values(wanted=bindparam("wanted"), rank=bindparam("rank")), changed)
        _move(connection, moved, now)


def _needs(connection: Connection, keys: Sequence[str]) -> dict[str, Any]:
    """Return what the runs and studies that need them want of stages: columns ``wanted`` and ``priority``."""
    larger = func.max if connection.dialect.name == "sqlite" else func.greatest
    wanted = larger(studies.c.wanted, func.coalesce(runs.c.wanted, 0))
    priority = studies.c.priority + func.coalesce(runs.c.priority, 0)
    query = (
        select(
            members.c.stage_key,
            func.min(wanted).label("wanted"),
            func.max(case((wanted == int(Wanted.RUN), priority))).label("priority"),
        )
        .join(studies, studies.c.id == members.c.study_id)
        .outerjoin(runs, (runs.c.study_id == members.c.study_id) & (runs.c.key == members.c.run_key))
        .where(members.c.stage_key.in_(keys))
        .group_by(members.c.stage_key)
    )
    return {row.stage_key: row for row in connection.execute(query)}


def _move(connection: Connection, moved: dict[str, tuple[State, State]], now: float) -> None:
    """Change states from the first to the second of each pair, where they differ."""
    by_change: dict[tuple[State, State], list[str]] = {}
    for key, pair in moved.items():
        if pair[0] is not pair[1]:
            by_change.setdefault(pair, []).append(key)
    for (source, target), keys in by_change.items():
        assert target in TRANSITIONS[source], f"{source} -> {target} does not exist"
        connection.execute(
            update(stages)
            .where(stages.c.key.in_(keys), stages.c.state == source.value)
            .values(state=target.value, message="", **({"n_lost": 0} if source is State.CANCELLED else {}))
        )
        record(connection, target.value, now, keys)


def release(connection: Connection, key: str, now: float, *, finished: bool) -> None:
    """Tell the stages that read a stage's result that it is there, or with ``finished=False`` that it is not any more.

    Stages that are ready by that become queued; those that were queued wait again.
    """
    readers = list(connection.execute(select(inputs.c.stage_key).where(inputs.c.input_key == key)).scalars())
    for some in batches(sorted(readers)):
        connection.execute(
            update(stages).where(stages.c.key.in_(some)).values(n_missing=stages.c.n_missing + (-1 if finished else 1))
        )
        rows = connection.execute(select(stages).where(stages.c.key.in_(some), stages.c.state.in_(RESTING))).all()
        _move(
            connection,
            {r.key: (State(r.state), resting_state(r.n_missing, Wanted(r.wanted))) for r in rows},
            now,
        )
