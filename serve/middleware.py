"""What every request meets before its route: figures, the key, and the limits of its body.

Behind ``hrs serve`` the key and the body have been checked before; behind Ray Serve's own proxy nobody else does it.
"""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.access import Keys
from serve.backend import Backend
from serve.bodies import Bodies, replay, require_json
from serve.errors import ApiError


class Gatekeeper:
    """Plain ASGI, so that a client that goes away is noticed by the route."""

    def __init__(self, app: ASGIApp, backend: Backend, keys: Keys) -> None:
        self._app, self._backend, self._keys = app, backend, keys
        self._bodies = Bodies(backend.settings.max_body_bytes, backend.settings.body_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # what GET answers, without the body
            scope, send = {**scope, "method": "GET"}, _without_body(send)
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
            scope.setdefault("state", {})["space"] = self._keys.check(scope)
            require_json(scope)
            self._bodies.check(scope)
            body = await self._bodies.read(receive)
        except ApiError as refusal:
            await refusal.response()(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, replay(body, receive), send)


def _without_body(send: Send) -> Send:
    async def head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return head
