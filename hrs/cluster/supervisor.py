"""Runs one command and guarantees that nothing of it stays behind: ``python -P supervisor.py FOLDER COMMAND...``.

A Ray head is some twenty processes in several sessions, and a job's driver leads a session of its own, so neither a
process group nor Ray's own clean-up reaches all of them. This small parent does: it adopts every orphan below
it (Linux's prctl ``PR_SET_CHILD_SUBREAPER``), so that "my descendants" is always the complete list.

It ends when standard input reaches its end (the owner closed it, or died in whatever way), on SIGTERM, on SIGUSR1
(kill at once, as if the machine had lost power), or when the command itself ends; then it removes FOLDER. It imports
only the standard library and psutil, so it is up in a blink and is run by its path.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 15.0
"""How long the command may take to stop after SIGTERM before everything is killed."""


def main(folder: Path, command: list[str]) -> int:
    """Run ``command`` with its output in ``folder/output.log`` until told to end; always returns 0."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wishes: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _frame: wishes.append(received))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, which then says what to do
    try:
        with open(folder / "output.log", "wb") as log:
            # The last resort: if this supervisor is killed, the kernel kills the command with it.
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
            )
        while not wishes and not _owner_left() and not _has_ended(child.pid):
            pass
        if signal.SIGUSR1 not in wishes:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_SECONDS)
        _kill_descendants()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _owner_left() -> bool:
    """Waits up to half a second for the end of standard input, which the owner holds open and never writes to."""
    readable, _, _ = select.select([sys.stdin], [], [], 0.5)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


def _has_ended(command: int) -> bool:
    """Buries the adopted orphans that have ended, and says whether the command is among the dead.

    An orphan left unburied still counts as running for whoever started it: Ray would wait for a job that has stopped.
    """
    while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if ended.si_pid == command:
            return True
        os.waitpid(ended.si_pid, 0)
    return False


def _kill_descendants() -> None:
    """SIGKILL until nobody is left: what an orphan starts while it dies is found in the next round."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
