"""How a replica continues texts: the retrieval engine, told in what requests and clients speak."""

import dataclasses
from typing import Any

from tokenizers import Tokenizer

from hrs.data.tokenization import end_of_text_id
from hrs.errors import HRSError
from hrs.generation import SampledToken
from hrs.models import LanguageModel
from hrs.retrieval.calibration import Calibration
from hrs.retrieval.engine import RetrievalEngine
from hrs.retrieval.entropy import GateSettings
from hrs.retrieval.retriever import RetrievalEvent, SlotMaker
from hrs.retrieval.retriever import RetrievalOptions as EngineOptions
from hrs.retrieval.store import Hit
from serve.backend import Request
from serve.engine import Events
from serve.errors import storing
from serve.memories import Memories
from serve.schemas import RetrievalOptions
from serve.settings import Settings
from serve.spaces import Spaces


class RetrievalDecoder:
    """Texts of a :class:`RetrievalEngine`."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        spaces: Spaces,
        settings: Settings,
        calibration: Calibration | None,
        slots: SlotMaker | None = None,
    ) -> None:
        self._spaces, self._settings, self._calibration, self._tokenizer = spaces, settings, calibration, tokenizer
        self._engine = RetrievalEngine(
            model,
            tokenizer,
            None,
            n_slots=settings.slots,
            end_id=end_of_text_id(tokenizer),
            calibration=calibration,
            block=settings.memory_block,
            slots=slots,
        )

    @property
    def n_active(self) -> int:
        return self._engine.n_active

    @property
    def n_waiting(self) -> int:
        return self._engine.n_waiting

    def add(self, request: Request) -> int:
        sampling = dataclasses.replace(request.sampling, stop=())
        if request.retrieval is None:
            return self._engine.add(request.prompt, sampling, context=request.context, n_best=request.n_best)
        memories = self._spaces.of(request.space)
        return self._engine.add(
            request.prompt,
            sampling,
            self._options(request.retrieval, memories),
            request.context,
            n_best=request.n_best,
            store=EnabledMemories(memories),
        )

    def cancel(self, number: int) -> None:
        self._engine.cancel(number)

    def step(self) -> tuple[list[SampledToken], Events]:
        sampled = self._engine.step()
        events = {token.row: [self._document(event)] for token, event in sampled if event is not None}
        return [token for token, _ in sampled], events

    def _options(self, wanted: RetrievalOptions, memories: Memories) -> EngineOptions:
        defaults = self._settings
        return EngineOptions(
            mode=wanted.mode,
            k=defaults.retrieval_k if wanted.k is None else wanted.k,
            min_similarity=defaults.retrieval_min_similarity
            if wanted.min_similarity is None
            else wanted.min_similarity,
            gate=self._gate(wanted.threshold_bits),
            topics=None if wanted.topics is None else tuple(memories.with_former(wanted.topics)),
            exclude_sources=tuple(wanted.exclude_sources),
        )

    def _gate(self, threshold_bits: float | None) -> GateSettings | None:
        """None is the calibrated gate.

        Raises:
            HRSError: if there is none, and neither the request nor the settings name a threshold: no number of bits is
                right for every model.
        """
        threshold = self._settings.retrieval_threshold_bits if threshold_bits is None else threshold_bits
        if threshold is not None:
            return GateSettings(threshold_bits=threshold)
        if self._calibration is None:
            raise HRSError(
                "this model's usual entropy is not known here, for its validation text is not at hand: say above how "
                "many bits to look memories up (hrs.retrieval.threshold_bits)"
            )
        return None

    def _document(self, event: RetrievalEvent) -> dict[str, Any]:
        hits = [{**hit_document(hit), "similarity": hit.similarity} for hit in event.hits]
        return {**event.to_dict(), "query": self._tokenizer.decode(list(event.query)), "hits": hits}


def hit_document(hit: Hit) -> dict[str, Any]:
    """A memory that was found, as clients see it."""
    memory = hit.memory
    return {"id": memory.id, "text": memory.text, "source": memory.source, "topic": memory.topic}


class EnabledMemories:
    """The store as the engine sees it: without what lies in topics that are switched off."""

    def __init__(self, memories: Memories) -> None:
        self._memories = memories
        self.fingerprint = memories.store.fingerprint

    def search(self, queries: Any, k: int, **conditions: Any) -> list[list[Hit]]:
        off = self._memories.disabled() | set(conditions.pop("exclude_topics", None) or ())
        with storing():
            return self._memories.store.search(queries, k, exclude_topics=off or None, **conditions)
