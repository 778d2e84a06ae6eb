"""The engine's thread: steps that fail, work between steps, texts that are given up, and room that comes back."""

import asyncio
import contextlib
import threading
import time

import pytest

from hrs.generation import SampledToken, Sampling
from serve.backend import Piece, Request
from serve.engine import Engine, Events, Message, _put_all
from serve.errors import ApiError
from serve.metrics import Metrics

PIECES = [b"a", b"b", b"\xe2", b"\x82\xac"]


class Scripted:
    """Every text is the ids of its prompt, one per step; an id of -1 fails the step for all."""

    def __init__(self, step_seconds: float = 0) -> None:
        self.step_seconds = step_seconds
        self.texts: dict[int, list[int]] = {}
        self.cancelled: list[int] = []
        self.may_step = threading.Event()
        self.may_step.set()
        self.n_waiting = 0
        self.n_added = 0

    @property
    def n_active(self) -> int:
        return len(self.texts)

    def add(self, request: Request) -> int:
        if not request.prompt:
            raise ApiError(400, "an empty prompt")
        self.texts[self.n_added] = list(request.prompt)
        self.n_added += 1
        return self.n_added - 1

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        self.texts.pop(number, None)

    def step(self) -> tuple[list[SampledToken], Events]:
        assert self.may_step.wait()
        time.sleep(self.step_seconds)
        tokens = []
        for number, text in list(self.texts.items()):
            id = text.pop(0)
            if id < 0:
                raise RuntimeError("a card fell off the bus")
            tokens.append(SampledToken(number, id, -1.0, 2.0, None if text else "length"))
            if not text:
                del self.texts[number]
        return tokens, {token.row: [{"step": 0}] for token in tokens if token.id == 1}


@contextlib.contextmanager
def engine_of(*decoders: Scripted, limit: int = 4):
    made = iter(decoders)
    engine = Engine(lambda: next(made), PIECES, limit=limit, metrics=Metrics())
    try:
        yield engine
    finally:
        engine.close()
        assert not engine._thread.is_alive()


def text(*ids: int, stop: tuple[str, ...] = ()) -> Request:
    return Request(prompt=ids, sampling=Sampling(stop=stop))


async def collect(engine: Engine, *requests: Request) -> list[Piece]:
    return [piece async for pieces in engine.start(requests) for piece in pieces]


def test_pieces_are_whole_characters_and_carry_events() -> None:
    with engine_of(Scripted()) as engine:
        pieces = asyncio.run(collect(engine, text(0, 2, 3, 1), text(1)))
    first = [piece for piece in pieces if piece.index == 0]
    assert [piece.text for piece in first] == ["a", "", "€", "b"]
    assert [piece.finish for piece in first] == [None, None, None, "length"]
    assert [bool(piece.events) for piece in first] == [False, False, False, True]
    assert [piece.text for piece in pieces if piece.index == 1] == ["b"]


def test_a_stop_string_frees_the_slot_at_once() -> None:
    decoder = Scripted()
    with engine_of(decoder) as engine:
        pieces = asyncio.run(collect(engine, text(0, 1, 0, 0, 0, stop=("b",))))
        assert [piece.text for piece in pieces] == ["a", ""]
        assert pieces[-1].finish == "stop"
        assert decoder.cancelled == [0]
        assert engine.n_accepted == 0


def test_a_failed_step_ends_all_its_texts_and_the_next_one_works() -> None:
    async def run(engine: Engine) -> None:
        results = await asyncio.gather(
            collect(engine, text(0, 0, -1)), collect(engine, text(0, 0, 0, 0)), return_exceptions=True
        )
        assert [getattr(result, "status", None) for result in results] == [500, 500]
        assert "bus" not in str(results[0])
        assert [piece.text for piece in await collect(engine, text(0, 1))] == ["a", "b"]
        assert engine.n_accepted == 0

    with engine_of(Scripted(), Scripted()) as engine:
        asyncio.run(run(engine))


