"""What every request meets before its route: figures, the key, whether the endpoint stops, and the size of the body."""

import hashlib
import hmac
import time
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.backend import Backend
from serve.errors import ApiError

_OPEN_TO_ALL = {"/", "/healthz"}
"""Paths that need no key: a page that asks for one, and the question whether anyone is there."""
_ANSWERED_WHILE_STOPPING = {"/healthz", "/metrics"}


class Gatekeeper:
    """Plain ASGI, so that a client that goes away is noticed by the route."""

    def __init__(self, app: ASGIApp, backend: Backend, keys: Sequence[str]) -> None:
        self._app, self._backend = app, backend
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, began, status = self._backend.metrics, time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics.in_flight.inc()
        try:
            await self._enter(scope, receive, counted)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")  # a client's own path would make endless series
            metrics.in_flight.dec()
            metrics.requests.labels(route, str(status or 499)).inc()
            metrics.seconds.labels(route).observe(time.perf_counter() - began)
            if status >= 400:
                metrics.errors.labels(str(status)).inc()

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_key(scope)
            if self._backend.draining and scope["path"] not in _ANSWERED_WHILE_STOPPING:
                raise ApiError(503, "the endpoint is stopping: ask another, or later", retry_after=10)
            body = await self._read(scope, receive)
        except ApiError as refusal:
            await refusal.response()(scope, receive, send)
            return
        if body is None:
            return
        await self._app(scope, _replay(body, receive), send)

    def _check_key(self, scope: Scope) -> None:
        if not self._digests or scope["path"] in _OPEN_TO_ALL:
            return
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        # Every key is compared, and in constant time: how long it takes tells nothing of any of them.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401, "this endpoint needs an API key: send 'Authorization: Bearer KEY'", code="invalid_api_key"
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client left before it was sent."""
        most = self._backend.settings.max_body_bytes
        too_large = ApiError(
            413, f"the body is larger than the {most} bytes this endpoint takes", code="body_too_large"
        )
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()  # what comes now is that the client leaves
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
