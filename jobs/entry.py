"""How every entry point ends: a user's mistake is one sentence and status 2, never a stack trace."""

import sys
from collections.abc import Callable
from typing import NoReturn

from hrs.errors import HRSError
from hrs.threads import set_threads


def run_entry(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit with its status; :class:`HRSError` is printed and becomes 2, Ctrl-C becomes 130.

    Torch has one thread in it unless ``OMP_NUM_THREADS`` says otherwise.
    """
    set_threads()
    try:
        status = main()
    except HRSError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from there", file=sys.stderr, flush=True)
        status = 130
    sys.exit(status)
