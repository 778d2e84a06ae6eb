"""How every entry point ends: a user's mistake is one sentence and status 2, never a stack trace."""

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from hrs.errors import HRSError, is_full, reason_of
from hrs.threads import set_threads


def run_entry(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit with its status; :class:`HRSError` and a full disk are printed and become 2, Ctrl-C 130.

    Torch has one thread in it unless ``OMP_NUM_THREADS`` says otherwise. Characters that the output's encoding lacks
    are printed as their numbers. A reader that goes away, as ``head`` does, ends the process with 141 and no word.
    Whatever ends ``main``, studies that it left open in MLflow are closed with the reason.
    """
    set_threads()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
    except HRSError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
        _close_studies(error)
    except KeyboardInterrupt as error:
        print("interrupted: the same command goes on from there", file=sys.stderr, flush=True)
        status = 130
        _close_studies(error)
    except BrokenPipeError as error:
        _close_studies(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes at its end
        status = 141
    except BaseException as error:
        _close_studies(error)
        if not is_full(error):
            raise
        print(f"error: {reason_of(error)}", file=sys.stderr, flush=True)
        status = 2
    sys.exit(status)


def _close_studies(error: BaseException) -> None:
    if "hrs.tracking.tracker" in sys.modules:  # importing it takes a second, which most mistakes do not need
        from hrs.tracking import close_open_studies

        close_open_studies(error)
