"""The states of a stage and the changes between them that exist.

What the user wants (:class:`Wanted`) and what is (:class:`State`) are separate: a verb such as pause changes the first,
and the second follows when it can.
"""

from enum import IntEnum, StrEnum


class State(StrEnum):
    """What a stage is."""

    WAITING = "waiting"
    """An input is not finished."""
    QUEUED = "queued"
    """Ready to be claimed."""
    RUNNING = "running"
    """Claimed by a worker."""
    FINISHED = "finished"
    """Its result is stored."""
    FAILED = "failed"
    """Ended by an error that another attempt would meet again, or lost too often in a row."""
    INFEASIBLE = "infeasible"
    """Fits no device in any way that is known."""
    PAUSED = "paused"
    """The user wants it to rest; what it has computed is kept."""
    CANCELLED = "cancelled"
    """The user does not want it."""


class Wanted(IntEnum):
    """What the user wants of a study, a run or a stage; the larger value wins within one study."""

    RUN = 0
    PAUSE = 1
    CANCEL = 2


class Outcome(StrEnum):
    """How an attempt ended."""

    FINISHED = "finished"
    LOST = "lost"
    """Its process was killed, or its node is gone."""
    FAILED = "failed"
    """The config is wrong, the loss diverged, or a bug raised: the next attempt would end in the same way."""
    TOO_LARGE = "too large"
    """It ran out of device memory."""
    PREEMPTED = "preempted"
    """It was asked to stop, and has kept what it had computed."""


TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.QUEUED, State.PAUSED, State.CANCELLED}),
    State.QUEUED: frozenset(
        {State.RUNNING, State.WAITING, State.PAUSED, State.CANCELLED, State.FINISHED, State.INFEASIBLE}
    ),
    State.RUNNING: frozenset(
        {State.FINISHED, State.FAILED, State.INFEASIBLE, State.QUEUED, State.WAITING, State.PAUSED, State.CANCELLED}
    ),
    State.PAUSED: frozenset({State.QUEUED, State.WAITING, State.CANCELLED}),
    State.CANCELLED: frozenset({State.QUEUED, State.WAITING, State.PAUSED}),
    State.FAILED: frozenset({State.QUEUED, State.WAITING}),
    State.INFEASIBLE: frozenset({State.QUEUED, State.WAITING}),
    State.FINISHED: frozenset({State.QUEUED, State.WAITING}),  # its result is missing or damaged
}
"""The changes that exist, by the state they start from."""

SETTLED = frozenset({State.FINISHED, State.FAILED, State.INFEASIBLE, State.CANCELLED})
"""States that no dispatcher will change by itself."""

RESTING = frozenset({State.WAITING, State.QUEUED})
"""States that follow at once when the user wants something else."""
