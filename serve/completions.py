"""``/v1/completions`` and ``/v1/chat/completions``."""

import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hrs.generation import Sampling
from serve.backend import Backend, Piece, Running, Scores
from serve.backend import Request as Text
from serve.chat import chat_prompt, chat_stops
from serve.checks import prompts_of, require_model, require_possible
from serve.formats import ChatFormat, Choice, CompletionFormat, Envelope, usage
from serve.schemas import ChatRequest, CompletionRequest, Sampled
from serve.streaming import DONE, EventStream, first_piece, sse, while_connected


def completion_routes(backend: Backend) -> APIRouter:
    """Routes that continue texts."""
    routes = APIRouter(prefix="/v1", tags=["completions"])

    @routes.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        require_model(backend, body.model)
        prompts = await prompts_of(backend, body.prompt, "prompt")
        n_new, wants = 16 if body.max_tokens is None else body.max_tokens, body.logprobs is not None
        require_possible(backend, len(prompts), body.n, n_new)
        backend.require_room(len(prompts) * body.n)
        scores: list[Scores | None] = [None] * len(prompts)
        if body.echo and body.logprobs is not None:
            scores = [await backend.score(ids, body.logprobs) for ids in prompts]
        job = await _Job.of(
            backend, request.state.space, body, prompts, n_new, tuple(body.stop or ()), body.logprobs or 0
        )
        choices = []
        for index, topic in enumerate(job.topics):
            ids, score = prompts[index // body.n], scores[index // body.n]
            echo = backend.decode(ids).decode(errors="replace") if body.echo else None
            choices.append(Choice(index, backend.token, wants, body.hrs.details, echo, ids, score, topic))
        return await _answer(job, CompletionFormat(), choices, request)

    @routes.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation, spelled out as docs/serving.md says."""
        require_model(backend, body.model)
        prompts = await prompts_of(backend, chat_prompt(body.messages), "messages")
        limits = [n for n in (body.max_completion_tokens, body.max_tokens) if n is not None]
        most = limits[0] if limits else min(backend.settings.default_chat_tokens, backend.settings.max_new_tokens)
        require_possible(backend, 1, body.n, most)
        backend.require_room(body.n)
        stops = (*(body.stop or ()), *chat_stops())
        job = await _Job.of(backend, request.state.space, body, prompts, most, stops, body.top_logprobs or 0)
        choices = [
            Choice(index, backend.token, body.logprobs, body.hrs.details, topic=topic, skip_space=True)
            for index, topic in enumerate(job.topics)
        ]
        return await _answer(job, ChatFormat(), choices, request)

    return routes


class _Job:
    """The texts of one request."""

    def __init__(self, backend: Backend, body: Sampled, n_prompt_tokens: int, n_new: int, seed: int) -> None:
        self.backend, self.body, self.seed = backend, body, seed
        self.n_prompt_tokens, self.n_new = n_prompt_tokens, n_new
        self.texts: list[Text] = []
        self.topics: list[dict[str, Any] | None] = []
        """Where each text's prompt was sorted, if that was asked for."""

    @classmethod
    async def of(
        cls,
        backend: Backend,
        space: str,
        body: Sampled,
        prompts: Sequence[Sequence[int]],
        n_new: int,
        stop: tuple[str, ...],
        n_best: int,
    ) -> "_Job":
        seed = secrets.randbits(53) if body.seed is None else body.seed
        job = cls(backend, body, sum(map(len, prompts)), n_new, seed)
        for ids in prompts:
            context, topic = await backend.topic_context(space, ids) if body.hrs.topics else ([], None)
            for number in range(body.n):
                sampling = _sampling(body, n_new, stop, choice_seed(seed, number))
                job.texts.append(
                    Text(
                        prompt=ids,
                        sampling=sampling,
                        context=context,
                        retrieval=body.hrs.retrieval,
                        space=space,
                        n_best=n_best,
                    )
                )
                job.topics.append(topic)
        return job

    def start(self) -> Running | None:
        """None if no token is asked for."""
        return self.backend.start(self.texts) if self.n_new else None


def _sampling(body: Sampled, n_new: int, stop: tuple[str, ...], seed: int) -> Sampling:
    return Sampling(
        temperature=body.temperature,
        top_k=body.hrs.top_k,
        top_p=body.top_p,
        min_p=body.hrs.min_p,
        repetition_penalty=body.hrs.repetition_penalty,
        max_new_tokens=max(n_new, 1),
        stop=stop,
        seed=seed,
    )


def choice_seed(seed: int, number: int) -> int:
    """The seed of a prompt's choice ``number``. That of the first is the request's own, as in ``hrs generate``."""
    seed %= 2**64
    if number == 0:
        return seed
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])


async def _answer(job: _Job, form: CompletionFormat | ChatFormat, choices: list[Choice], request: Request) -> Response:
    envelope = Envelope(form, job.backend.card, job.seed)
    running = job.start()
    try:
        if job.body.stream:
            pieces = None if running is None else await while_connected(request, first_piece(running))
            return EventStream(_events(job, form, envelope, choices, pieces), running)
        if running is not None:
            await while_connected(request, _collect(running, choices))
        return JSONResponse(envelope.whole(choices, _usage(job, choices)))
    except BaseException:  # also when this is cancelled: nobody else knows of the texts yet
        if running is not None:
            running.close()
        raise


async def _collect(running: Running, choices: list[Choice]) -> None:
    async for pieces in running:
        for piece in pieces:
            choices[piece.index].add(piece)


async def _events(
    job: _Job,
    form: CompletionFormat | ChatFormat,
    envelope: Envelope,
    choices: list[Choice],
    pieces: AsyncIterator[list[Piece]] | None,
) -> AsyncIterator[str]:
    counts = job.body.stream_options is not None and job.body.stream_options.include_usage
    null_usage: dict[str, Any] = {"usage": None} if counts else {}
    for choice in choices:
        if (opening := form.opening(choice)) is not None:
            if pieces is None:
                opening["finish_reason"] = "length"
            yield sse(envelope.chunk(opening, **null_usage))
    if pieces is not None:
        async for together in pieces:
            chunks = []
            for piece in together:
                choice = choices[piece.index]
                shown = choice.add(piece)
                if shown.text or shown.finish or shown.events or choice.details or choice.log_probs:
                    chunks.append(sse(envelope.chunk(form.delta(choice, shown), **null_usage)))
            if chunks:
                yield "".join(chunks)
    if counts:
        yield sse(envelope.last(_usage(job, choices)))
    yield DONE


def _usage(job: _Job, choices: Sequence[Choice]) -> dict[str, int]:
    return usage(job.n_prompt_tokens, sum(len(choice.pieces) for choice in choices))
