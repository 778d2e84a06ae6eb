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
from hrs.generation.sampling import Sampling, next_tokens
from hrs.models.base import Cache, LanguageModel

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
        self._device = next(model.parameters()).device
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
        cache = self._model.new_cache(len(rows), self._history(rows))
        seen = self._seen(rows)
        most = max(_MAX_LOGITS // (len(rows) * self._model.vocab_size), 1)
        position = 0
        while position < size and any(row.active for row in rows):
            n = min(most, *(len(row.text) - row.start - position for row in rows if row.active))
            logits = last_logits(self._model, [self._piece(row, position, n) for row in rows], cache)
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

    @torch.no_grad()
    def _sample(self, rows: list[_Row], drawing: list[int], logits: Tensor, seen: Tensor | None) -> Step:
        if len(drawing) < len(rows):
            logits = logits[drawing]
        uniforms = torch.tensor([rows[i].random.random() for i in drawing], dtype=torch.float64, device=self._device)
        ids = next_tokens(logits, uniforms, self._sampling, None if seen is None else seen[drawing])
        if seen is not None:
            seen[drawing, ids] = True
        told = describe(ids, logits, [self._n_best] * len(drawing))
        return [self._append(rows[i], *drawn) for i, drawn in zip(drawing, told, strict=True)]

    def _append(self, row: _Row, token: int, log_prob: float, entropy: float, best: Best) -> SampledToken:
        row.text.append(token)
        row.n_new += 1
        finish = finish_reason(token, row.n_new, self._sampling, self._end_id)
        row.active = finish is None
        return SampledToken(row.number, token, log_prob, entropy, finish, best)


# ---- one step, whoever keeps the rows --------------------------------------------------------------------------------


@torch.no_grad()
def last_logits(model: LanguageModel, pieces: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """Logits [B, V] after the last of each row's next tokens, which are read."""
    logits = model.decode(torch.tensor(pieces, device=next(model.parameters()).device), cache).logits
    assert logits is not None
    last = logits[:, -1]
    return last.to(torch.promote_types(last.dtype, torch.float32))  # bf16 is too coarse for a distribution


def describe(ids: Tensor, logits: Tensor, n_best: Sequence[int]) -> list[tuple[int, float, float, Best]]:
    """Of each row its token out of ``ids`` [B], the log-probability in nats and the entropy in bits of the distribution
    it was drawn from, logits [B, V], and the ``n_best`` [B] likeliest tokens of that."""
    log_p = logits.log_softmax(dim=-1)
    entropy = torch.linalg.vecdot(log_p.exp(), log_p) / -math.log(2)
    chosen = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    # All that Python needs in one copy: each costs a wait for the device. Ids are exact in float64.
    told = torch.stack((ids.double(), chosen.double(), entropy.double())).tolist()
    best = likeliest(logits, log_p, n_best) if any(n_best) else [()] * len(n_best)
    return [(int(token), log_prob, bits, row) for token, log_prob, bits, row in zip(*told, best, strict=True)]


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
