"""Whose memories are whose: a folder for each API key, or one for everybody if no keys are asked for."""

import threading
from pathlib import Path

from tokenizers import Tokenizer

from hrs.data.tokenization import end_of_text_id
from hrs.files import absolute_path
from hrs.models import LanguageModel
from hrs.retrieval.engrams import model_fingerprint
from hrs.retrieval.store import EngramStore
from hrs.retrieval.topics.stress_result import Thresholds
from serve.errors import storing
from serve.joint_store import JointStore
from serve.memories import Memories
from serve.settings import Settings
from serve.shared_topics import SharedTopics
from serve.topic_state import NO_TOPICS, TopicState

EVERYBODY = ""
"""The name of the space of an endpoint without keys."""


_TOPIC_TOKENS = 384
"""Of the earlier prompts of topics that a prompt is read after; never more than half of the model's context, which is
what a :class:`hrs.retrieval.retriever.Retriever` puts before a text."""


class Spaces:
    """Memories and topics by space, each opened when it is first asked for.

    The engram store of ``settings.memories`` is read and written by everybody if there are no keys. Otherwise it is
    read by all keys, and each writes to a store of its own.

    Args:
        folder: of all that the model's endpoints remember.
        topics: how prompts are sorted, if they are.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        folder: Path,
        settings: Settings,
        topics: TopicState = NO_TOPICS,
    ) -> None:
        self._folder, self._settings, self._topic_state = folder, settings, topics
        self._fingerprint, self._width = model_fingerprint(model), model.d_model
        self._end_id = end_of_text_id(tokenizer)
        self._context_tokens = min(_TOPIC_TOKENS, max(model.max_seq_len // 2, 1))
        self._opened: dict[str, Memories] = {}
        self._common: EngramStore | None = None
        self._lock = threading.Lock()

    def of(self, space: str) -> Memories:
        """Return the memories of a space, made if there are none yet.

        Raises:
            StorageError: if they are damaged or belong to another model.
        """
        with self._lock:
            if space not in self._opened:
                with storing():
                    self._opened[space] = self._open(space)
            return self._opened[space]

    def _open(self, space: str) -> Memories:
        given = None if self._settings.memories is None else absolute_path(self._settings.memories)
        if space == EVERYBODY:
            return self._memories(self._store(given or self._folder / "store"), self._folder)
        folder = self._folder / "keys" / space
        own = self._store(folder / "store")
        if given is None:
            return self._memories(own, folder)
        if self._common is None:
            self._common = self._store(given)
        return self._memories(JointStore(own, self._common), folder)

    def _memories(self, store: EngramStore | JointStore, folder: Path) -> Memories:
        return Memories(store, self._topics(folder), self._end_id, self._context_tokens, self._topic_state)

    def _store(self, path: Path) -> EngramStore:
        return EngramStore.open(
            path,
            fingerprint=self._fingerprint,
            block=self._settings.memory_block,
            width=self._width,
            normalisation=self._settings.memory_normalisation,
        )

    def _topics(self, folder: Path) -> SharedTopics:
        fit = self._topic_state.fit
        thresholds = None if fit is None else Thresholds(join=fit.join, merge=fit.merge)
        return SharedTopics(folder, self._width, self._settings.max_topics, thresholds)
