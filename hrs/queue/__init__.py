"""The durable queue of studies, runs and stages: states, claims, leases, and what the user wants."""

from hrs.queue.leases import Heartbeat, Reaper, Worker
from hrs.queue.queue import LeaseLost, Queue, open_queue
from hrs.queue.records import Attempt, Claim, Resources, RunSpec, StageSpec, StudySpec, Submitted
from hrs.queue.states import Outcome, State, Wanted
from hrs.queue.targets import Target
from hrs.queue.transitions import TransitionRefused

__all__ = [
    "Attempt", "Claim", "Heartbeat", "LeaseLost", "Outcome", "Queue", "Reaper", "Resources", "RunSpec", "StageSpec",
    "State", "StudySpec", "Submitted", "Target", "TransitionRefused", "Wanted", "Worker", "open_queue",
]  # fmt: skip
