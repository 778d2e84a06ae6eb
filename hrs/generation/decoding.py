"""Continuing token sequences of any length with any language model, many at once, through its incremental decoding.

Which tokens the model reads follows from the length of a row's text alone (:func:`window_length`), and a row's chances
from the seed and its own number. So a row's tokens do not depend on the others in its batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hrs.errors import HRSError
from hrs.generation.inference import Inference, SlotDecoder
from hrs.generation.sampling import Sampling, next_tokens
from hrs.models.base import LanguageModel
from hrs.nn.eager import without_autograd

FinishReason = Literal["stop", "length", "end_of_text"]

Best = tuple[tuple[int, float], ...]
"""Likeliest tokens, the best first: ids and log-probabilities in nats."""

_MAX_LOGITS = 2**24
"""Logits computed at once. A model scores every position of a chunk, and of a prompt only the last score is wanted."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One new token of one row."""

    row: int
    """Which prompt it continues, from 0."""
    id: int
    log_prob: float
    """Nats, under the model's own distribution: before penalty, temperature and filters."""
    entropy: float
    """Bits, of the model's own distribution."""
    finish: FinishReason | None
    """Why this is the row's last token; None if it is not."""
    best: Best = ()
    """The likeliest tokens of the distribution that ``log_prob`` tells of, as many as were asked for. The sampled one
    need not be among them."""


Step = list[SampledToken]
"""The tokens sampled at once: at most one per row."""


def window_length(n_tokens: int, max_seq_len: int, keep: int) -> int:
    """How many last tokens of a text the model reads for the next one.

    All, up to ``max_seq_len``. The token after that starts a new window with the last ``keep`` tokens, which grows to
    ``max_seq_len`` again, and so on.
    """
    if n_tokens <= max_seq_len:
        return n_tokens
    return keep + (n_tokens - max_seq_len - 1) % (max_seq_len - keep + 1)


def default_keep(model: LanguageModel) -> int:
    """Half the context: each new window costs one prefill of it and lasts for as many tokens."""
    return max(model.max_seq_len // 2, 1)


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_id: int | None = None,
    keep: int | None = None,
    first_row: int = 0,
    n_best: int = 0,
) -> "Generation":
    """Continue prompts of token ids, all rows side by side; iterate over the result for the tokens as they come.

    Prompts may differ in length: nothing is padded. All are read together up to the end of the shortest; then each row
    samples or reads its own next prompt token. A text that outgrows the model's context goes on in a new window of its
    last ``keep`` tokens, with what stood in front of them as the history of models that can use it.

    Args:
        model: in evaluation mode.
        prompts: ids of each, at least one.
        sampling: ``stop`` is about text, so it is refused here: see :func:`hrs.generation.generate_text`.
        end_id: the id that ends a text, such as end of text. None for none.
        keep: 1 to ``max_seq_len``, default :func:`default_keep`.
        first_row: number of the first row in the random streams, so that a long list can be cut into batches.
        n_best: how many of the likeliest tokens to tell of with every new one, see :attr:`SampledToken.best`.

    Raises:
        HRSError: for a prompt that is empty or has ids the model does not know, or ``keep`` or ``n_best`` out of range.
    """
    if sampling.stop:
        raise HRSError("stop strings end texts, and these are token ids: use generate_text, or give no stop")
    if model.training:
        raise HRSError("the model is in training mode, which draws noise: call model.eval() first")
    keep = default_keep(model) if keep is None else keep
    if not 1 <= keep <= model.max_seq_len:
        raise HRSError(f"keep must lie between 1 and the model's context of {model.max_seq_len} tokens, got {keep}")
    if not 0 <= n_best <= model.vocab_size:
        raise HRSError(f"n_best must lie between 0 and the model's vocabulary of {model.vocab_size}, got {n_best}")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise HRSError(f"prompt {number} is empty: give at least one token, such as end of text")
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise HRSError(f"prompt {number} has an id outside the model's vocabulary of {model.vocab_size}")
    rows = [
        _Row(number, list(prompt), np.random.default_rng((sampling.seed, first_row + number)))
        for number, prompt in enumerate(prompts)
    ]
    return Generation(model, rows, sampling, end_id, keep, n_best)


