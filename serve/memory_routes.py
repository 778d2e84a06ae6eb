"""``/v1/embeddings``, ``/v1/memories`` and ``/v1/topics``."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Query, Request

from serve.backend import Backend
from serve.checks import prompts_of, require_model
from serve.errors import ApiError, bad_request
from serve.formats import usage
from serve.schemas import EmbeddingRequest, MemoryRequest, SearchRequest, TopicChange
from serve.streaming import while_connected

Id = Annotated[str, Path(min_length=1, max_length=256)]
Label = Annotated[str | None, Query(min_length=1, max_length=256)]


def memory_routes(backend: Backend) -> APIRouter:
    """Routes of engrams: vectors of texts, what is remembered under them, and the topics they lie in."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/embeddings", tags=["embeddings"])
    async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
        """Engrams, mean hidden states, of length one."""
        require_model(backend, body.model)
        if body.dimensions not in (None, backend.card.width):
            sentence = f"dimensions can only be the model's width of {backend.card.width}: leave it out"
            raise bad_request(sentence, "dimensions")
        _require_few(body.input, backend.settings.max_embedding_texts)
        segments = await prompts_of(backend, body.input, "input", backend.card.context)
        vectors = await while_connected(request, backend.embed(segments))
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        units = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
        n_tokens = sum(map(len, segments))
        backend.metrics.tokens.labels("prompt").inc(n_tokens)
        counts = usage(n_tokens, 0)
        del counts["completion_tokens"]
        return {
            "object": "list",
            "model": backend.card.name,
            "data": [
                {"object": "embedding", "index": i, "embedding": _encoded(unit, body.encoding_format)}
                for i, unit in enumerate(units)
            ],
            "usage": counts,
        }

    @routes.post("/memories", tags=["memories"])
    async def remember(body: MemoryRequest, request: Request) -> dict[str, Any]:
        """Remember texts. They are on the disk when this answers."""
        texts = [body.input] if isinstance(body.input, str) else body.input
        _require_few(texts, backend.settings.max_memory_texts)
        if any(not text.strip() for text in texts):
            raise bad_request("an empty text cannot be remembered: leave it out", "input")
        await prompts_of(backend, texts, "input", backend.card.context)
        added = await backend.add_memories(request.state.space, body)
        backend.metrics.memories.inc(len(added))
        return {"object": "list", "data": added}

    @routes.get("/memories", tags=["memories"])
    async def memories(
        request: Request,
        topic: Label = None,
        source: Label = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
    ) -> dict[str, Any]:
        """What is remembered, in the order it came. ``total`` counts all of the topic and source that are asked for."""
        found, total = await backend.list_memories(
            request.state.space, topic=topic, source=source, limit=limit, offset=offset
        )
        return {"object": "list", "data": found, "total": total, "has_more": offset + len(found) < total}

    @routes.post("/memories/search", tags=["memories"])
    async def search(body: SearchRequest, request: Request) -> dict[str, Any]:
        """Memories nearest to a text, best first."""
        await prompts_of(backend, body.query, "query", backend.card.context)
        return {"object": "list", "data": await backend.search_memories(request.state.space, body)}

    @routes.get("/memories/{id}", tags=["memories"])
    async def memory(id: Id, request: Request) -> dict[str, Any]:
        """One memory."""
        if (found := await backend.get_memory(request.state.space, id)) is None:
            raise _no_such("memory", id)
        return found

    @routes.delete("/memories/{id}", tags=["memories"])
    async def forget(id: Id, request: Request) -> dict[str, Any]:
        """Forget one memory, for good."""
        if not await backend.delete_memory(request.state.space, id):
            raise _no_such("memory", id)
        return {"id": id, "object": "memory", "deleted": True}

    @routes.get("/topics", tags=["topics"])
    async def topics(request: Request) -> dict[str, Any]:
        """Topics of prompts and memories, the most recent first. ``hrs`` says how well the model tells topics apart."""
        return {"object": "list", "data": await backend.topics(request.state.space), "hrs": backend.topic_fit()}

    @routes.post("/topics/{id}", tags=["topics"])
    async def change_topic(id: Id, body: TopicChange, request: Request) -> dict[str, Any]:
        """Enable, disable or rename a topic, or make it part of another one."""
        if (changed := await backend.change_topic(request.state.space, id, body)) is None:
            raise _no_such("topic", id)
        return changed

    @routes.delete("/topics/{id}", tags=["topics"])
    async def delete_topic(id: Id, request: Request) -> dict[str, Any]:
        """Delete a topic with its prompts; memories stay, under no topic."""
        if not await backend.delete_topic(request.state.space, id):
            raise _no_such("topic", id)
        return {"id": id, "object": "topic", "deleted": True}

    return routes


def _encoded(vector: np.ndarray[Any, np.dtype[np.float32]], encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()


def _require_few(given: str | Sequence[object], most: int) -> None:
    if isinstance(given, str) or isinstance(given[0], int):
        return  # one text, or the ids of one
    if len(given) > most:
        raise ApiError(422, f"{len(given)} texts at once are more than {most}: send them in parts", param="input")


def _no_such(kind: str, id: str) -> ApiError:
    return ApiError(404, f"there is no {kind} '{id[:100]}'", code=f"{kind}_not_found")
