"""One thread per replica that owns the model: it continues every text by a token at a time and, in between, does the
other work that needs the model or its memories. Nothing else touches either, so neither needs a lock.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from hrs.generation import SampledToken
from hrs.generation.text import TextAssembler
from serve.backend import Piece, Request
from serve.errors import ApiError, as_api_error
from serve.metrics import Metrics

T = TypeVar("T")

MESSAGE_SECONDS = 0.02
"""Between two messages of one stream: what is faster than 50 tokens a second comes several at a time."""
MESSAGES_PER_SECOND = 400
"""Of all streams together. A message costs as much as some tokens of a small model, and takes turns with the model for
Python's interpreter, so many streams get larger ones, each less often."""

Events = dict[int, list[dict[str, Any]]]
"""What was looked up for each request number."""


class Decoder(Protocol):
    """Continues many texts at once, as :class:`hrs.generation.batching.ContinuousBatch` does."""

    @property
    def n_active(self) -> int: ...

    @property
    def n_waiting(self) -> int: ...

    def add(self, request: Request) -> int:
        """The number of a new text."""

    def cancel(self, number: int) -> None: ...

    def step(self) -> tuple[list[SampledToken], Events]:
        """One token more for every text that has a slot; ``SampledToken.row`` is its number."""


class Reply:
    """One text on its way to a client."""

    def __init__(self, replies: "Replies", index: int, request: Request) -> None:
        self.replies, self.index, self.request = replies, index, request
        self.assembler = TextAssembler(request.sampling.stop)
        self.arrived = time.perf_counter()
        self.number: int | None = None
        self.begun = False
        """Whether a token came."""


class Replies:
    """The texts of one request; see :class:`serve.backend.Running`."""

    def __init__(self, engine: "Engine", requests: Sequence[Request]) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.members = [Reply(self, index, request) for index, request in enumerate(requests)]
        self.closed = False
        self.kept: list[Piece] = []
        """Pieces for the next message; the engine's thread alone uses this and ``sent``."""
        self.sent = -math.inf
        """When the last message was sent, on the clock of ``time.perf_counter``."""

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        left = len(self.members)
        try:
            while left:
                pieces, failure = self._until_failure(await self._queue.get())
                left -= sum(piece.finish is not None for piece in pieces)
                if pieces:
                    yield pieces
                if failure is not None:
                    raise failure
        finally:
            self.close()

    def _until_failure(self, item: Piece | Exception) -> tuple[list[Piece], Exception | None]:
        """``item`` and what else has come, up to the first failure."""
        pieces = []
        while isinstance(item, Piece):
            pieces.append(item)
            if self._queue.empty():
                return pieces, None
            item = self._queue.get_nowait()
        return pieces, item

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._engine.cancel(self)

    def take(self, failure: Exception | None = None) -> "Message":
        """Return what is kept, and ``failure`` as its end, as a message. In the engine's thread."""
        items: list[Piece | Exception] = [*self.kept, *([] if failure is None else [failure])]
        self.kept = []
        return self, items

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop in which the reader runs."""
        return self._loop

    def put(self, items: Sequence[Piece | Exception]) -> None:
        """Pass a message on to the reader. In its event loop."""
        for item in items:
            self._queue.put_nowait(item)


Message = tuple[Replies, list[Piece | Exception]]


def deliver(messages: Sequence[Message]) -> None:
    """Send messages to their readers: one call of each event loop, which takes turns with the engine's thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Message]] = {}
    for message in messages:
        by_loop.setdefault(message[0].loop, []).append(message)
    for loop, together in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, together)
        except RuntimeError:  # the loop is gone, and its clients with it
            for replies, _ in together:
                replies.close()


def _put_all(messages: Sequence[Message]) -> None:
    for replies, items in messages:
        replies.put(items)


