"""The HTTP server in front: uvicorn's, with limits on what a connection may cost before anything is asked.

uvicorn with httptools reads a request's header without limits of size and time, and an endless line makes its parser
copy what it has again and again. uvicorn with h11 limits the size, but not the time, and what it parses costs twenty
times as much and more (docs/lab-notebook.md), which strangers can ask for before a key is known. So this is httptools
with limits.
"""

import asyncio
import contextlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hrs import strict_json
from serve.errors import ApiError

_OTHER_FILES = 256
"""Open files that are kept for everything but connections."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What connections may take."""

    header_bytes: int = 32 * 2**10
    """Of the request line and all header lines of a request."""
    header_seconds: float = 10.0
    """From the first byte of a header, or from the beginning of a connection, until the header is complete."""
    rest_seconds: float = 5.0
    """For the rest of a body that is not wanted any more; then the connection is closed."""
    idle_seconds: int = 65
    """Between two requests of a connection."""
    write_seconds: float = 60.0
    """For a client to take what it is sent, when the buffers towards it are full."""
    connections: int = 1000
    """Open at once. One more ends the one that waits longest for a complete request."""
    pipelined: int = 8
    """Requests that a connection may send ahead of its replies."""


class _TooLong(Exception):
    """A header is longer than the limit."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        waiting: the server's connections without a complete request, the one that waits longest first.
    """

    def __init__(self, *args: Any, limits: Limits, waiting: "dict[LimitedProtocol, None]", **more: Any) -> None:
        super().__init__(*args, **more)
        self._limits, self._waiting = limits, waiting
        self._header_bytes = 0
        self._in_header = self._in_message = False
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # ---- the transport's calls ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting[self] = None
        self._close_after(self._limits.header_seconds)
        if len(self.connections) > self._limits.connections:
            next(iter(self._waiting)).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.pop(self, None)
        for timer in (self._read_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._in_message:
            self._in_header, self._header_bytes = True, 0
            if self._read_timer is None:
                self._close_after(self._limits.header_seconds)
        if self._in_header:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_header and self._header_bytes > self._limits.header_bytes and not self.transport.is_closing():
            self.send_400_response("")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    # ---- the parser's calls ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._in_message = self._in_header = True
        self._in_lines = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._stop_reading_clock()
        if len(self.pipeline) >= self._limits.pipelined:
            raise _TooLong
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_message = False
        self._waiting.pop(self, None)
        super().on_message_complete()
        if self.cycle.response_complete:
            self._stop_reading_clock()

    # ---- uvicorn's ---------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline:
            self._waiting[self] = None
            if self._in_message:
                self._close_after(self._limits.rest_seconds)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, or longer than the limits, in OpenAI's shape, and close the connection."""
        body = strict_json.dumps(ApiError(400, _NOT_HTTP.format(self._limits.header_bytes)).body()).encode()
        lines = ("HTTP/1.1 400 Bad Request", "content-type: application/json", f"content-length: {len(body)}")
        self.transport.write("\r\n".join((*lines, "connection: close", "", "")).encode() + body)
        self.transport.close()

    def _count(self, n_bytes: int) -> None:
        self._in_lines += n_bytes
        if self._in_lines > self._limits.header_bytes:
            raise _TooLong

    def _close_after(self, seconds: float) -> None:
        self._stop_reading_clock()
        self._read_timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_reading_clock(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None


_NOT_HTTP = "this is no HTTP request, or its header is longer than {} bytes"


class Server(uvicorn.Server):
    """uvicorn's server for an application, on a socket that is bound already; signals are its owner's."""

    def __init__(self, app: ASGIApp, limits: Limits | None = None) -> None:
        limits = _within_open_files(limits or Limits())
        config = uvicorn.Config(
            app,
            http=partial(LimitedProtocol, limits=limits, waiting={}),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=limits.idle_seconds,
            timeout_graceful_shutdown=1,
            backlog=1024,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _within_open_files(limits: Limits) -> Limits:
    """Let this process open as many files as the connections need, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + _OTHER_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    n_connections = max(min(limits.connections, soft - _OTHER_FILES), 1)
    return Limits(**{**{name: getattr(limits, name) for name in limits.__slots__}, "connections": n_connections})
