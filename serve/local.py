"""A model in this process as a backend: what a Ray replica holds, and what runs without Ray."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hrs.data.tokenization import end_of_text_id
from hrs.export.opening import OpenedModel
from hrs.generation.text import token_pieces
from hrs.retrieval.calibration import Calibration
from hrs.retrieval.engrams import engrams, model_fingerprint
from hrs.retrieval.retriever import SlotMaker
from serve.backend import ModelCard, Request, Scores
from serve.decoders import RetrievalDecoder
from serve.engine import Engine, Replies
from serve.errors import ApiError
from serve.memories import AUTO_TOPIC
from serve.metrics import Metrics, keep_published
from serve.reading import read, score
from serve.schemas import MemoryRequest, SearchRequest, TopicChange
from serve.settings import Settings
from serve.spaces import Spaces
from serve.topic_state import NO_TOPICS, TopicState

T = TypeVar("T")

_AT_ONCE = 4
"""Texts read between two steps of the others."""


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE))


class LocalBackend:
    """See :class:`serve.backend.Backend`.

    Args:
        opened: the model, on the device it is to run on.
        folder: where all replicas of this model keep its memories and leave their figures.
        calibration: of the model's entropies, if they are known.
        slots: what is read of memories by cross-attention, see :class:`hrs.retrieval.retriever.Retriever`.
        topics: whether prompts are sorted into topics, and how.
        replica: this replica's name among them.
    """

    def __init__(
        self,
        opened: OpenedModel,
        settings: Settings,
        folder: Path,
        *,
        calibration: Calibration | None = None,
        slots: SlotMaker | None = None,
        topics: TopicState = NO_TOPICS,
        replica: str = "0",
    ) -> None:
        model, config = opened.model, opened.config
        self.settings, self.metrics = settings, Metrics(replica)
        self._model, self._tokenizer = model, opened.tokenizer
        self._pieces = token_pieces(opened.tokenizer)
        self._end_id = end_of_text_id(opened.tokenizer)
        self.card = ModelCard(
            name=settings.name or config.preset,
            created=int(time.time()),
            preset=config.preset,
            fingerprint=model_fingerprint(model),
            causal=opened.causal,
            n_parameters=model.count_parameters(),
            context=model.max_seq_len,
            width=model.d_model,
            vocab_size=model.vocab_size,
            threshold_bits=_threshold(settings, calibration),
            entropy_quantiles=() if calibration is None else calibration.token_quantiles,
        )
        self._calibration, self._slots, self._topic_state = calibration, slots, topics
        self._spaces = Spaces(model, opened.tokenizer, folder, settings, topics)
        self.metrics.slots.set(settings.slots)
        self._engine = Engine(
            self._decoder, self._pieces, limit=settings.slots + settings.max_queue, metrics=self.metrics
        )
        self._checking: asyncio.Future[dict[str, Any]] | None = None
        self._figures = folder / "replicas"
        self._stop_publishing = keep_published(self.metrics, self._figures)

    def _decoder(self) -> RetrievalDecoder:
        return RetrievalDecoder(
            self._model, self._tokenizer, self._spaces, self.settings, self._calibration, self._slots
        )

    # ---- texts -------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids or [self._end_id]

    def decode(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._pieces[id] for id in ids)

    def token(self, id: int) -> bytes:
        return self._pieces[id]

    def require_room(self, n_texts: int) -> None:
        self._engine.require_room(n_texts)

    def start(self, requests: Sequence[Request]) -> Replies:
        return self._engine.start(requests)

    async def score(self, ids: Sequence[int], n_best: int) -> Scores:
        if len(ids) > self.card.context:
            sentence = f"log-probabilities are told of prompts up to the context of {self.card.context} tokens only"
            raise ApiError(422, sentence, param="logprobs", code="context_length_exceeded")
        return await self._engine.run(lambda: score(self._model, ids, n_best))

    async def topic_context(self, space: str, prompt: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
        self._topic_state.require("hrs.topics")
        segment = prompt[-self.card.context :]
        text = self.decode(segment).decode(errors="ignore")
        (reading,) = await self._engine.run(lambda: read(self._model, [segment], self.settings.memory_block))
        return await asyncio.to_thread(lambda: self._spaces.of(space).topic_context(reading, text))

    # ---- memories ----------------------------------------------------------------------------------------------------

    async def embed(self, segments: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        block = self.settings.memory_block
        work = partial(engrams, self._model, block=block)
        return np.concatenate([await self._engine.run(partial(work, part)) for part in _parts(segments)])

    async def add_memories(self, space: str, request: MemoryRequest) -> list[dict[str, Any]]:
        if request.topic == AUTO_TOPIC:
            self._topic_state.require("topic")
        texts = [request.input] if isinstance(request.input, str) else request.input
        readings = []
        for part in _parts([self.encode(text) for text in texts]):
            readings += await self._engine.run(partial(read, self._model, part, self.settings.memory_block))
        return await asyncio.to_thread(lambda: self._spaces.of(space).write(texts, readings, request))

    async def list_memories(
        self, space: str, *, topic: str | None, source: str | None, limit: int, offset: int
    ) -> tuple[list[dict[str, Any]], int]:
        return await asyncio.to_thread(lambda: self._spaces.of(space).page(topic, source, limit, offset))

    async def get_memory(self, space: str, id: str) -> dict[str, Any] | None:
        return await asyncio.to_thread(lambda: self._spaces.of(space).get(id))

    async def search_memories(self, space: str, request: SearchRequest) -> list[dict[str, Any]]:
        (query,) = await self.embed([self.encode(request.query)])
        return await asyncio.to_thread(lambda: self._spaces.of(space).search(query, request))

    async def delete_memory(self, space: str, id: str) -> bool:
        return await asyncio.to_thread(lambda: self._spaces.of(space).delete(id))

    async def topics(self, space: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(lambda: self._spaces.of(space).topics())

    def topic_fit(self) -> dict[str, Any]:
        return self._topic_state.document()

    async def change_topic(self, space: str, id: str, change: TopicChange) -> dict[str, Any] | None:
        return await asyncio.to_thread(lambda: self._spaces.of(space).change_topic(id, change))

    async def delete_topic(self, space: str, id: str) -> bool:
        return await asyncio.to_thread(lambda: self._spaces.of(space).delete_topic(id))

    # ---- operation ---------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the engine runs."""
        return self._engine.alive

    @property
    def n_running(self) -> int:
        """Texts that are not finished."""
        return self._engine.n_accepted

    async def check(self) -> dict[str, Any]:
        if self._checking is None or self._checking.done():  # those who ask meanwhile, without a key, share its answer
            self._checking = asyncio.ensure_future(self._check())
        return await asyncio.shield(self._checking)

    async def _check(self) -> dict[str, Any]:
        def forward() -> bool:
            device = next(self._model.parameters()).device
            with torch.no_grad():
                logits = self._model(torch.tensor([[self._end_id]], device=device)).logits
            assert logits is not None
            return bool(logits.isfinite().all())

        began = time.perf_counter()
        try:
            finite = await self._engine.run(forward)
        except Exception as error:
            raise ApiError(503, "the model cannot be run") from error
        if not finite:
            raise ApiError(503, "the model gives numbers that are not finite")
        return {"model": self.card.name, "seconds": time.perf_counter() - began, "running": self.n_running}

    def prometheus(self) -> bytes:
        return self.metrics.page(self._figures)

    def close(self) -> None:
        """Stop the engine. The backend cannot be used any more."""
        self._stop_publishing()
        self._engine.close()


def _threshold(settings: Settings, calibration: Calibration | None) -> float | None:
    if settings.retrieval_threshold_bits is not None or calibration is None:
        return settings.retrieval_threshold_bits
    return calibration.threshold_bits
