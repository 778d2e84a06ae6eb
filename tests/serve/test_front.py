"""What an endpoint survives before it knows who asks: hostile headers, bodies and connections, and too many of them."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator

import httpx
import pytest
from starlette.types import Message, Scope
from waiting import wait_until

from hrs.errors import HRSError
from serve.access import Hosts, Keys
from serve.address import bind
from serve.bodies import Bodies
from serve.endpoint import Wishes, run_endpoint
from serve.front import Front, died
from serve.listener import Limits
from serve.metrics import Metrics

QUICK = Limits(header_seconds=0.3, rest_seconds=0.3, idle_seconds=1, write_seconds=0.3, connections=20)
MOST = 100_000
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nauthorization: Bearer %s\r\ncontent-length: %d\r\n\r\n"
OK = [
    {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]},
    {"type": "http.response.body", "body": b"ok"},
]


class Stand:
    """A front before replicas that a test plays."""

    def __init__(self, limits: Limits, keys: list[str], body_seconds: float) -> None:
        self.asked: list[tuple[str, int]] = []
        """Paths and lengths of bodies that came through to a replica."""
        self.cancelled = 0
        self.go_on = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.wishes = Wishes()
        self.fails: asyncio.Future[None] = self.loop.create_future()
        self.front = Front(
            self._forward,
            keys=Keys(keys),
            hosts=Hosts("127.0.0.1", ["proxied.example"]),
            bodies=Bodies(MOST, body_seconds),
            metrics=Metrics("front"),
            most_texts=3,
            most_others=50,
        )
        bound, up = bind("127.0.0.1", 0), threading.Event()
        self.port = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._run, args=(bound, up, limits), daemon=True)
        self.thread.start()
        wait_until(up.is_set, self.thread.is_alive)

    def _run(self, bound: socket.socket, up: threading.Event, limits: Limits) -> None:
        async def fail() -> None:
            await self.fails

        run = run_endpoint(
            self.front,
            bound,
            watch=fail,
            wishes=self.wishes,
            grace_seconds=3600,
            announce=lambda _: up.set(),
            limits=limits,
        )
        try:
            self.loop.run_until_complete(run)
        except Exception as error:
            self.failure = error

    async def _forward(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        self.asked.append((scope["path"], len(body)))
        try:
            if scope["path"] == "/v1/completions":
                await asyncio.get_running_loop().run_in_executor(None, self.go_on.wait)
            if scope["path"] == "/dies":
                raise died()
            if scope["path"] in ("/endless", "/docs"):
                yield [{"type": "http.response.start", "status": 200, "headers": []}]
                while True:
                    yield [{"type": "http.response.body", "body": b"x" * 65536, "more_body": True}]
                    await asyncio.sleep(0)
            if scope["path"] == "/breaks":
                head = {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [(b"content-type", b"text/event-stream")],
                }
                yield [head, {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}]
                raise died()
            yield OK
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise

    def call(self, what, *arguments: object) -> None:
        """Call something in the front's event loop."""
        self.loop.call_soon_threadsafe(what, *arguments)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port))

    def answers(self, connection: socket.socket) -> str:
        """All that comes until the front closes the connection."""
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts).decode()

    def is_up(self, **options: object) -> bool:
        return httpx.get(self.url, **options).text == "ok"


@contextlib.contextmanager
def standing(limits: Limits = QUICK, keys: list[str] | None = None, body_seconds: float = 0.5) -> Iterator[Stand]:
    stand = Stand(limits, keys or [], body_seconds)
    try:
        yield stand
    finally:
        stand.go_on.set()
        for _ in range(3):
            stand.call(stand.wishes.add)
        stand.thread.join()
        stand.loop.close()


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing() as made:
        yield made


def error_of(response: httpx.Response | str) -> dict:
    text = response if isinstance(response, str) else response.text
    return json.loads(text.partition("\r\n\r\n")[2] or text)["error"]


# ---- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "beginning",
    [b"GET /", b"GET / HTTP/1.1\r\nHost: ", b"GET / HTTP/1.1\r\nx: 1\r\n",
     b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\nGET /"],
    ids=["path", "line", "lines", "second request"],
)  # fmt: skip
def test_an_endless_header_is_refused_before_it_is_read(stand: Stand, beginning: bytes) -> None:
    more = b"x: 1\r\n" * 10_000 if beginning.endswith(b"\n") else b"a" * 60_000
    with stand.connect() as connection:
        connection.sendall(beginning)
        with contextlib.suppress(ConnectionError):
            for _ in range(2000):  # 120 MB, if they were taken
                connection.sendall(more)
            raise AssertionError("all of it was read")
        assert stand.is_up()


