"""The one exception a user is meant to read."""


class HRSError(Exception):
    """A mistake or circumstance the user can mend: one sentence that says what, why and what to do.

    Entry points print the message after ``error:`` and exit with status 2; no stack trace is shown.
    """
