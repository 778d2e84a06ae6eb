"""One document read as if it were being generated: losses of its true tokens under gated retrieval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from hrs.generation.decoding import default_keep, window_length
from hrs.models.base import Cache
from hrs.retrieval.calibration import entropy_of
from hrs.retrieval.retriever import RetrievalOptions, Retriever
from hrs.retrieval.store import Hit

_MAX_LOGITS = 2**24

Find = Callable[[list[int]], tuple[Hit, ...]]
"""Memories for a text so far."""


@dataclass(slots=True)
class _Window:
    """What has been read since the last prefill."""

    prefix: list[int] = field(default_factory=list)
    length: int = 0
    """Own tokens that are read for the next prediction."""
    before: list[int] = field(default_factory=list)
    """Own tokens in front of the window, if it has no prefix."""
    pieces: list[tuple[list[int], Tensor | None]] = field(default_factory=list)
    """Ids and the memory they were read with, to read them again."""
    cache: Cache | None = None


class Walk:
    """Predicts ``ids[1:]``, each from what a request whose text had come so far would read.

    Tokens are predicted many at a time, up to where the window, a retrieval's time or the text ends. Where the gate
    fires before that and something is found, the predictions behind are thrown away.

    Args:
        ids: of the text; the first one is given.
        find: what a firing retrieves; None to watch nothing.
        keep: see :func:`hrs.generation.generate`.
    """

    def __init__(
        self, retriever: Retriever, ids: Sequence[int], options: RetrievalOptions, find: Find | None, keep: int | None
    ) -> None:
        self.nats: list[float] = []
        """Loss of each token but the first."""
        self.fired: list[int] = []
        """Places in the text of the tokens on which the gate fired."""
        self.similarities: list[float] = []
        """Of the best memory of each firing that found one."""
        self.n_injected = self.n_used = 0
        self._retriever, self._ids, self._options, self._find = retriever, list(ids), options, find
        self._model, self._gate = retriever.model, retriever.gate(options)
        self._keep = default_keep(self._model) if keep is None else keep
        self._device = next(self._model.parameters()).device
        self._n = 1
        """Tokens so far: the next to predict is ``ids[n]``."""
        self._n_held = 0
        self._prefix: list[int] = []
        self._memory: Tensor | None = None
        self._window = _Window()

    @torch.no_grad()
    def run(self) -> None:
        """Predict all."""
        while self._n < len(self._ids):
            self._advance()

    def _advance(self) -> None:
        """Predict up to the next change of what is read."""
        n, window, length = self._n, self._window, self._own_length(self._n)
        if window.prefix != self._prefix or window.length != length:
            before = [] if self._prefix else self._ids[: n - length]
            window = self._window = _Window(self._prefix, length, before)
        first = self._ids[n - 1 : n] if window.pieces else self._prefix + self._ids[n - length : n]
        room = self._model.max_seq_len - len(self._prefix) - length + 1  # predictions until the window is full
        count = min(room, len(self._ids) - n, self._n_held or room)
        fed = first + self._ids[n : n + count - 1]
        nats, bits = self._predict(fed, self._ids[n : n + count])
        used, hits = self._watch(bits)
        window.pieces.append((fed[: len(fed) - count + used], self._memory))
        if used < count:
            window.cache = None
        self.nats.extend(nats[:used])
        self._n, window.length = n + used, length + used
        if self._n_held:
            self.n_injected += used
            self._n_held -= used
            if not self._n_held:
                self._prefix, self._memory = [], None
        if hits:
            self._use(hits)

    def _watch(self, bits: list[float]) -> tuple[int, tuple[Hit, ...]]:
        """Show the gate entropies, up to one that changes what is read: how many, and the memories to read then."""
        if self._find is not None:
            for used, entropy in enumerate(bits, start=1):
                if not self._gate.push(entropy):
                    continue
                self.fired.append(self._n + used - 1)
                hits = self._find(self._ids[: self._n + used])
                self.similarities.extend(hit.similarity for hit in hits[:1])
                if hits and self._options.mode != "observe":
                    return used, hits
        return len(bits), ()

    def _use(self, hits: tuple[Hit, ...]) -> None:
        n_slots = n_tokens = 0
        if self._options.uses_slots and (memory := self._retriever.slots(hits)) is not None:
            self._memory, n_slots = memory.to(next(self._model.parameters()).dtype), len(memory)
        if self._options.uses_text:
            self._prefix, n_tokens = self._retriever.prefix((), hits, self._options.context_tokens)
        if n_slots or n_tokens:
            self._n_held = self._options.hold
            self.n_used += 1

    def _predict(self, fed: list[int], targets: list[int]) -> tuple[list[float], list[float]]:
        """Read on: losses in nats of the targets, of which the last follows the last id, and entropies in bits."""
        window, n_before = self._window, len(fed) - len(targets)
        if window.cache is None:
            window.cache = self._model.new_cache(1, self._history(window.before))
            for ids, memory in window.pieces:
                self._read(ids, memory, [])
        self._read(fed[:n_before], self._memory, [])
        return self._read(fed[n_before:], self._memory, targets)

    def _read(self, ids: list[int], memory: Tensor | None, targets: list[int]) -> tuple[list[float], list[float]]:
        """The same where there is one target per id, or none at all."""
        cache = self._window.cache
        assert cache is not None
        cache.memory = None if memory is None else memory[None]
        nats, bits = list[float](), list[float]()
        most = max(_MAX_LOGITS // self._model.vocab_size, 1)
        for at in range(0, len(ids), most):
            logits = self._model.decode(torch.tensor([ids[at : at + most]], device=self._device), cache).logits
            assert logits is not None
            if targets:
                scores = logits[0].to(torch.promote_types(logits.dtype, torch.float32))  # [n, V]
                true = torch.tensor(targets[at : at + most], device=self._device)
                nats += F.cross_entropy(scores, true, reduction="none").tolist()
                bits += entropy_of(scores).tolist()
        return nats, bits

    def _history(self, before: list[int]) -> Tensor | None:
        """[1, history_tokens], what stands in front of a window; None if nothing does."""
        if not before or not (n := self._model.history_tokens):
            return None
        return torch.tensor([[-1] * (n - len(before)) + before[-n:]], device=self._device)

    def _own_length(self, n: int) -> int:
        """Own tokens that are read when there are ``n``, as in :class:`hrs.retrieval.engine.RetrievalEngine`."""
        if self._prefix:
            return self._retriever.own_length(n, len(self._prefix))
        return window_length(n, self._model.max_seq_len, self._keep)
