"""Bodies of requests, read as a whole and within limits of size and time."""

import asyncio

from starlette.types import Message, Receive, Scope

from serve.errors import ApiError

_HELD_BODIES = 128
"""Largest bodies that may be held at once while they are read."""


class Bodies:
    """What reads the bodies of all requests of one process.

    Args:
        most: bytes of each.
        seconds: in which each has to be complete.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds, self._held = most, seconds, 0

    def check(self, scope: Scope) -> None:
        """Check the declared length of a body.

        Raises:
            ApiError: 413 if it is too large.
        """
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self._most:
            raise self._too_large()

    async def read(self, receive: Receive) -> bytes | None:
        """Return the whole body; None if the client left before it was sent.

        Raises:
            ApiError: 408 if it does not come in time, 413 if it is too large, 429 if too many are being read.
        """
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._seconds):
                return await self._collect(receive, parts)
        except TimeoutError:
            sentence = f"the body was not complete within {self._seconds:g} seconds: send it faster"
            raise ApiError(408, sentence, code="body_timeout") from None
        finally:
            self._held -= sum(map(len, parts))

    async def _collect(self, receive: Receive, parts: list[bytes]) -> bytes | None:
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            self._held += len(part)
            parts.append(part)
            if size > self._most:
                raise self._too_large()
            if self._held > _HELD_BODIES * self._most:
                raise ApiError(429, "too many bodies are being read: try again shortly", code="busy", retry_after=1)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than the {self._most} bytes this endpoint takes", code="body_too_large"
        )


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``body`` first, and then what ``receive`` gives: that the client leaves."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
