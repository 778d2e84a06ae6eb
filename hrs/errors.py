"""The one exception a user is meant to read, and how values stand in its sentences."""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxlevel = 3


class HRSError(Exception):
    """A mistake or circumstance the user can mend: one sentence that says what, why and what to do.

    Entry points print the message after ``error:`` and exit with status 2; no stack trace is shown.
    """


def shown(value: object) -> str:
    """Return the ``repr`` of a value for a sentence, the middle of a long one left out."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python spells no integer of more than 4,300 digits
        return "a number of thousands of digits"
