"""What a model remembers: its engram store and its topics, which all replicas share through one folder."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrs.retrieval.store import EngramStore, Memory, NewMemory
from hrs.retrieval.topics import Assignment, TopicContexts, TopicInfo
from serve.errors import storing
from serve.joint_store import JointStore
from serve.reading import Reading
from serve.schemas import MemoryRequest, SearchRequest, TopicChange
from serve.shared_topics import SharedTopics
from serve.topic_state import TopicState

AUTO_TOPIC = "auto"


class Memories:
    """The memories and topics of one space; for any thread.

    Args:
        end_id: of the token that ends a text.
        budget: tokens of a topic context that the model reads.
        state: whether prompts are sorted, and how.
    """

    def __init__(
        self, store: EngramStore | JointStore, topics: SharedTopics, end_id: int, budget: int, state: TopicState
    ) -> None:
        self.store, self._topics, self._end_id, self._budget = store, topics, end_id, budget
        self._topic_state = state

    # ---- memories ----------------------------------------------------------------------------------------------------

    def write(self, texts: Sequence[str], readings: Sequence[Reading], request: MemoryRequest) -> list[dict[str, Any]]:
        """Remember texts, on the disk when this returns."""
        new = [
            NewMemory(text=text, entropy=r.entropy, source=request.source, topic=self._topic(request.topic, r, text))
            for text, r in zip(texts, readings, strict=True)
        ]
        with storing():
            added = self.store.add(new, np.stack([r.engram for r in readings]))
        return [as_document(memory) for memory in added]

    def page(self, topic: str | None, source: str | None, limit: int, offset: int) -> tuple[list[dict[str, Any]], int]:
        """A page of the memories of a topic and a source, and how many of these there are in all."""
        with storing():
            found = self.store.list(topic=topic, source=source, limit=limit, offset=offset)
            return [as_document(memory) for memory in found], self.store.count(topic=topic, source=source)

    def get(self, id: str) -> dict[str, Any] | None:
        with storing():
            return next((as_document(memory) for memory in self.store.get([id])), None)

    def delete(self, id: str) -> bool:
        with storing():
            return self.store.delete([id]) > 0

    def search(self, query: NDArray[np.float32], request: SearchRequest) -> list[dict[str, Any]]:
        """Memories nearest to an engram [d], those of disabled topics left out."""
        topics = None if request.topics is None else self.with_former(request.topics)
        disabled = self.disabled() or None
        with storing():
            (hits,) = self.store.search(
                query[None],
                request.k,
                min_similarity=request.min_similarity,
                topics=topics,
                sources=request.sources,
                exclude_topics=disabled,
            )
        return [{**as_document(hit.memory), "similarity": hit.similarity} for hit in hits]

    # ---- topics ------------------------------------------------------------------------------------------------------

    def topics(self) -> list[dict[str, Any]]:
        """The most recent first."""
        return [_topic_document(info) for info in self._topics.read()]

    def change_topic(self, id: str, change: TopicChange) -> dict[str, Any] | None:
        """None if there is no such topic."""
        if not any(id in (info.id, *info.merged_ids) for info in self._topics.read()):
            return None

        def how(topics: TopicContexts) -> dict[str, Any]:
            current = id if change.into is None else topics.join_into(id, change.into)
            if change.enabled is not None:
                current = topics.enable(current, change.enabled)
            if change.name is not None:
                current = topics.rename(current, change.name)
            return _topic_document(topics.get(current))

        return self._topics.change(how)

    def delete_topic(self, id: str) -> bool:
        """Return whether there was such a topic."""
        if not any(id in (info.id, *info.merged_ids) for info in self._topics.read()):
            return False
        self._topics.change(lambda topics: topics.delete(id))
        return True

    def topic_context(self, reading: Reading, text: str) -> tuple[list[int], dict[str, Any]]:
        """What stands before a prompt, and its topic, which it belongs to from now on.

        Raises:
            ApiError: 400 if topics are off.
        """
        engram = self._topic_state.require("hrs.topics").centred(reading.engram)

        def how(topics: TopicContexts) -> tuple[list[int], Assignment, TopicInfo]:
            context = topics.context(engram=engram, budget=self._budget)
            assignment = topics.assign(engram, [*reading.ids, self._end_id], text)
            return context, assignment, topics.get(assignment.topic_id)

        context, assignment, info = self._topics.change(how)
        document = _topic_document(info) | {
            "similarity": assignment.similarity,
            "created": assignment.created,
            "context_tokens": len(context),
        }
        return context, document

    def disabled(self) -> set[str]:
        """Ids of topics that are off, former ids included."""
        return {id for info in self._topics.read() if not info.enabled for id in (info.id, *info.merged_ids)}

    def with_former(self, ids: Sequence[str]) -> set[str]:
        """``ids`` with those of topics that became part of theirs: memories keep the id they were written with."""
        groups = [{info.id, *info.merged_ids} for info in self._topics.read()]
        return set(ids).union(*(group for group in groups if group & set(ids)))

    def _topic(self, wanted: str | None, reading: Reading, text: str) -> str | None:
        if wanted != AUTO_TOPIC:
            return wanted
        engram, ids = self._topic_state.require("topic").centred(reading.engram), [*reading.ids, self._end_id]
        return self._topics.change(lambda topics: topics.assign(engram, ids, text)).topic_id


def as_document(memory: Memory) -> dict[str, Any]:
    """A memory as clients see it."""
    return {"object": "memory", **asdict(memory)}


def _topic_document(info: TopicInfo) -> dict[str, Any]:
    return {"object": "topic", **asdict(info), "merged_ids": list(info.merged_ids)}
