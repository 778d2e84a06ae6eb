"""Bodies of requests, read as a whole and within limits of size and time."""

import asyncio
import re
from email.message import Message as Headers

from starlette.types import Message, Receive, Scope

from serve.errors import ApiError

_HELD_BODIES = 128
"""Largest bodies that may be held at once while they are read."""
_JSON = re.compile(r"json|.*\+json")


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


def require_json(scope: Scope) -> None:
    """Check that the body of a request is declared as JSON that is not compressed.

    A page of another site may send a body of another type without asking first, so JSON has to be declared.

    Raises:
        ApiError: 415 if it is not.
    """
    headers = dict(scope["headers"])
    if scope["method"] not in ("POST", "PUT", "PATCH") or not _has_body(headers):
        return
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding != b"identity":
        sentence = f"the body is compressed ('{_shown(encoding)}'), which is not read here: send it as it is"
        raise ApiError(415, sentence, code="unsupported_media_type")
    kind = Headers()
    kind["content-type"] = _shown(headers.get(b"content-type", b""))
    if b"content-type" not in headers:
        sentence = "the request does not say what its body is: send 'Content-Type: application/json'"
        raise ApiError(415, sentence, code="unsupported_media_type")
    if kind.get_content_maintype() != "application" or not _JSON.fullmatch(kind.get_content_subtype()):
        sentence = f"a body of type '{kind['content-type']}' is not read here"
        raise ApiError(
            415, f"{sentence}: send JSON, with 'Content-Type: application/json'", code="unsupported_media_type"
        )
    if (charset := str(kind.get_param("charset", "utf-8")).lower()) not in ("utf-8", "utf8", "us-ascii"):
        sentence = f"a body in '{charset}' is not read here: send JSON in UTF-8"
        raise ApiError(415, sentence, code="unsupported_media_type")


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0").strip() != b"0"


def _shown(value: bytes) -> str:
    return value.decode("latin-1")[:100]


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