class Engine:
    """The thread, its inbox and the texts it works on."""

    def __init__(
        self, make_decoder: Callable[[], Decoder], pieces: Sequence[bytes], *, limit: int, metrics: Metrics
    ) -> None:
        """``make_decoder`` is called again after a step that failed. ``limit``: texts there may be at once, the waiting
        ones included."""
        self._make_decoder, self._pieces, self._limit, self._metrics = make_decoder, pieces, limit, metrics
        self._decoder = make_decoder()
        self._replies: dict[int, Reply] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._accepted = 0
        self._stopping = self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- from any thread ---------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def n_accepted(self) -> int:
        """Texts begun and not finished."""
        return self._accepted

    def require_room(self, n_texts: int) -> None:
        """Raises ApiError 429 if there is no room for so many texts more, 503 if the engine has stopped."""
        if not self.alive:
            raise _stopped()
        if self._accepted + n_texts > self._limit:
            sentence = f"{self._accepted} texts are being written or wait, and {self._limit} may: try again shortly"
            raise ApiError(429, sentence, code="queue_full", retry_after=1)

    def start(self, requests: Sequence[Request]) -> Replies:
        """Begin texts, all or none.

        Raises:
            ApiError: as :meth:`require_room`.
        """
        with self._wake:
            self.require_room(len(requests))
            self._accepted += len(requests)
        replies = Replies(self, requests)
        if not self._post(lambda: self._add(replies)):
            raise _stopped()
        return replies

    def cancel(self, replies: Replies) -> None:
        self._post(lambda: self._drop(replies))

    async def run(self, work: Callable[[], T]) -> T:
        """``work()`` between two steps, in the engine's thread. Texts wait meanwhile, so it should be short."""
        future: Future[T] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        if not self._post(do):
            raise _stopped()
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End every text and stop the thread after the present step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def _post(self, command: Callable[[], None]) -> bool:
        """Whether the engine will do it: not if its thread has ended."""
        with self._wake:
            if not self._ended:
                self._inbox.append(command)
                self._wake.notify()
            return not self._ended

    # ---- in the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                with self._wake:
                    self._wake.wait_for(lambda: self._inbox or self._replies or self._stopping)
                self._do_commands()
                if self._replies:
                    self._try_step()
                self._metrics.active_slots.set(self._decoder.n_active)
                self._metrics.queue_length.set(self._decoder.n_waiting)
        finally:
            with self._wake:
                self._ended = True
            self._do_commands()
            self._cut_off()

    def _do_commands(self) -> None:
        with self._wake:
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            command()

    def _try_step(self) -> None:
        try:
            self._step()
        except Exception as error:
            self._fail(as_api_error(error))
            self._decoder = self._make_decoder()

    def _add(self, replies: Replies) -> None:
        for reply in replies.members:
            if replies.closed:
                self._forget(reply)
                self._metrics.cancelled.inc()
                continue
            try:
                reply.number = self._decoder.add(reply.request)
            except Exception as error:
                deliver([replies.take(as_api_error(error))])
                self._forget(reply)
                continue
            self._replies[reply.number] = reply
            self._metrics.tokens.labels("prompt").inc(len(reply.request.prompt))

    def _drop(self, replies: Replies) -> None:
        for reply in replies.members:
            # After a failed step numbers begin anew: by now another text may have this one.
            if reply.number is not None and self._replies.get(reply.number) is reply:
                self._decoder.cancel(reply.number)
                self._forget(reply)
                self._metrics.cancelled.inc()

    def _forget(self, reply: Reply) -> None:
        if reply.number is not None:
            self._replies.pop(reply.number, None)
        with self._wake:
            self._accepted -= 1

    def _cut_off(self) -> None:
        for number in list(self._replies):
            self._decoder.cancel(number)
        self._fail(ApiError(503, "the endpoint stopped before this reply was finished", retry_after=5))

    def _fail(self, error: Exception) -> None:
        failed = {reply.replies: None for reply in self._replies.values()}
        for reply in list(self._replies.values()):
            self._forget(reply)
        deliver([replies.take(error) for replies in failed])

    def _step(self) -> None:
        tokens, events = self._decoder.step()
        now = time.perf_counter()
        due: dict[Replies, None] = {}
        for token in tokens:
            reply = self._replies.get(token.row)
            if reply is None:
                continue
            piece = self._piece(reply, token, events.get(token.row, []), now)
            reply.replies.kept.append(piece)
            if piece.finish is not None:
                due[reply.replies] = None
        interval = max(MESSAGE_SECONDS, len(self._replies) / MESSAGES_PER_SECOND)
        for reply in self._replies.values():
            if reply.replies.kept and now - reply.replies.sent >= interval:
                due[reply.replies] = None
        for replies in due:
            replies.sent = now
        deliver([replies.take() for replies in due])
        self._metrics.tokens.labels("completion").inc(len(tokens))
        self._metrics.retrievals.inc(sum(map(len, events.values())))

    def _piece(self, reply: Reply, token: SampledToken, events: list[dict[str, Any]], now: float) -> Piece:
        text = reply.assembler.push(self._pieces[token.id], last=token.finish is not None)
        finish = "stop" if reply.assembler.stopped else token.finish
        if not reply.begun:
            reply.begun = True
            self._metrics.first_token.observe(now - reply.arrived)
        if finish is not None:
            if token.finish is None:
                self._decoder.cancel(token.row)
            self._forget(reply)
        return Piece(reply.index, text, token, finish, events)


def _stopped() -> ApiError:
    return ApiError(503, "the model has stopped: try again shortly", retry_after=5)
