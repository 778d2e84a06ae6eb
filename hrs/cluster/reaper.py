"""Ends what is left of a private Ray, also if its owner was killed: ``python -I reaper.py FOLDER``.

If the process that started a Ray is killed, the kernel ends the GCS and the raylet with it, but Ray's agents try for a
minute to reach the dead GCS first, and nobody removes Ray's files. This process waits until its standard input ends,
which the owner holds open; then it kills every process that has a file in FOLDER open, as all of Ray's have their logs,
or the Ray's token in its environment, which Ray's processes overwrite with their titles; then it removes FOLDER. The
token comes in the environment. It uses the standard library only, so it starts quickly.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_SECONDS = 10.0
"""For processes to end that are killed: the kernel lets none of them refuse, but may take a while."""


def main(folder: Path) -> None:
    """Wait for the owner to end, and leave nothing of its Ray behind."""
    spared = {os.getpid(), os.getppid()}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which whole groups of processes get
        signal.signal(number, signal.SIG_IGN)
    while os.read(sys.stdin.fileno(), 1):
        pass
    mark = f"RAY_AUTH_TOKEN={os.environ['RAY_AUTH_TOKEN']}".encode()
    end = time.monotonic() + _SECONDS
    while (found := [pid for pid in _processes(folder, mark) if pid not in spared]) and time.monotonic() < end:
        for pid in found:  # what a process starts while it is killed is found in the next round
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def _processes(folder: Path, mark: bytes) -> Iterator[int]:
    """Yield the ids of the processes that belong to the Ray, its owner among them."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # of another user, or gone
            if any(file.startswith(f"{folder}/") for file in _open_files(process)) or mark in (
                process / "environ"
            ).read_bytes().split(b"\0"):
                yield int(process.name)


def _open_files(process: Path) -> Iterator[str]:
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(descriptor)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
