"""One endpoint from its first request to its last: it listens, and stops so that every client is told."""

import asyncio
import math
import signal
import socket
from collections.abc import Awaitable, Callable

from serve.front import Front
from serve.listener import Limits, Server

_RAY_SECONDS = 30.0
"""For running replies if Ray has failed: it ends this process a minute after."""
_LAST_WORDS_SECONDS = 5.0
"""For telling clients that their replies were cut off."""


class Wishes:
    """What signals have asked for: the first to stop, the second to cut off what runs, a third to end at once."""

    def __init__(self) -> None:
        self.stop, self.cut_off, self.end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def add(self) -> None:
        """Take note of one more signal."""
        next(wish for wish in (self.stop, self.cut_off, self.end) if not wish.is_set() or wish is self.end).set()

    def listen(self) -> None:
        """Take this process's SIGINT, SIGTERM and SIGHUP from now on. In its main thread and event loop."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self.add)


async def run_endpoint(
    front: Front,
    bound: socket.socket,
    *,
    watch: Callable[[], Awaitable[None]],
    wishes: Wishes,
    grace_seconds: float,
    announce: Callable[[str], None],
    limits: Limits | None = None,
) -> None:
    """Answer requests until a signal comes or ``watch`` fails; then refuse what is new, finish or cut off what runs.

    Args:
        bound: the socket to listen on; it is closed when every client has its answer, or is told why not.
        watch: looks after the replicas, and raises if there will be none any more.
        grace_seconds: that running replies have to reach their clients.
        announce: is told "up" and "stopping".

    Raises:
        HRSError: what ``watch`` raised, once the clients have been told.
    """
    server = Server(front, limits)
    serving = asyncio.ensure_future(server.serve(sockets=[bound]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    watching = asyncio.ensure_future(watch())
    announce("up")
    stopping = asyncio.ensure_future(wishes.stop.wait())
    await asyncio.wait({stopping, watching, serving}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    announce("stopping")
    await _stop(front, server, serving, wishes, min(grace_seconds, _RAY_SECONDS if watching.done() else math.inf))
    if watching.done():
        watching.result()
    watching.cancel()


async def _stop(
    front: Front, server: Server, serving: "asyncio.Future[None]", wishes: Wishes, grace_seconds: float
) -> None:
    now = asyncio.get_running_loop().time
    front.refuse()
    deadline, impatience = now() + grace_seconds, wishes.cut_off
    if not await _within(deadline, front.wait_until_idle(), impatience):
        front.cut_off()
        deadline, impatience = now() + _LAST_WORDS_SECONDS, wishes.end
        await _within(deadline, front.wait_until_idle(), impatience)
    server.should_exit = True  # it closes the socket, and waits until what was written has left its buffers
    await _within(max(deadline, now() + _LAST_WORDS_SECONDS), serving, impatience)
    server.force_exit = True
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    await serving


async def _within(deadline: float, work: Awaitable[object], impatience: asyncio.Event) -> bool:
    """True if ``work`` was done before ``deadline``, on the event loop's clock, and before ``impatience``."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(impatience.wait())
    left = max(deadline - asyncio.get_running_loop().time(), 0)
    await asyncio.wait({working, waiting}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not working.done() and working is not work:
        working.cancel()
    return working.done() and not working.cancelled()