def test_messages_are_few_and_nothing_is_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 a second for one stream, 400 for all; the first and the last token wait for nothing."""
    sent: dict[object, list[int]] = {}

    def put_all(messages: list[Message]) -> None:
        for replies, items in messages:
            sent.setdefault(replies, []).append(len(items))
        _put_all(messages)

    monkeypatch.setattr("serve.engine._put_all", put_all)

    async def run(engine: Engine, n_streams: int) -> float:
        began = time.perf_counter()
        streams = await asyncio.gather(*(collect(engine, text(*[0] * 300)) for _ in range(n_streams)))
        assert all(len(pieces) == 300 and pieces[-1].finish == "length" for pieces in streams)
        return time.perf_counter() - began

    for n_streams, per_second in ((1, 50), (40, 400)):
        sent.clear()
        with engine_of(Scripted(step_seconds=0.001), limit=40) as engine:
            seconds = asyncio.run(run(engine, n_streams))
        assert len(sent) == n_streams
        assert all(sizes[0] == 1 and sum(sizes) == 300 for sizes in sent.values())
        assert sum(map(len, sent.values())) <= per_second * seconds + 2 * n_streams


def test_what_came_before_a_failure_is_told() -> None:
    async def run(engine: Engine) -> None:
        pieces: list[Piece] = []
        with pytest.raises(ApiError):
            async for together in engine.start([text(0, 1, 0, -1)]):
                pieces += together
        assert [piece.text for piece in pieces] == ["a", "b", "a"]

    with engine_of(Scripted(), Scripted()) as engine:
        asyncio.run(run(engine))


def test_a_text_that_failed_takes_none_with_it_that_has_its_number_now() -> None:
    second = Scripted()

    async def run(engine: Engine) -> None:
        failed = engine.start([text(-1)])
        while engine.n_accepted:
            await asyncio.sleep(0.001)
        second.may_step.clear()
        running = asyncio.ensure_future(collect(engine, text(0, 1)))
        while not second.texts:
            await asyncio.sleep(0.001)
        failed.close()  # both are number 0 of their decoder
        second.may_step.set()
        assert [piece.text for piece in await running] == ["a", "b"]

    with engine_of(Scripted(), second) as engine:
        asyncio.run(run(engine))
    assert second.cancelled == []


def test_a_text_that_is_refused_does_not_harm_the_others() -> None:
    async def run(engine: Engine) -> None:
        refused, fine = await asyncio.gather(
            collect(engine, text()), collect(engine, text(0, 1)), return_exceptions=True
        )
        assert refused.status == 400
        assert len(fine) == 2
        assert engine.n_accepted == 0

    with engine_of(Scripted()) as engine:
        asyncio.run(run(engine))


def test_room_is_for_all_texts_of_a_request_or_none_and_comes_back() -> None:
    decoder = Scripted()

    async def run(engine: Engine) -> None:
        decoder.may_step.clear()
        running = engine.start([text(0, 0, 0)] * 3)
        with pytest.raises(ApiError) as refused:
            engine.start([text(0)] * 2)
        assert (refused.value.status, engine.n_accepted) == (429, 3)
        engine.start([text(0)]).close()
        running.close()
        running.close()
        decoder.may_step.set()
        while engine.n_accepted:
            await asyncio.sleep(0.001)
        assert len(await collect(engine, *[text(0)] * 4)) == 4

    with engine_of(decoder, limit=4) as engine:
        asyncio.run(run(engine))
    assert engine._metrics.registry.get_sample_value("hrs_cancelled_total") == 4


def test_a_reader_that_stops_reading_gives_its_text_up() -> None:
    decoder = Scripted()

    async def run(engine: Engine) -> None:
        async for _ in engine.start([text(*[0] * 10_000)]):
            break
        while engine.n_accepted:
            await asyncio.sleep(0.001)

    with engine_of(decoder) as engine:
        asyncio.run(run(engine))
    assert decoder.cancelled == [0]


def test_work_is_done_in_the_engines_thread_between_steps() -> None:
    def work() -> str:
        return threading.current_thread().name

    def fail() -> None:
        raise ApiError(422, "too much")

    async def run(engine: Engine) -> None:
        assert await engine.run(work) == "engine"
        with pytest.raises(ApiError, match="too much"):
            await engine.run(fail)
        running = asyncio.ensure_future(collect(engine, text(*[0] * 500)))
        await asyncio.sleep(0)
        assert await engine.run(work) == "engine"
        assert len(await running) == 500

    with engine_of(Scripted()) as engine:
        asyncio.run(run(engine))


def test_a_closed_engine_says_so() -> None:
    async def run(engine: Engine) -> None:
        running = asyncio.ensure_future(collect(engine, text(*[0] * 100_000)))
        while not engine.n_accepted:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.close)
        with pytest.raises(ApiError) as ended:
            await running
        assert ended.value.status == 503
        for use in (lambda: engine.start([text(0)]), lambda: asyncio.ensure_future(engine.run(lambda: 1))):
            with pytest.raises(ApiError) as refused:
                if isinstance(waiting := use(), asyncio.Future):
                    await waiting
            assert refused.value.status == 503

    with engine_of(Scripted()) as engine:
        asyncio.run(run(engine))
    assert not engine.alive
