"""Entropy-gated retrieval in continuous batching: requests that look something up when the model becomes unsure.

engine = RetrievalEngine(model, tokenizer, store, calibration=calibration)
number = engine.add(prompt_ids, Sampling(seed=1), RetrievalOptions(mode="text"))
while engine.n_active:
    for token, event in engine.step():
        print(token.id, event and event.similarity)

When the gate of a request fires on a token, the end of the request's own text becomes a query, and what is found is
read from the next token on: as slots for cross-attention, as text in front of the request's own, or both. After
``hold`` tokens it is taken away again. The request's own text is only ever added to by sampling. One model serves
generation and queries; a query costs one pass over a segment, and only when a gate fires.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from hrs.generation.batching import KEPT_TEXTS, ContinuousBatch
from hrs.generation.decoding import SampledToken
from hrs.generation.sampling import Sampling
from hrs.models.base import LanguageModel
from hrs.retrieval.calibration import Calibration
from hrs.retrieval.entropy import Gate
from hrs.retrieval.retriever import Memories, RetrievalEvent, RetrievalOptions, Retriever, SlotMaker
from hrs.retrieval.store import Hit


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestSummary:
    """What retrieval did to one request so far."""

    n_tokens: int
    """Tokens sampled."""
    n_injected: int
    """Those of them that were sampled with retrieved memory or text."""
    n_events: int
    """Firings of the gate."""
    n_used: int
    """Those of them after which the model read something retrieved: something was found, and the mode uses it."""

    @property
    def share_injected(self) -> float:
        """Share of the tokens that were sampled with retrieved memory or text."""
        return self.n_injected / max(self.n_tokens, 1)


@dataclass(slots=True, eq=False)
class _Request:
    number: int
    n_own: int
    """Tokens of prompt and reply."""
    context: list[int]
    options: RetrievalOptions
    gate: Gate | None
    """None without retrieval."""
    store: Memories | None
    """Where memories are sought; None for the engine's."""
    prefix: list[int] = field(default_factory=list)
    """What should stand in front of the own text now."""
    spliced: list[int] = field(default_factory=list)
    """What does stand there."""
    n_read: int = 0
    """Own tokens read behind it; only if there is a prefix."""
    n_held: int = 0
    """Further tokens to sample with what was retrieved."""
    n_tokens: int = 0
    n_injected: int = 0
    n_events: int = 0
    n_used: int = 0

    def summary(self) -> RequestSummary:
        return RequestSummary(
            n_tokens=self.n_tokens, n_injected=self.n_injected, n_events=self.n_events, n_used=self.n_used
        )


