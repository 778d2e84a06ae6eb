"""The one exception a user is meant to read, and how values stand in its sentences."""

import errno
import reprlib
import traceback
from pathlib import Path

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxlevel = 3


class HRSError(Exception):
    """A mistake or circumstance the user can mend: one sentence that says what, why and what to do.

    Entry points print the message after ``error:`` and exit with status 2; no stack trace is shown.
    """


def reason_of(error: BaseException) -> str:
    """Return why work ended, as one line: a user's sentence as it is, anything else with its type, file and line."""
    if isinstance(error, HRSError):
        return str(error)
    if is_full(error):
        return f"the disk is full ({str(error).splitlines()[0][:200]}): make room, then run the same command again"
    if not isinstance(error, Exception):  # an interruption: where it hit says nothing
        return type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}".split()) + place


def is_full(error: BaseException | None) -> bool:
    """Return True if an error, or what caused it, says that a disk is full: SQLite and MLflow say so in words only."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def shown(value: object) -> str:
    """Return the ``repr`` of a value for a sentence, the middle of a long one left out."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python spells no integer of more than 4,300 digits
        return "a number of thousands of digits"
