"""Replies while they grow, and clients that leave before they are finished."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from hrs import strict_json
from serve.backend import Piece, Running
from serve.errors import ApiError, as_api_error

T = TypeVar("T")

DONE = "data: [DONE]\n\n"


def sse(document: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {strict_json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events of texts that grow. However it ends, the texts are given up."""

    def __init__(self, events: AsyncIterator[str], running: Running | None) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_with_errors(events), media_type="text/event-stream", headers=headers)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._running is not None:
                self._running.close()


async def _with_errors(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """A failure in the midst of a stream can no longer be a status: it is the stream's last event."""
    try:
        async for event in events:
            yield event
    except Exception as error:
        yield sse(as_api_error(error).body())


async def first_piece(running: Running) -> AsyncIterator[list[Piece]]:
    """The pieces of ``running``, after the first one came: what fails before that is still answered by a status."""
    pieces = aiter(running)
    first = await anext(pieces)

    async def rest() -> AsyncIterator[list[Piece]]:
        yield first
        async for more in pieces:
            yield more

    return rest()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client leaves.

    Raises:
        ApiError: 499 if it left; nobody reads it.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "the client closed the connection")
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