class RetrievalEngine:
    """A :class:`ContinuousBatch` whose requests may retrieve. Not for several threads at once.

    A request without retrieval and context gets exactly the tokens that the batch alone would give it.

    Args:
        model, tokenizer, store, calibration, segment_tokens, block, separator, slots: see
            :class:`hrs.retrieval.retriever.Retriever`.
        n_slots, end_id, keep: see :class:`hrs.generation.batching.ContinuousBatch`.

    Raises:
        HRSError: if store, calibration or tokenizer belong to another model, or a number is out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        store: Memories | None,
        *,
        n_slots: int = 8,
        end_id: int | None = None,
        keep: int | None = None,
        calibration: Calibration | None = None,
        segment_tokens: int | None = None,
        block: int | None = None,
        separator: str = "\n",
        slots: SlotMaker | None = None,
    ) -> None:
        self._retriever = Retriever(
            model,
            tokenizer,
            store,
            calibration=calibration,
            segment_tokens=segment_tokens,
            block=block,
            separator=separator,
            slots=slots,
        )
        self._batch = ContinuousBatch(model, n_slots=n_slots, end_id=end_id, keep=keep)
        self._requests: dict[int, _Request] = {}
        self._ended: dict[int, RequestSummary] = {}

    @property
    def n_active(self) -> int:
        """Requests that are read or continued now."""
        return self._batch.n_active

    @property
    def n_waiting(self) -> int:
        """Requests in line."""
        return self._batch.n_waiting

    # ---- requests ----------------------------------------------------------------------------------------------------

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        retrieval: RetrievalOptions | None = None,
        context: Sequence[int] | None = None,
        *,
        n_best: int = 0,
        store: Memories | None = None,
    ) -> int:
        """Ask for a prompt to be continued.

        Args:
            prompt: token ids.
            sampling: ``stop`` must be empty, for text is the caller's.
            retrieval: None, or not enabled, for none.
            context: ids, such as a topic's, that stand in front of the request's text for as long as it lasts, and are
                no part of it. Of more than half the model's context the end is read, and retrieved text takes its
                place where there is no room for both.
            n_best: see :meth:`ContinuousBatch.add`.
            store: the memories that are looked up for this request; the engine's if None.

        Returns:
            The request's number, from 0 in order.

        Raises:
            HRSError: if the batch refuses the prompt or the context, or the request cannot retrieve as it asks.
        """
        options = retrieval if retrieval is not None and retrieval.enabled else None
        gate = None if options is None else self._retriever.gate(options, store)
        number = self._batch.add(prompt, sampling, n_best=n_best)
        request = _Request(number, len(prompt), list(context or ()), options or RetrievalOptions(), gate, store)
        request.prefix, _ = self._retriever.prefix(request.context, (), 0)
        try:
            self._splice(request)
        except Exception:
            self._batch.cancel(number)
            raise
        self._requests[number] = request
        return number

    def cancel(self, number: int) -> None:
        """Sample no more for a request; of no effect if it has ended already.

        Raises:
            HRSError: if there never was such a request.
        """
        self._batch.cancel(number)
        self._close(number)

    def text(self, number: int) -> list[int]:
        """Prompt and reply, without context and retrieved text. See :meth:`ContinuousBatch.text`."""
        return self._batch.text(number)

    def summary(self, number: int) -> RequestSummary:
        """What retrieval did to a request, also after its end: for as long as the batch keeps its text.

        Raises:
            HRSError: if it does not.
        """
        if number not in self._requests and number not in self._ended:
            self._batch.text(number)  # says that there is none
        return self._ended.get(number) or self._requests[number].summary()

    # ---- one token for all -------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[SampledToken, RetrievalEvent | None]]:
        """One more token of every request that has been read to its end, and the retrieval that this token set off."""
        sampled = self._batch.step()
        going, fired = [], []
        for token in sampled:
            request = self._requests[token.row]
            request.n_own += 1
            request.n_tokens += 1
            request.n_injected += request.n_held > 0
            if token.finish is not None:
                self._close(token.row)
                continue
            going.append(request)
            if request.n_held == 1:
                self._take_away(request)
            request.n_held = max(request.n_held - 1, 0)
            if request.gate is not None and request.gate.push(token.entropy):
                fired.append(request)
        events = self._retrieve(fired) if fired else {}
        for request in going:
            self._splice(request)
        return [(token, events.get(token.row)) for token in sampled]

    def _retrieve(self, fired: list[_Request]) -> dict[int, RetrievalEvent]:
        """One pass of the model for all requests whose gates fired; what each found, by number."""
        segments = [self._retriever.segment(self._batch.text(request.number)) for request in fired]
        queries = self._retriever.queries(segments)
        events = {}
        for request, segment, query in zip(fired, segments, queries, strict=True):
            assert request.gate is not None and request.gate.rolling.mean is not None
            hits = self._retriever.find(query, request.options, request.store)
            n_slots, n_tokens = self._use(request, hits)
            request.n_events += 1
            events[request.number] = RetrievalEvent(
                step=request.n_tokens - 1,
                entropy=request.gate.rolling.mean,
                query=tuple(segment),
                hits=hits,
                mode=request.options.mode,
                n_slots=n_slots,
                n_tokens=n_tokens,
            )
        return events

    def _use(self, request: _Request, hits: tuple[Hit, ...]) -> tuple[int, int]:
        """Let the model read memories from the next token on; how many slots and retrieved tokens. If there is nothing
        new, what an earlier firing brought stays for its time."""
        n_slots = n_tokens = 0
        if not hits:
            return n_slots, n_tokens
        if request.options.uses_slots and (memory := self._retriever.slots(hits)) is not None:
            self._batch.set_memory(request.number, memory)
            n_slots = len(memory)
        if request.options.uses_text:
            request.prefix, n_tokens = self._retriever.prefix(request.context, hits, request.options.context_tokens)
        if n_slots or n_tokens:
            request.n_held = request.options.hold
            request.n_used += 1
        return n_slots, n_tokens

    def _take_away(self, request: _Request) -> None:
        if request.options.uses_slots:
            self._batch.set_memory(request.number, None)
        if request.options.uses_text:
            request.prefix, _ = self._retriever.prefix(request.context, (), 0)

    def _splice(self, request: _Request) -> None:
        """Let the model read prefix and own text, if it does not, or if its window is full."""
        n_read = self._retriever.own_length(request.n_own, len(request.prefix))
        if request.prefix == request.spliced and (not request.prefix or n_read == request.n_read + 1):
            request.n_read = n_read
            return
        text = self._batch.text(request.number)
        self._batch.rewrite(request.number, request.prefix + text[-n_read:] if request.prefix else text)
        request.spliced, request.n_read = request.prefix, n_read

    def _close(self, number: int) -> None:
        request = self._requests.pop(number, None)
        if request is None:
            return
        self._ended[number] = request.summary()
        if len(self._ended) > KEPT_TEXTS:
            del self._ended[next(iter(self._ended))]
