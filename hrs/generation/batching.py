"""Continuous batching: requests come and go at any time, and all that are there advance by one token per step.

batch = ContinuousBatch(model, n_slots=8)
number = batch.add(prompt_ids, Sampling(temperature=0.8))
while batch.n_active:
    for token in batch.step():
        print(token.row, token.id, token.finish)

A prompt is read by a cache of its own, in pieces, and then joins the others in one call of the model per step (compare
Orca, Yu et al. 2022). What the model reads follows from the request's text alone and the chances from its seed, as with
:func:`hrs.generation.generate`.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hrs.errors import HRSError
from hrs.generation.decoding import (
    Best,
    SampledToken,
    default_keep,
    finish_reason,
    generate,
    sample,
    window_length,
)
from hrs.generation.inference import Inference, SlotDecoder
from hrs.generation.sampling import Sampling
from hrs.models.base import Cache, LanguageModel, SlotCache

PREFILL_TOKENS = 256
"""Prompt tokens read per step by default: a step is then a few times as long as without them."""
KEPT_TEXTS = 1024
"""Texts of ended requests that can still be asked for."""

_MAX_LOGITS = 2**24
"""Logits computed at once. A model scores every position of a piece, and only the last score is wanted."""


@dataclass(slots=True, eq=False)
class _Request:
    """One text that grows."""

    number: int
    text: list[int]
    read: list[int]
    """What the model reads: the text, or what was put in its place and then the new tokens."""
    sampling: Sampling
    way: Sampling
    """How to sample, without what differs between requests that can be sampled together."""
    random: np.random.Generator
    n_best: int = 0
    memory: Tensor | None = None
    seen: Tensor | None = None
    """[V] bool, tokens of the text; only with a repetition penalty."""
    cache: Cache | None = None
    """Of its own; None in a slot, and before the window is begun."""
    slot: int | None = None
    start: int = 0
    """Where in ``read`` the present window begins."""
    position: int = 0
    """Tokens of the window that the model has read."""
    n_new: int = 0

    @property
    def n_unread(self) -> int:
        return len(self.read) - self.start - self.position


class ContinuousBatch:
    """Requests that decode together. Not for several threads at once.

    With a model that :attr:`hrs.models.LanguageModel.batches_ragged` a step is one pass for all requests, whatever
    their lengths. Any other model runs once per request and step, with the same results.

    Args:
        model: in evaluation mode.
        n_slots: requests worked on at a time; further ones wait in line, first come, first served.
        end_id: the id that ends a text, such as end of text. None for none.
        keep: tokens a new window starts with when the context is full, see :func:`hrs.generation.generate`.
        prefill_tokens: prompt tokens read per step, of all requests together. A long prompt takes several steps, and
            the others go on meanwhile; the oldest request reads first.

    Raises:
        HRSError: if the model is in training mode, or a number is out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        n_slots: int = 8,
        end_id: int | None = None,
        keep: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        for name, value in (("n_slots", n_slots), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise HRSError(f"{name} must be at least 1, got {value}")
        self._model, self._end_id, self._n_slots = model, end_id, n_slots
        self._keep = default_keep(model) if keep is None else keep
        self._check([], Sampling())
        self._prefill_tokens = prefill_tokens
        self._inference = Inference(model)
        self._device = self._inference.device
        self._together = SlotDecoder(self._inference, n_slots) if model.batches_ragged else None
        self._slots: SlotCache | None = None if self._together is None else self._together.slots
        self._seated: list[_Request] = []
        """Those in a slot, by slot."""
        self._active: dict[int, _Request] = {}
        self._waiting: deque[_Request] = deque()
        self._ended: dict[int, list[int]] = {}
        self._n_requests = 0

    @property
    def n_active(self) -> int:
        """Requests that are read or continued now."""
        return len(self._active)

    @property
    def n_waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    # ---- requests --------------------------------------------------------------------------------------------------

    def add(self, prompt: Sequence[int], sampling: Sampling, *, memory: Tensor | None = None, n_best: int = 0) -> int:
        """Ask for a prompt to be continued.

        Args:
            prompt: token ids.
            sampling: ``stop`` must be empty, for text is the caller's. The request draws as row 0 of
                :func:`hrs.generation.generate` does with the same seed.
            memory: see :meth:`set_memory`.
            n_best: how many of the likeliest tokens to tell of with every new one, see :attr:`SampledToken.best`.

        Returns:
            The request's number, from 0 in order.

        Raises:
            HRSError: if :func:`hrs.generation.generate` would refuse the prompt or ``n_best``, or :meth:`set_memory`
                the memory.
        """
        prompt = list(prompt)
        self._check([prompt], sampling, n_best)
        request = _Request(
            number=self._n_requests,
            text=prompt,
            read=list(prompt),
            sampling=sampling,
            way=dataclasses.replace(sampling, seed=0, max_new_tokens=1),
            random=np.random.default_rng((sampling.seed, 0)),
            n_best=n_best,
            memory=self._memory(memory),
        )
        if sampling.repetition_penalty != 1:
            request.seen = torch.zeros(self._model.vocab_size, dtype=torch.bool, device=self._device)
            request.seen[prompt] = True
        self._n_requests += 1
        self._waiting.append(request)
        self._admit()
        return request.number

    def cancel(self, number: int) -> None:
        """Sample no more for a request and free its slot; of no effect if it has ended already.

        Raises:
            HRSError: if there never was such a request.
        """
        if 0 <= number < self._n_requests and not self._is_open(number):
            return
        self._end(self._request(number))

    def text(self, number: int) -> list[int]:
        """Prompt and new tokens. Of ended requests the last 1024 are kept.

        Raises:
            HRSError: if it is not one of them.
        """
        if number in self._ended:
            return list(self._ended[number])
        return list(self._request(number).text)

    def set_memory(self, number: int, memory: Tensor | None) -> None:
        """Give a request slots [S, d] for the model's cross-attention, read from the next token on; None for none.

        Raises:
            HRSError: if the request has ended, the model takes no memory, or the shape is wrong.
        """
        request = self._request(number)
        request.memory = self._memory(memory)
        if request.cache is not None:
            request.cache.memory = None if request.memory is None else request.memory[None]
        elif self._slots is not None and request.slot is not None:
            self._slots.set_memory(request.slot, request.memory)

    def rewrite(self, number: int, ids: Sequence[int]) -> None:
        """Let the model read other tokens in place of the text so far, from the next token on: a new prefill.

        The request's text, its count of new tokens and what a repetition penalty looks at stay as they are.

        Raises:
            HRSError: if the request has ended, or :func:`hrs.generation.generate` would refuse the ids as a prompt.
        """
        request, ids = self._request(number), list(ids)
        self._check([ids], request.sampling)
        self._drop_state(request)
        request.read = ids

    # ---- one token for all -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[SampledToken]:
        """Sample one token for every active request that has been read to its end; by number.

        May be empty while prompts are being read.
        """
        for request in self._active.values():
            if request.position == self._model.max_seq_len:
                self._drop_state(request)
            if request.cache is None and request.slot is None:
                self._open_window(request)
            elif request.cache is not None and request.position and request.n_unread == 1:
                self._take_seat(request)
        drawing, scores = list(self._seated), []
        if self._together is not None and drawing:
            scores.append(self._together.step([request.read[-1] for request in drawing]))
            for request in drawing:
                request.position += 1
        for request, logits in self._read_alone():
            drawing.append(request)
            scores.append(logits)
        if not drawing:
            return []
        logits = scores[0] if len(scores) == 1 else torch.cat(scores)
        return sorted(self._sample(drawing, logits), key=lambda token: token.row)

    def _read_alone(self) -> list[tuple[_Request, Tensor]]:
        """One piece for each request with a cache of its own; those that have read all, and their logits [1, V]."""
        budget = min(self._prefill_tokens, max(_MAX_LOGITS // self._model.vocab_size, 1))
        done = []
        for request in self._active.values():  # in the order of their numbers
            if request.cache is None:
                continue
            n = request.n_unread
            if n > 1:  # a single token is a decoding step, which waits for no prefill
                n = min(n, budget)
                budget -= n
            if n == 0:
                continue
            begin = request.start + request.position
            logits = self._inference.read([request.read[begin : begin + n]], request.cache)
            request.position += n
            if request.n_unread == 0:
                done.append((request, logits))
        return done

    def _sample(self, drawing: list[_Request], logits: Tensor) -> list[SampledToken]:
        """The next token of each request, from its row of logits [B, V]; one call per way to sample."""
        chances = np.array([request.random.random() for request in drawing])
        uniforms = self._inference.upload(chances.view(np.int64)).view(torch.float64)
        groups: dict[Sampling, list[int]] = {}
        for row, request in enumerate(drawing):
            groups.setdefault(request.way, []).append(row)
        ways: list[tuple[Sampling, Tensor | None, Tensor | None]] = []
        for way, rows in groups.items():
            seen = [request.seen for row in rows if (request := drawing[row]).seen is not None]
            which = self._inference.upload(np.array(rows)) if len(groups) > 1 else None
            ways.append((way, which, torch.stack(seen) if seen else None))
        _, told = sample(logits, uniforms, ways, [request.n_best for request in drawing])
        return [self._append(request, *drawn) for request, drawn in zip(drawing, told, strict=True)]

    def _append(self, request: _Request, token: int, log_prob: float, entropy: float, best: Best) -> SampledToken:
        request.text.append(token)
        request.read.append(token)
        request.n_new += 1
        if request.seen is not None:
            request.seen[token] = True
        finish = finish_reason(token, request.n_new, request.sampling, self._end_id)
        if finish is not None:
            self._end(request)
        return SampledToken(request.number, token, log_prob, entropy, finish, best)

    # ---- coming and going ------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self._n_slots:
            request = self._waiting.popleft()
            self._active[request.number] = request

    def _open_window(self, request: _Request) -> None:
        """Begin to read the text's last window from its start, with a cache of its own."""
        n, history = len(request.read), None
        request.start, request.position = n - window_length(n, self._model.max_seq_len, self._keep), 0
        if request.start and (most := self._model.history_tokens):
            before = request.read[max(request.start - most, 0) : request.start]
            history = torch.tensor([[-1] * (most - len(before)) + before], device=self._device)
        request.cache = self._inference.new_cache(1, history)
        request.cache.memory = None if request.memory is None else request.memory[None]

    def _take_seat(self, request: _Request) -> None:
        """Go on together with the others, if the model can."""
        if self._slots is None or request.cache is None:
            return
        self._slots.join(request.cache)
        request.slot, request.cache = len(self._seated), None
        self._seated.append(request)

    def _drop_state(self, request: _Request) -> None:
        """Forget what the model has read."""
        request.cache, request.position = None, 0
        if self._slots is not None and request.slot is not None:
            self._slots.leave(request.slot)
            last = self._seated.pop()
            if last is not request:
                self._seated[request.slot], last.slot = last, request.slot
            request.slot = None

    def _end(self, request: _Request) -> None:
        if self._active.pop(request.number, None) is None:
            self._waiting.remove(request)
        self._drop_state(request)
        self._ended[request.number] = request.text
        if len(self._ended) > KEPT_TEXTS:
            del self._ended[next(iter(self._ended))]
        self._admit()

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _is_open(self, number: int) -> bool:
        return number in self._active or any(request.number == number for request in self._waiting)

    def _request(self, number: int) -> _Request:
        for request in (self._active.get(number), *self._waiting):
            if request is not None and request.number == number:
                return request
        raise HRSError(f"there is no request {number}: it has ended, or was never added")

    def _check(self, prompts: list[list[int]], sampling: Sampling, n_best: int = 0) -> None:
        """Refuse what ``generate`` refuses: it checks at once, and runs nothing before it is asked for tokens."""
        generate(self._model, prompts, sampling, end_id=self._end_id, keep=self._keep, n_best=n_best)

    def _memory(self, memory: Tensor | None) -> Tensor | None:
        """The memory as slots keep it; None if there are no vectors in it."""
        if memory is None:
            return None
        if not self._model.takes_memory:
            raise HRSError("this model reads no memory: only models with engram.kind=retrieved do")
        if memory.ndim != 2 or memory.shape[1] != self._model.d_model:
            raise HRSError(f"memory must have the shape [S, {self._model.d_model}], got {list(memory.shape)}")
        parameter = next(self._model.parameters())
        return memory.detach().to(parameter.device, parameter.dtype) if len(memory) else None
