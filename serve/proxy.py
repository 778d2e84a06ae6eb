"""What Serve's proxy says of its own accord, said as the endpoint says it.

While no replica is there, or when one dies before it answered, the proxy would answer in plain text, and a stream would
break off. Serve calls :func:`middlewares` in the proxy if ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names it. The
model's code is not imported here: the proxy needs none of it.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hrs import strict_json
from serve.errors import ApiError

_SERVES_OWN = "/-/"
"""Paths that ask the proxy itself, for its health and its routes."""


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy."""
    return [Middleware(ProxyErrors)]


class ProxyErrors:
    """Plain ASGI around Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_SERVES_OWN):
            await self._app(scope, receive, send)
            return
        reply = _Reply(send)
        await self._app(scope, receive, reply.send)
        await reply.finish(scope, receive)


class _Reply:
    """One reply of the proxy, held back where it is not the endpoint's."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._status: int | None = None
        self._kept = self._streams = self._complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            self._status, self._streams = message["status"], kind.startswith(b"text/event-stream")
            # A refusal of the endpoint is JSON; one in plain text was written by Serve.
            self._kept = message["status"] < 400 or kind.startswith(b"application/json")
        elif message["type"] == "http.response.body":
            self._complete = not message.get("more_body", False)
        if self._kept:
            await self._send(message)

    async def finish(self, scope: Scope, receive: Receive) -> None:
        """Say what is left to say when the proxy has said all."""
        if not self._kept:
            await _refusal(self._status).response()(scope, receive, self._send)
        elif self._streams and not self._complete:
            last = f"data: {strict_json.dumps(_died().body())}\n\n"
            await self._send({"type": "http.response.body", "body": last.encode(), "more_body": False})


def _refusal(status: int | None) -> ApiError:
    """``status`` is None if the proxy had no answer at all: the replica was gone before it gave one."""
    if status is None or status == 500:
        return _died()
    if status == 429:
        return ApiError(429, "there are too many requests: try again shortly", code="queue_full", retry_after=1)
    return ApiError(503, "the endpoint is starting or stopping: ask another, or later", retry_after=5)


def _died() -> ApiError:
    return ApiError(500, "the model's process ended before it had answered: try again shortly", code="replica_died")
