"""Waiting in tests: for events, not for times.

A loaded machine may take ten times as long as a quiet one, so nothing here gives up by itself: what hangs is ended by
pytest-timeout, the only clock, after 300 seconds, or 900 in a slow test.
"""

import itertools
import os
import socket
import time
import urllib.request
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_FIRST_PORT, _PORTS_PER_PROCESS = 15_000, 1_000
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_ports = itertools.count(os.getpid())  # two runs of pytest on one machine begin at different places


def wait_until(condition: Callable[[], T], alive: Callable[[], bool] = lambda: True, every_seconds: float = 0.01) -> T:
    """Return the first true value of ``condition``, which is asked again and again.

    Raises:
        AssertionError: if ``alive``, asked before each try, is false: what was waited for cannot happen any more.
    """
    while True:
        lives = alive()
        if value := condition():
            return value
        assert lives, "it ended before what was waited for had happened"
        time.sleep(every_seconds)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on.

    It lies below the range from which the system gives ports to connections, and in a range of this process of
    pytest-xdist alone: nothing takes it before the test does.
    """
    for _ in range(_PORTS_PER_PROCESS):
        port = _FIRST_PORT + _PORTS_PER_PROCESS * (_worker % 16) + next(_ports) % _PORTS_PER_PROCESS
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def wait_for_health(port: int, alive: Callable[[], bool]) -> None:
    """Return once the MLflow server at ``port`` answers."""

    def answers() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
        except OSError:
            return False
        return True

    wait_until(answers, alive, every_seconds=0.1)
