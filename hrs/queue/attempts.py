"""Make one attempt at a stage in this process: import its function, call it, and tell the queue how it ended.

The function of a stage takes a :class:`StageContext` and the stage's payload as keyword arguments, and returns its
result as JSON or None. It can run again after any kill: what it keeps in ``context.directory`` is there the next time.
"""

import importlib
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrs import strict_json
from hrs.errors import HRSError, reason_of
from hrs.files import read_json, write_whole
from hrs.queue.leases import LEASE_SECONDS, Heartbeat
from hrs.queue.queue import LeaseLost, Queue
from hrs.queue.records import Claim, Resources
from hrs.queue.states import Outcome, Wanted

RESULT_FILE = "result.json"
"""In a stage's directory, when it is finished."""
LOG_FILE = "log.txt"
"""In a stage's directory: what its attempts print, one after another."""


class Preempted(Exception):
    """Raised by a stage's function when it was asked to stop and has kept what it had computed."""


class TooLarge(HRSError):
    """Raised by a stage's function when it ran out of device memory.

    Args:
        sentence: what was too large.
        resources: what to reserve for the next attempt; None if nothing would help.
    """

    def __init__(self, sentence: str, resources: Resources | None = None) -> None:
        super().__init__(sentence)
        self.resources = resources


@dataclass(kw_only=True)
class StageContext:
    """What a stage's function may use."""

    claim: Claim
    root: Path
    """The storage root."""
    _heart: Heartbeat
    _progress: dict[str, Any] = field(default_factory=dict)
    stop_signal: bool = False
    """True once the process was asked to end."""

    @property
    def directory(self) -> Path:
        """Where the stage keeps its files; of this stage alone, the same for all attempts."""
        return stage_directory(self.root, self.claim.stage.key)

    def report(self, **progress: Any) -> None:
        """Show how far the attempt is, as JSON: numbers such as ``step``, ``steps`` and ``loss``."""
        self._progress.update(progress)

    @property
    def should_stop(self) -> bool:
        """True if the attempt should keep what it has and raise :class:`Preempted`."""
        return self.stop_signal or self._heart.lost or self._heart.wanted is not Wanted.RUN

    def input_result(self, key: str) -> Any:
        """Return the result of an input, as its function returned it."""
        return read_result(self.root, key)


def stage_directory(root: Path, key: str) -> Path:
    """Return where a stage keeps its files."""
    return root / "stages" / key


def read_result(root: Path, key: str) -> Any:
    """Return the result of a finished stage.

    Raises:
        HRSError: if it is missing or damaged.
    """
    return read_json(stage_directory(root, key) / RESULT_FILE)


def run_attempt(
    queue: Queue, claim: Claim, root: Path, *, lease_seconds: float = LEASE_SECONDS, catch_signals: bool = False
) -> Outcome | None:
    """Make an attempt; returns how it ended, or None if the claim was taken away meanwhile.

    Args:
        catch_signals: let SIGTERM and SIGINT ask the function to stop; in the main thread only.
    """
    progress: dict[str, Any] = {}
    heart = Heartbeat(queue, claim, every_seconds=lease_seconds / 3, progress=lambda: dict(progress) or None)
    context = StageContext(claim=claim, root=root, _heart=heart, _progress=progress)
    if catch_signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(context, "stop_signal", True))
    with heart:
        outcome, message, resources, result = _call(context)
    try:
        if outcome is Outcome.FINISHED:
            path = stage_directory(root, claim.stage.key) / RESULT_FILE
            queue.finish(claim, lambda: write_whole(path, strict_json.dumps(result)))
        else:
            queue.give_up(claim, outcome, message, resources=resources)
    except LeaseLost:
        return None
    return outcome


def _call(context: StageContext) -> tuple[Outcome, str, Resources | None, Any]:
    """Call the stage's function; returns the outcome, one sentence, what to reserve next, and the result."""
    stage = context.claim.stage
    try:
        context.directory.mkdir(parents=True, exist_ok=True)
        result = load_function(stage.function)(context, **stage.payload)
        return Outcome.FINISHED, "", None, result
    except Preempted as stopped:
        return Outcome.PREEMPTED, str(stopped) or "asked to stop", None, None
    except TooLarge as error:
        return Outcome.TOO_LARGE, str(error), error.resources, None
    except HRSError as error:
        return Outcome.FAILED, str(error), None, None
    except Exception as error:
        traceback.print_exc()
        return Outcome.FAILED, reason_of(error), None, None


def load_function(name: str) -> Callable[..., Any]:
    """Return the function ``package.module:name``.

    Raises:
        HRSError: if there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise HRSError(f"stage function {name} cannot be imported ({error}): is its package installed here?") from error
    if not callable(function):
        raise HRSError(f"stage function {name} is not callable")
    return function  # type: ignore[no-any-return]
