"""What stands before the replicas: the checks of every request, the bounds on all together, and how it stops.

Plain ASGI, in the process of ``hrs serve``. What is refused here costs a replica nothing, and the order is: the name it
is asked under, the key, whether the endpoint stops or has no replica, whether there is room, and only then the body.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence

from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from hrs import strict_json
from serve.access import OPEN_TO_ALL, Hosts, Keys
from serve.bodies import Bodies
from serve.errors import ApiError, as_api_error
from serve.metrics import Metrics
from serve.origins import Origins
from serve.settings import MOST_OTHERS

Forward = Callable[[Scope, bytes], AsyncGenerator[list[Message], None]]
"""Passes a request with its body on to a replica: :func:`serve.answering.answer`, from here or from afar."""

_HEALTH = "/healthz"
_KINDS = {_HEALTH: "health"} | dict.fromkeys(OPEN_TO_ALL - {_HEALTH}, "pages")
_KINDS |= dict.fromkeys(("/v1/completions", "/v1/chat/completions"), "texts")
"""Kinds of requests by path, each with room of its own: texts hold a slot or a place in the queue, and whoever has no
key, and asks for pages without reading them, takes the place of nothing else. All others are "others"."""
_PASSED_ON = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path",
              "headers", "client", "server")  # fmt: skip


class Front:
    """The application that clients reach.

    Args:
        most_texts: requests of one replica that may generate or wait for it at once.
        most_others: requests of one replica of each other kind at once.
        origins: of pages that browsers may let ask, see :class:`serve.origins.Origins`.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        keys: Keys,
        hosts: Hosts,
        bodies: Bodies,
        metrics: Metrics,
        most_texts: int,
        most_others: int = MOST_OTHERS,
        origins: Sequence[str] = (),
    ) -> None:
        self._app = Origins(self._answer, list(origins))
        self._forward, self._keys, self._hosts, self._bodies = forward, keys, hosts, bodies
        self._metrics = metrics
        self._most_texts, self._most_others = most_texts, most_others
        self._running: dict[str, set[_Reply]] = {kind: set() for kind in (*_KINDS.values(), "others")}
        self._reading: set[asyncio.Task[bytes | None]] = set()
        self._stopping = False
        self._changed = asyncio.Event()
        self._n_replicas = 1

    # ---- stopping ----------------------------------------------------------------------------------------------------

    @property
    def n_running(self) -> int:
        """Requests that are being answered."""
        return sum(map(len, self._running.values()))

    def set_replicas(self, n: int) -> None:
        """Take note of how many replicas run. Without any, requests are refused, also those that wait for one."""
        self._n_replicas = n
        if not n:
            for reply in self._all_running():
                if not reply.started:
                    reply.end(_no_replica())

    def _all_running(self) -> "list[_Reply]":
        return [reply for running in self._running.values() for reply in running]

    def refuse(self) -> None:
        """Refuse new requests from now on, also those whose body is not complete."""
        self._stopping = True
        for reading in self._reading:
            reading.cancel()

    async def wait_until_idle(self) -> None:
        """Return once every client has its whole reply."""
        while self.n_running:
            self._changed.clear()
            await self._changed.wait()

    def cut_off(self) -> None:
        """End the running replies; their clients are told that the endpoint stopped."""
        for reply in self._all_running():
            reply.end(ApiError(503, "the endpoint stopped before this reply was finished", retry_after=5))

    # ---- requests ----------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
            if self._stopping and scope["path"] == _HEALTH:
                await JSONResponse({"status": "stopping"}, 503)(scope, receive, send)
                return
            body = await self._read(receive)
            if body is not None:
                self._require_room(scope)  # again: others may have come while the body did
                await self._pass_on(scope, body, receive, send)
        except ApiError as refusal:
            self._metrics.count_refusal(refusal.status)
            await refusal.response()(scope, receive, send)

    async def _read(self, receive: Receive) -> bytes | None:
        reading = asyncio.ensure_future(self._bodies.read(receive))
        self._reading.add(reading)
        try:
            return await reading
        except asyncio.CancelledError:
            if self._stopping:
                raise _stopping() from None
            raise
        finally:
            reading.cancel()
            self._reading.discard(reading)

    def _check(self, scope: Scope) -> None:
        self._hosts.check(scope)
        self._keys.check(scope)
        if not (self._stopping and scope["path"] == _HEALTH):
            self._require_room(scope)
            self._bodies.check(scope)

    def _require_room(self, scope: Scope) -> None:
        """Raises ApiError 503 if the endpoint stops or no replica runs, 429 if there is no room for another request."""
        if self._stopping:
            raise _stopping()
        if not self._n_replicas:
            raise _no_replica()
        kind = _KINDS.get(scope["path"], "others")
        most = self._most_texts if kind == "texts" else self._most_others
        if (n := len(self._running[kind])) >= most * self._n_replicas:
            sentence = f"{n} requests are being answered or wait, and no more may"
            raise ApiError(429, f"{sentence}: try again shortly", code="queue_full", retry_after=1)

    async def _pass_on(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        reply = _Reply(send)
        running = self._running[_KINDS.get(scope["path"], "others")]
        running.add(reply)
        try:
            passed = {name: scope[name] for name in _PASSED_ON if name in scope}
            await reply.run(self._forward(passed, body), receive)
            if reply.failure is not None:
                self._metrics.count_refusal(reply.failure.status)
                await reply.finish(reply.failure, scope, receive)
        finally:
            running.discard(reply)
            self._changed.set()


class _Reply:
    """One reply on its way from a replica to its client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self._streams = self._complete = False
        self._sending: asyncio.Task[None] | None = None
        self.failure: ApiError | None = None
        """Why the reply is not the replica's own, or not all of it."""

    def end(self, why: ApiError) -> None:
        """Break the reply off."""
        self.failure = why
        if self._sending is not None:
            self._sending.cancel()

    async def run(self, messages: AsyncGenerator[list[Message], None], receive: Receive) -> None:
        """Send ``messages`` until they or the client end."""
        self._sending = asyncio.ensure_future(self._send_all(messages))
        leaving = asyncio.ensure_future(_until_left(receive))
        try:
            await asyncio.wait({self._sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not self._complete:
                self._sending.cancel()
            await asyncio.wait({self._sending, leaving})

    async def _send_all(self, messages: AsyncGenerator[list[Message], None]) -> None:
        async with contextlib.aclosing(messages):
            try:
                async for together in messages:
                    for message in together:
                        await self._send_on(message)
            except Exception as error:
                if not self._complete:
                    self.failure = as_api_error(error)
        if not self._complete and self.failure is None:
            self.failure = died()

    async def _send_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            self.started, self._streams = True, kind.startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self._complete = not message.get("more_body", False)
        await self._send(message)

    async def finish(self, failure: ApiError, scope: Scope, receive: Receive) -> None:
        """Tell the client of a failure: by a status, or as the last event of a stream that has begun."""
        if not self.started:
            await failure.response()(scope, receive, self._send)
        elif self._streams and not self._complete:
            last = f"data: {strict_json.dumps(failure.body())}\n\n"
            await self._send({"type": "http.response.body", "body": last.encode(), "more_body": False})


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _stopping() -> ApiError:
    return ApiError(503, "the endpoint is stopping: ask another, or later", retry_after=10)


def _no_replica() -> ApiError:
    return ApiError(503, "no process of the model runs at the moment: try again shortly", retry_after=5)


def died() -> ApiError:
    """Return what a client is told whose replica ended."""
    return ApiError(500, "the model's process ended before it had answered: try again shortly", code="replica_died")