def test_what_is_no_http_is_told_so(stand: Stand) -> None:
    for nonsense in (
        b"\x16\x03\x01\x00\xff\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    ):
        with stand.connect() as connection:
            connection.sendall(nonsense)
            answer = stand.answers(connection)
        assert answer.startswith("HTTP/1.1 400 ")
        assert "this is no HTTP request" in error_of(answer)["message"]


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost:", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET"])
def test_a_header_that_does_not_come_ends_the_connection(stand: Stand, sent: bytes) -> None:
    with stand.connect() as connection:
        connection.sendall(sent)
        answer = stand.answers(connection)
    assert answer.count("HTTP/1.1 200") == sent.count(b"\r\n\r\n")


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1", HEAD % (b"", 9) + b"{"], ids=["nothing", "header", "body"])
def test_connections_without_a_complete_request_keep_nobody_out(sent: bytes) -> None:
    patient = Limits(header_seconds=3600, connections=20)
    with standing(patient, body_seconds=3600) as full, contextlib.ExitStack() as opened:
        idle = [opened.enter_context(full.connect()) for _ in range(60)]
        for connection in idle:
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
        assert all(full.is_up() for _ in range(5))
        assert full.answers(idle[0]) == "", "the one that waited longest made room"


# ---- bodies ----------------------------------------------------------------------------------------------------------


def test_unfinished_bodies_hold_nothing_and_end(stand: Stand) -> None:
    many = Limits(connections=400)
    with standing(many) as wide, contextlib.ExitStack() as opened:
        held = [opened.enter_context(wide.connect()) for _ in range(300)]
        for connection in held:
            connection.sendall(HEAD % (b"k", 1000) + b"{")
        assert wide.is_up()
        answer = wide.answers(held[0])
        assert answer.startswith("HTTP/1.1 408 ")
        assert "was not complete within 0.5 seconds" in error_of(answer)["message"]
        assert wide.asked == [("/", 0)], "no unfinished body reaches a replica"


def test_the_key_is_checked_before_the_body_is_read() -> None:
    with standing(keys=["right"]) as guarded:
        for sent in (HEAD % (b"wrong", MOST * 10), HEAD % (b"", 5)):
            with guarded.connect() as connection:
                connection.sendall(sent)  # and not a byte of the body
                answer = guarded.answers(connection)
            assert answer.startswith("HTTP/1.1 401 ")
        with guarded.connect() as connection:
            connection.sendall(HEAD % (b"right", MOST * 10))
            assert guarded.answers(connection).startswith("HTTP/1.1 413 ")
        assert httpx.post(f"{guarded.url}/v1/embeddings", headers={"Authorization": "Bearer right"}).text == "ok"
        assert guarded.asked == [("/v1/embeddings", 0)]


def test_a_refused_body_may_still_be_sent_and_the_connection_used(stand: Stand) -> None:
    with httpx.Client() as client:
        for _ in range(3):
            refused = client.post(stand.url, content=b"x" * (MOST + 1))
            assert (refused.status_code, error_of(refused)["code"]) == (413, "body_too_large")
            assert client.get(stand.url).text == "ok"


def test_a_body_in_a_million_pieces_keeps_nobody_waiting(stand: Stand) -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    with stand.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(head)
        for _ in range(100):
            connection.sendall(b"1\r\nx\r\n" * 10_000)
        assert stand.is_up()


def test_more_bodies_than_there_is_room_for_are_refused() -> None:
    async def read() -> list[object]:
        bodies = Bodies(1000, 3600)

        async def pieces() -> Message:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b"x" * 999, "more_body": True}

        hanging = asyncio.Event()

        def receiver():
            given = False

            async def receive() -> Message:
                nonlocal given
                if given:
                    await hanging.wait()
                    return {"type": "http.disconnect"}
                given = True
                return await pieces()

            return receive

        reading = [asyncio.ensure_future(bodies.read(receiver())) for _ in range(140)]
        await asyncio.wait(reading, timeout=0.2, return_when=asyncio.FIRST_EXCEPTION)
        hanging.set()
        return await asyncio.gather(*reading, return_exceptions=True)

    results = asyncio.run(read())
    refused = [each for each in results if isinstance(each, Exception)]
    assert 0 < len(refused) <= 12
    assert {error.status for error in refused} == {429}


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.2:1", "[::1]:8000", "proxied.example:443"]
)
def test_names_of_this_machine_are_accepted(stand: Stand, host: str) -> None:
    assert stand.is_up(headers={"Host": host})


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "10.0.0.1", "localhost.evil.example", "[::2]", "", "127.0.0.1.nip.io"]
)
def test_names_of_others_are_refused_on_the_loopback_interface(stand: Stand, host: str) -> None:
    refused = httpx.get(stand.url, headers={"Host": host})
    assert (refused.status_code, error_of(refused)["code"]) == (403, "host_not_allowed")


def test_other_machines_may_ask_by_any_name() -> None:
    scope = {"headers": [(b"host", b"anything.example")]}
    for address in ("0.0.0.0", "::", "192.0.2.1"):
        Hosts(address).check(scope)
    Hosts("127.0.0.1").check({"headers": []})  # HTTP/1.0