@dataclass(slots=True, eq=False)
class _Row:
    """One text that grows."""

    number: int
    text: list[int]
    random: np.random.Generator
    start: int = 0
    """Where in ``text`` the present window begins."""
    n_new: int = 0
    active: bool = True


class Generation(Iterator[Step]):
    """A batch of texts that grow; made by :func:`generate`. Ends when every row is finished."""

    def __init__(
        self, model: LanguageModel, rows: list[_Row], sampling: Sampling, end_id: int | None, keep: int, n_best: int
    ) -> None:
        self._model, self._rows, self._sampling, self._end_id, self._keep = model, rows, sampling, end_id, keep
        self._n_best = n_best
        self._inference = Inference(model)
        self._device = self._inference.device
        self._steps = self._run()

    def __next__(self) -> Step:
        return next(self._steps)

    def finish(self, row: int) -> None:
        """Sample no more for a row."""
        self._rows[row].active = False

    def _run(self) -> Iterator[Step]:
        while rows := [row for row in self._rows if row.active]:
            yield from self._window(rows)

    def _window(self, rows: list[_Row]) -> Iterator[Step]:
        """Sample until the window is full or all rows are finished. Rows share positions, so all fill it at once."""
        size = self._model.max_seq_len
        for row in rows:
            row.start = len(row.text) - window_length(len(row.text), size, self._keep)
        cache, together = self._inference.new_cache(len(rows), self._history(rows)), None
        seen = self._seen(rows)
        most = max(_MAX_LOGITS // (len(rows) * self._model.vocab_size), 1)
        position = 0
        while position < size and any(row.active for row in rows):
            unread = [len(row.text) - row.start - position for row in rows if row.active]
            if together is None and position > 0 and max(unread) == 1 and self._model.batches_ragged:
                together = SlotDecoder(self._inference, len(rows))
                together.slots.join(cache)
            n = min(most, *unread)
            if together is None:
                logits = self._inference.read([self._piece(row, position, n) for row in rows], cache)
            else:
                logits = together.step([row.text[-1] for row in rows])
            position += n
            drawing = [i for i, row in enumerate(rows) if row.active and len(row.text) == row.start + position]
            if drawing:
                yield self._sample(rows, drawing, logits, seen)

    def _piece(self, row: _Row, position: int, n: int) -> list[int]:
        """The row's next n tokens; anything valid for a finished row, which only holds its place."""
        return row.text[row.start + position : row.start + position + n] if row.active else [0] * n

    def _history(self, rows: list[_Row]) -> Tensor | None:
        """[B, history_tokens], what stands in front of the windows; None if nothing does."""
        n = self._model.history_tokens
        if n == 0 or not any(row.start for row in rows):
            return None
        before = [row.text[max(row.start - n, 0) : row.start] for row in rows]
        return torch.tensor([[-1] * (n - len(ids)) + ids for ids in before], device=self._device)

    def _seen(self, rows: list[_Row]) -> Tensor | None:
        """[B, V], which tokens each text has; None if nobody asks."""
        if self._sampling.repetition_penalty == 1:
            return None
        seen = torch.zeros(len(rows), self._model.vocab_size, dtype=torch.bool)
        for i, row in enumerate(rows):
            seen[i, row.text] = True
        return seen.to(self._device)

    def _sample(self, rows: list[_Row], drawing: list[int], logits: Tensor, seen: Tensor | None) -> Step:
        """The next token of the rows that are ``drawing``. Others are sampled too, and forgotten: to leave them out
        would copy what is large."""
        chances, n_best = np.zeros(len(rows)), [0] * len(rows)
        for i in drawing:
            chances[i], n_best[i] = rows[i].random.random(), self._n_best
        uniforms = self._inference.upload(chances.view(np.int64)).view(torch.float64)
        ids, told = sample(logits, uniforms, [(self._sampling, None, seen)], n_best)
        if seen is not None:
            drawn = np.zeros(len(rows), dtype=np.int64)
            drawn[drawing] = 1
            seen |= torch.zeros_like(seen).scatter_(
                1, ids.unsqueeze(1), self._inference.upload(drawn).bool().unsqueeze(1)
            )
        return [self._append(rows[i], *told[i]) for i in drawing]

    def _append(self, row: _Row, token: int, log_prob: float, entropy: float, best: Best) -> SampledToken:
        row.text.append(token)
        row.n_new += 1
        finish = finish_reason(token, row.n_new, self._sampling, self._end_id)
        row.active = finish is None
        return SampledToken(row.number, token, log_prob, entropy, finish, best)


# ---- one step, whoever keeps the rows --------------------------------------------------------------------------------


def sample(
    logits: Tensor,
    uniforms: Tensor,
    ways: Sequence[tuple[Sampling, Tensor | None, Tensor | None]],
    n_best: Sequence[int],
) -> tuple[Tensor, list[tuple[int, float, float, Best]]]:
    """Draw the next token of each row.

    The host waits for the device once, and twice more if a row wants the likeliest tokens.

    Args:
        logits: [B, V].
        uniforms: [B] float64, the chance of each row.
        ways: how to sample which rows, int64 [R] on the device or None for all, and what their texts have [R, V], see
            :func:`hrs.generation.sampling.next_tokens`.
        n_best: [B], how many of the likeliest tokens each row wants to know.

    Returns:
        The ids [B] on the device; and of each row the id, its log-probability in nats and the entropy in bits of the
        distribution it was drawn from, and the likeliest tokens of that.
    """
    with without_autograd(logits):
        log_p = logits.log_softmax(dim=-1)
        if len(ways) == 1:
            ids = next_tokens(logits, uniforms, ways[0][0], ways[0][2], log_p)
        else:
            ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
            for way, rows, seen in ways:
                ids[rows] = next_tokens(logits[rows], uniforms[rows], way, seen, log_p[rows])
        return ids, describe(ids, logits, n_best, log_p)


def describe(
    ids: Tensor, logits: Tensor, n_best: Sequence[int], log_p: Tensor | None = None
) -> list[tuple[int, float, float, Best]]:
    """Of each row its token out of ``ids`` [B], the log-probability in nats and the entropy in bits of the distribution
    it was drawn from, logits [B, V], and the ``n_best`` [B] likeliest tokens of that. ``log_p`` is its log-softmax."""
    log_p = logits.log_softmax(dim=-1) if log_p is None else log_p
    nats = torch.linalg.vecdot(log_p.exp(), log_p)
    chosen = log_p.gather(-1, ids.unsqueeze(-1))
    # All that Python needs in one copy: each costs a wait for the device. Ids below 2^24 are exact in float32.
    told = torch.cat((ids.unsqueeze(-1), chosen, nats.unsqueeze(-1)), dim=-1).tolist()
    best = likeliest(logits, log_p, n_best) if any(n_best) else [()] * len(n_best)
    return [
        (int(token), log_prob, negative / -math.log(2), row)
        for (token, log_prob, negative), row in zip(told, best, strict=True)
    ]


def likeliest(logits: Tensor, log_p: Tensor, n_best: Sequence[int]) -> list[Best]:
    """The ``n_best`` [B] likeliest tokens of each row, with ``log_p`` [B, V], the log-softmax of ``logits`` [B, V].

    Of equal ones the smaller id comes first, so the first of all is what a temperature of 0 takes. At least one row
    must want some.
    """
    wanting = torch.tensor([row for row, n in enumerate(n_best) if n], device=logits.device)
    scores = logits[wanting]  # log-probabilities may be equal where logits are not
    least = scores.topk(max(n_best), dim=-1).values[:, -1:]
    # Which of equal logits topk takes is left open, so all that reach the least are compared.
    at, ids = (scores >= least).nonzero(as_tuple=True)  # [M], M at least n for each row
    rows = wanting[at]
    told = torch.stack((rows.double(), -logits[rows, ids].double(), ids.double(), log_p[rows, ids].double())).tolist()
    found: list[list[tuple[float, int, float]]] = [[] for _ in n_best]
    for row, cost, token, log_prob in zip(*told, strict=True):
        found[int(row)].append((cost, int(token), log_prob))
    return [
        tuple((token, log_prob) for _, token, log_prob in sorted(candidates)[:n])
        for candidates, n in zip(found, n_best, strict=True)
    ]


def finish_reason(token: int, n_new: int, sampling: Sampling, end_id: int | None) -> FinishReason | None:
    """Why a text ends with its ``n_new``-th new token; None if it goes on."""
    if token == end_id:
        return "end_of_text"
    return "length" if n_new == sampling.max_new_tokens else None
