"""An ASGI application asked from another process: the request is there as a whole, the answer goes as it comes."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message, Scope


async def answer(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
    """Run ``app`` on a request, and yield its messages, those together that came together.

    Closing the generator cancels the application, as servers do if the client leaves.
    """
    came, messages, given = asyncio.Event(), list[Message](), False

    async def receive() -> Message:
        nonlocal given
        if given:
            await asyncio.Event().wait()  # a client that leaves is told by cancellation
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        messages.append(message)
        came.set()

    work = asyncio.ensure_future(app(scope, receive, send))
    work.add_done_callback(lambda _: came.set())
    try:
        while not work.done() or messages:
            await came.wait()
            came.clear()
            if messages:
                together, messages[:] = messages.copy(), []
                yield together
        await work
    finally:
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await work