# ---- replicas --------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy() -> Iterator[tuple[Stand, list[threading.Thread], list[httpx.Response]]]:
    """Three requests wait for replicas, as many as may."""
    with standing() as made:
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(httpx.post(f"{made.url}/v1/completions", timeout=None)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(made.asked) == 3)
        yield made, threads, answers


def test_what_is_too_much_is_refused_at_once(busy) -> None:
    stand, threads, answers = busy
    refused = httpx.post(f"{stand.url}/v1/completions")
    assert (refused.status_code, error_of(refused)["code"], refused.headers["retry-after"]) == (429, "queue_full", "1")
    assert httpx.get(f"{stand.url}/v1/models").text == "ok", "what needs no slot is answered"
    stand.call(stand.front.set_replicas, 2)
    wait_until(lambda: stand.front._n_replicas == 2)
    waiting = threading.Thread(target=httpx.post, args=(f"{stand.url}/v1/completions",), kwargs={"timeout": None})
    waiting.start()
    wait_until(lambda: len(stand.asked) == 5)
    stand.go_on.set()
    for thread in (*threads, waiting):
        thread.join()
    assert [answer.text for answer in answers] == ["ok"] * 3


def test_pages_that_nobody_reads_take_the_place_of_nothing_else() -> None:
    with standing(Limits(write_seconds=3600, connections=100)) as made, contextlib.ExitStack() as opened:
        for _ in range(50):
            opened.enter_context(made.connect()).sendall(b"GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: made.front.n_running == 50)
        assert httpx.get(f"{made.url}/docs").status_code == 429
        for path in ("/healthz", "/v1/models"):
            assert httpx.get(made.url + path).text == "ok"


def test_without_a_replica_everybody_is_told_at_once(busy) -> None:
    stand, threads, answers = busy
    stand.call(stand.front.set_replicas, 0)
    for thread in threads:
        thread.join()
    for answer in (*answers, httpx.get(f"{stand.url}/healthz"), httpx.post(f"{stand.url}/v1/completions")):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert error_of(answer)["message"].startswith("no process of the model runs at the moment")
    stand.call(stand.front.set_replicas, 1)
    wait_until(stand.is_up)


def test_when_no_replica_can_live_clients_are_told_and_the_endpoint_ends(busy) -> None:
    stand, threads, answers = busy
    stand.call(stand.front.set_replicas, 0)
    stand.call(stand.fails.set_exception, HRSError("the reason"))
    for thread in (*threads, stand.thread):
        thread.join()
    assert [answer.status_code for answer in answers] == [503] * 3
    assert str(stand.failure) == "the reason"
    with pytest.raises(httpx.ConnectError):
        stand.is_up()


def test_when_ray_fails_running_replies_are_finished(busy) -> None:
    stand, threads, answers = busy
    stand.call(stand.fails.set_exception, HRSError("the reason"))
    wait_until(lambda: httpx.get(f"{stand.url}/v1/models").status_code == 503)
    stand.go_on.set()
    for thread in (*threads, stand.thread):
        thread.join()
    assert [answer.text for answer in answers] == ["ok"] * 3
    assert str(stand.failure) == "the reason"


def test_a_replica_that_ends_is_told(stand: Stand) -> None:
    response = httpx.get(f"{stand.url}/dies")
    assert (response.status_code, error_of(response)["code"]) == (500, "replica_died")
    first, last = httpx.get(f"{stand.url}/breaks").text.strip().split("\n\n")
    assert first == "data: 1"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_died"


def test_bodies_that_are_not_complete_when_it_stops_are_refused(stand: Stand) -> None:
    with standing() as other, other.connect() as connection:
        connection.sendall(HEAD % (b"", 1000) + b"{")
        time.sleep(0.1)
        other.call(other.wishes.add)
        answer = other.answers(connection)
        assert answer.startswith("HTTP/1.1 503 ")
        other.thread.join()


# ---- clients that do not read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "does not read"])
def test_a_client_that_takes_nothing_frees_its_replica(leaves: bool) -> None:
    with standing() as made, made.connect() as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: made.asked)
        if leaves:
            connection.close()
        wait_until(lambda: made.cancelled)
        wait_until(lambda: not made.front.n_running)


def test_requests_that_are_sent_ahead_are_answered_in_order_and_bounded(stand: Stand) -> None:
    ask = b"GET /%d HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with stand.connect() as connection:
        connection.sendall(b"".join(ask % number for number in range(6)))
        wait_until(lambda: ("/5", 0) in stand.asked)
        assert stand.answers(connection).count("HTTP/1.1 200") == 6  # it idles then, and is closed
    with stand.connect() as connection:
        connection.sendall(ask % 0 * 500)
        stand.answers(connection)
    assert stand.is_up()
