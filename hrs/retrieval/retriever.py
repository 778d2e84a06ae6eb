"""What a request may ask of retrieval, and the way from the end of its text to memories, slots and spliced text.

Generation (:mod:`hrs.retrieval.engine`) and measurement (:mod:`hrs.retrieval.bits`) retrieve through this alone.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from hrs.config.checks import require_at_least, require_within
from hrs.data.tokenization import end_of_text_id
from hrs.errors import HRSError
from hrs.evaluation.separation import segment_length
from hrs.generation.decoding import window_length
from hrs.models.base import LanguageModel
from hrs.retrieval.calibration import Calibration
from hrs.retrieval.engrams import engrams, model_fingerprint
from hrs.retrieval.entropy import Gate, GateSettings
from hrs.retrieval.store import EngramStore, Hit

Mode = Literal["slots", "text", "both", "observe"]
"""``slots``: memories are read by cross-attention. ``text``: they stand in front of the text that is read. ``both``.
``observe``: they are found and told, and nothing is done with them."""

SlotMaker = Callable[[Sequence[Hit]], Tensor]
"""Vectors [S, d] for cross-attention, from memories, best first; S may be 0."""


class Memories(Protocol):
    """What retrieval needs of an :class:`EngramStore`."""

    @property
    def fingerprint(self) -> str:
        """Of the model whose engrams are searched."""

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        min_similarity: float,
        topics: Collection[str] | None,
        exclude_sources: Collection[str] | None,
    ) -> list[list[Hit]]:
        """See :meth:`EngramStore.search`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalOptions:
    """How one request uses retrieval."""

    enabled: bool = True
    mode: Mode = "text"
    k: int = 4
    """Memories per firing, at most."""
    min_similarity: float = 0.3
    """Cosine below which a memory is left where it is."""
    gate: GateSettings | None = None
    """When to retrieve; None for the calibrated gate of the model."""
    topics: tuple[str, ...] | None = None
    """Only memories of these topics; None for all."""
    exclude_sources: tuple[str, ...] = ()
    """No memories of these sources."""
    context_tokens: int = 128
    """Tokens of retrieved text that are spliced in, at most; never more than half of the model's context."""
    hold: int = 10
    """Tokens sampled with what was retrieved, before it is taken away again. Another firing starts anew."""

    def __post_init__(self) -> None:
        require_at_least(self, k=1, context_tokens=1, hold=1)
        require_within(self, min_similarity=(-1.0, 1.0))
        if self.mode not in ("slots", "text", "both", "observe"):
            raise HRSError(f"unknown retrieval mode '{self.mode}': choose one of slots, text, both, observe")

    @property
    def uses_slots(self) -> bool:
        return self.mode in ("slots", "both")

    @property
    def uses_text(self) -> bool:
        return self.mode in ("text", "both")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RetrievalEvent:
    """What happened when the gate fired."""

    step: int
    """Which token of the reply fired it, from 0."""
    entropy: float
    """Rolling mean at that token, in bits."""
    query: tuple[int, ...]
    """Ids of the segment whose engram was sought with."""
    hits: tuple[Hit, ...]
    """Memories found, best first; none if none is similar enough."""
    mode: Mode
    n_slots: int
    """Slots the model reads from the next token on; 0 if the mode has none."""
    n_tokens: int
    """Tokens of retrieved text it reads from the next token on; 0 if the mode has none."""

    @property
    def similarity(self) -> float | None:
        """Of the best memory; None without one."""
        return self.hits[0].similarity if self.hits else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with memories by id."""
        return {
            "step": self.step,
            "entropy": self.entropy,
            "query": list(self.query),
            "hits": [{"id": hit.memory.id, "similarity": hit.similarity} for hit in self.hits],
            "similarity": self.similarity,
            "mode": self.mode,
            "n_slots": self.n_slots,
            "n_tokens": self.n_tokens,
        }


class Retriever:
    """One model, its tokenizer, its memories and its gate.

    The query is the engram of the last ``segment_tokens`` tokens of a text, or of those after its last end of text,
    read alone; of a request, of its own prompt and reply, without topic context and retrieved text.

    Args:
        model: in evaluation mode.
        store: filled with engrams of this model; None if there are no memories.
        calibration: of this model; None if every request brings a gate.
        segment_tokens: default half the model's context. Keys of about as long segments compare best.
        block: whose engrams the store holds, see :func:`hrs.retrieval.engrams.engrams`.
        separator: text between memories, and between them and the request's text.
        slots: what is read of memories by cross-attention: for a trained model
            :func:`hrs.retrieval.bank.slots.slot_maker` makes them as its training did. Default their keys, one vector
            each.

    Raises:
        HRSError: if store, calibration or tokenizer belong to another model, the store to another block, or the model
            is in training mode.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        store: Memories | None,
        *,
        calibration: Calibration | None = None,
        segment_tokens: int | None = None,
        block: int | None = None,
        separator: str = "\n",
        slots: SlotMaker | None = None,
    ) -> None:
        if model.training:
            raise HRSError("the model is in training mode, which draws noise: call model.eval() first")
        self._fingerprint = fingerprint = model_fingerprint(model)
        self._require_own(store)
        if isinstance(store, EngramStore) and store.block != block:
            raise HRSError(
                f"the engram store has engrams of block {store.block} and block {block} is asked for: give the store's"
            )
        if calibration is not None:
            calibration.require_model(fingerprint)
        if (size := tokenizer.get_vocab_size()) != model.vocab_size:
            raise HRSError(
                f"the tokenizer has {size} ids and the model {model.vocab_size}: give the one it was trained with"
            )
        self.model, self.tokenizer, self.store, self.calibration = model, tokenizer, store, calibration
        self.segment_tokens = segment_length(model.max_seq_len) if segment_tokens is None else segment_tokens
        if not 1 <= self.segment_tokens <= model.max_seq_len:
            raise HRSError(
                f"segment_tokens must lie between 1 and the model's context of {model.max_seq_len} tokens, "
                f"got {self.segment_tokens}"
            )
        self._block, self._separator, self._slots = block, self._ids(separator), slots
        self._end_id = end_of_text_id(tokenizer)
        self._device = next(model.parameters()).device

    # ---- before anything is retrieved --------------------------------------------------------------------------------

    def gate(self, options: RetrievalOptions, store: Memories | None = None) -> Gate:
        """Make a new gate for a request.

        Args:
            store: memories of this request alone, in place of the retriever's.

        Raises:
            HRSError: if there are no memories or no gate, the memories belong to another model, or the model cannot
                read memories the way the mode says.
        """
        self._require_own(store)
        if self.store is None and store is None:
            raise HRSError("retrieval needs an engram store and none was opened: open one, or ask without retrieval")
        if options.uses_slots and not self.model.takes_memory:
            raise HRSError(
                f"retrieval mode '{options.mode}' needs a model that reads memories (engram.kind=retrieved) and this "
                "one does not: use mode 'text', or 'observe'"
            )
        if options.gate is None and self.calibration is None:
            raise HRSError("retrieval needs a gate: calibrate the model, or give the request a gate of its own")
        settings = options.gate or self.calibration.settings  # type: ignore[union-attr]
        return Gate.of(settings)

    # ---- from text to memories ---------------------------------------------------------------------------------------

    def segment(self, ids: Sequence[int]) -> list[int]:
        """The end of a text that it is sought with, at least one token."""
        last = list(ids[-self.segment_tokens :])
        after = next((i for i in range(len(last), 0, -1) if last[i - 1] == self._end_id), 0)
        return last[after:] or last

    def queries(self, segments: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """[N, d], the engrams of segments."""
        return engrams(self.model, segments, block=self._block)

    def find(
        self, query: NDArray[np.float32], options: RetrievalOptions, store: Memories | None = None
    ) -> tuple[Hit, ...]:
        """Return memories for the engram [d] of a segment, best first; from ``store`` if :meth:`gate` was given it."""
        store = self.store if store is None else store
        assert store is not None, "gate() comes first"
        found = store.search(
            query[None],
            options.k,
            min_similarity=options.min_similarity,
            topics=options.topics,
            exclude_sources=options.exclude_sources or None,
        )
        return tuple(found[0])

    # ---- from memories to what the model reads -----------------------------------------------------------------------

    def slots(self, hits: Sequence[Hit]) -> Tensor | None:
        """Different vectors [S, d] for cross-attention, of the best memory first; None if there are none."""
        if not hits:
            return None
        if self._slots is not None:
            made = self._slots(hits)
            return made if len(made) else None
        keys = np.stack([hit.key for hit in hits])
        _, first = np.unique(keys, axis=0, return_index=True)  # of equal ones attention would read a mean of one
        return torch.from_numpy(keys[np.sort(first)]).to(self._device)

    def spliced(self, hits: Sequence[Hit], most: int) -> list[int]:
        """At most ``most`` ids of the memories' texts, each with a separator after it, the best memory last, next to
        the text that is read. Of the one that does not fit, the beginning is taken."""
        parts: list[list[int]] = []
        for hit in hits:
            room = most - sum(map(len, parts)) - len(self._separator)
            if room <= 0:
                break
            parts.append(self._ids(hit.memory.text)[:room] + self._separator)
        return [i for part in reversed(parts) for i in part]

    def prefix(self, context: Sequence[int], hits: Sequence[Hit], most: int) -> tuple[list[int], int]:
        """What stands in front of a request's own text: the end of its topic context, then at most ``most`` ids of
        retrieved text; never more than half of the model's context. Gives the ids, and how many are retrieved."""
        room = self.model.max_seq_len // 2
        retrieved = self.spliced(hits, min(most, room))
        return list(context[max(len(context) - room + len(retrieved), 0) :]) + retrieved, len(retrieved)

    def own_length(self, n_own: int, n_prefix: int) -> int:
        """How many last tokens of a request's own text of ``n_own`` are read after a prefix: all that fit. When it is
        full, a new window starts with half as many, as without a prefix (:func:`hrs.generation.window_length`)."""
        room = self.model.max_seq_len - n_prefix
        return window_length(n_own, room, max(room // 2, 1))

    def _require_own(self, store: Memories | None) -> None:
        if store is not None and store.fingerprint != self._fingerprint:
            raise HRSError(
                f"the engram store belongs to model {store.fingerprint} and this is {self._fingerprint}: engrams of "
                "two models do not compare, so fill a store with this one"
            )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids
