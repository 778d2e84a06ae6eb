"""What the HTTP layer needs of whatever runs the model. :class:`serve.local.LocalBackend` is one; tests make others."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hrs.generation import FinishReason, SampledToken, Sampling
from serve.metrics import Metrics
from serve.schemas import MemoryRequest, RetrievalOptions, SearchRequest, TopicChange
from serve.settings import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What a client may know of the model."""

    name: str
    created: int
    """Unix seconds."""
    preset: str
    fingerprint: str
    causal: bool | None
    """What its audit said; None if there was none."""
    n_parameters: int
    context: int
    width: int
    vocab_size: int
    threshold_bits: float | None = None
    """Rolling entropy above which memories are looked up if a request does not say; None if it must."""
    entropy_quantiles: tuple[float, ...] = ()
    """[101], bits of a token's entropy at quantiles 0, 0.01, ..., 1 on validation text; empty if never measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One text to continue."""

    prompt: Sequence[int]
    sampling: Sampling
    """With ``stop``: the backend ends a text there at once."""
    context: Sequence[int] = ()
    """Ids the model reads before the prompt, as far as they fit; not part of the text."""
    retrieval: RetrievalOptions | None = None
    space: str = ""
    """Whose memories are looked up."""
    n_best: int = 0
    """How many of the likeliest tokens to tell of with every new one: :attr:`hrs.generation.SampledToken.best`."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one more token adds to one text."""

    index: int
    """Which request of those started together, from 0."""
    text: str
    """Text that is certain now; may be empty."""
    token: SampledToken
    finish: FinishReason | None
    events: list[dict[str, Any]] = field(default_factory=list)
    """What was looked up just now."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model says of a text that is there. n tokens, the first of which has nothing before it."""

    log_probs: list[float | None]
    """[n], nats."""
    entropies: list[float | None]
    """[n], bits, of the distribution each token came from."""
    best: list[dict[int, float] | None]
    """[n], the likeliest tokens and their log-probabilities."""


class Running(Protocol):
    """Texts that grow."""

    def __aiter__(self) -> AsyncIterator[list[Piece]]:
        """Their pieces as they come, one or more at a time, until every text is finished."""

    def close(self) -> None:
        """Stop those that are not finished, now. May be called more than once."""


class Backend(Protocol):
    """One model with its memories and topics. Methods raise :class:`serve.errors.ApiError` or HRSError.

    ``space`` names whose memories and topics are meant: :meth:`serve.access.Keys.check` gives it for a request.
    """

    settings: Settings
    card: ModelCard
    metrics: Metrics

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> bytes: ...

    def token(self, id: int) -> bytes: ...

    def require_room(self, n_texts: int) -> None:
        """Raises ApiError 429 if the queue has no room for so many texts more."""

    def start(self, requests: Sequence[Request]) -> Running:
        """Begin all of ``requests`` or, if the queue has no room for all, none (429)."""

    async def score(self, ids: Sequence[int], n_best: int) -> Scores: ...

    async def topic_context(self, space: str, prompt: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
        """What the prompt's topic has to say before it, and the topic. The prompt belongs to it from now on."""

    async def embed(self, segments: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Engrams [N, width]."""

    async def add_memories(self, space: str, request: MemoryRequest) -> list[dict[str, Any]]:
        """Durable when it returns."""

    async def list_memories(
        self, space: str, *, topic: str | None, source: str | None, limit: int, offset: int
    ) -> tuple[list[dict[str, Any]], int]:
        """A page of the memories of a topic and a source, and how many of these there are in all."""

    async def get_memory(self, space: str, number: str) -> dict[str, Any] | None: ...

    async def search_memories(self, space: str, request: SearchRequest) -> list[dict[str, Any]]: ...

    async def delete_memory(self, space: str, number: str) -> bool: ...

    async def topics(self, space: str) -> list[dict[str, Any]]: ...

    def topic_fit(self) -> dict[str, Any]:
        """Whether prompts are sorted into topics, how well that works, and why not if they are not."""

    async def change_topic(self, space: str, number: str, change: TopicChange) -> dict[str, Any] | None: ...

    async def delete_topic(self, space: str, number: str) -> bool: ...

    async def check(self) -> dict[str, Any]:
        """Runs the model on a token. Raises ApiError 503 if that cannot be done."""

    def prometheus(self) -> bytes:
        """Metrics of every replica, in Prometheus' text format."""
