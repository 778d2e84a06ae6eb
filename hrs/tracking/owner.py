"""Who writes a run: a process, named so that anybody can tell later whether it is still alive."""

import os
import socket
import time
from pathlib import Path

from hrs.files import write_whole

OWNER_FILE = "owner"
"""In a temporary folder: who made it."""
HEARTBEAT_SECONDS = 30
SILENT_SECONDS = 20 * HEARTBEAT_SECONDS
"""A process on another host that has not been heard of for so long counts as dead."""


def this_process() -> str:
    """``host:pid:start``: a process id alone may have been given to another process since."""
    import psutil

    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def claim_folder(folder: Path) -> None:
    """Write down that this process uses a folder, so that it can be removed when the process is gone."""
    write_whole(folder / OWNER_FILE, this_process())


def is_abandoned(folder: Path) -> bool:
    """Return True if the process that claimed a folder is known to be gone."""
    try:
        owner = (folder / OWNER_FILE).read_text(encoding="utf-8")
    except OSError:
        return False
    return owner.count(":") >= 2 and not is_alive(owner, None)


def is_alive(owner: str, heartbeat_seconds: float | None) -> bool:
    """Whether the process that ``owner`` names still runs.

    A process on another host cannot be looked at: it counts as dead once its last heartbeat (seconds since the epoch)
    is ten minutes old, and as alive if it never gives one.
    """
    import psutil

    host, pid, started = owner.rsplit(":", 2)
    if host != socket.gethostname():
        return heartbeat_seconds is None or time.time() - heartbeat_seconds < SILENT_SECONDS
    try:
        process = psutil.Process(int(pid))
        return abs(process.create_time() - float(started)) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
