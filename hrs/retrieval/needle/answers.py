"""Asking a model for the value of a needle: with the right memory, with another needle's, with what was retrieved.

The model continues the needle's sentence, which stops before the value. Two measures, each with its own chance:

- *found*: the value is among the words of the continuation, words of question and sentence left out. The original
  counted them, and its hits were all echo. Chance is the rate with another needle's segment for memory.
- *rank* of the value by its log-probability among others drawn the same way. Without memory it is first in one of n
  cases, whatever the model thinks of numbers and names; so this can tell what greedy text cannot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hrs.errors import HRSError
from hrs.generation.batching import ContinuousBatch
from hrs.generation.sampling import Sampling
from hrs.models.base import LanguageModel, WindowContext
from hrs.retrieval.needle.plan import Field, Needle, NeedlePlan, Trial, draw_alternatives
from hrs.retrieval.needle.ranks import Found, words

Way = Literal[
    "none", "text, right", "text, shuffled", "text, retrieved", "slots, right", "slots, shuffled", "slots, retrieved"
]
"""``text``: the segment stands in front of the sentence. ``slots``: its key is read by cross-attention. ``shuffled`` is
the segment of the next needle whose value is of the same kind."""

_BATCH = 32
_SEPARATOR = "\n"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """What the model reads before it is to give a value."""

    ids: list[int]
    memory: NDArray[np.float32] | None = None
    """[S, d]"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What it gives."""

    rank: int
    """Of the true value, from 1, among the plan's alternatives."""
    log_prob: float
    """Of the true value, nats."""
    found: bool
    continuation: str


def readings(field: Field, trials: Sequence[Trial], found: Sequence[Found], *, slots: bool) -> dict[Way, list[Reading]]:
    """What is read for every trial, by way; ways with slots only if asked for."""
    sentences = [field.ids(t.needle.cloze).tolist() for t in trials]
    separator = field.ids(_SEPARATOR).tolist()
    others = [_same_kind(trials, number) for number in range(len(trials))]
    own = [t.segments[t.target].ids.tolist() for t in trials]
    texts: dict[Way, list[list[int]]] = {
        "text, right": own,
        "text, shuffled": [own[i] for i in others],
        "text, retrieved": [f.retrieved.ids.tolist() for f in found],
    }
    ways: dict[Way, list[Reading]] = {"none": [Reading(ids=sentence) for sentence in sentences]}
    for way, segments in texts.items():
        ways[way] = [Reading(ids=s + separator + c) for s, c in zip(segments, sentences, strict=True)]
    if slots:
        right = [f.keys["right"] for f in found]
        keys: dict[Way, list[NDArray[np.float32]]] = {
            "slots, right": right,
            "slots, shuffled": [right[i] for i in others],
            "slots, retrieved": [f.keys["retrieved"] for f in found],
        }
        for way, vectors in keys.items():
            ways[way] = [Reading(ids=c, memory=v[None]) for c, v in zip(sentences, vectors, strict=True)]
    return ways


def _same_kind(trials: Sequence[Trial], number: int) -> int:
    """The next trial whose value is of the same kind and another one."""
    n, own = len(trials), trials[number].needle
    for i in range(number + 1, number + n):
        other = trials[i % n].needle
        if other.kind == own.kind and other.answer != own.answer and other.name != own.name:
            return i % n
    raise HRSError(f"no other needle has a {own.kind} for a value: use more trials")


def answer(
    model: LanguageModel, field: Field, plan: NeedlePlan, trials: Sequence[Trial], read: Sequence[Reading]
) -> list[Answer]:
    """Rank the true value and continue greedily, for every trial.

    Raises:
        HRSError: if what is read and the value do not fit into the model's context.
    """
    drawn = [
        draw_alternatives(np.random.default_rng([plan.seed, 4, number]), trial.needle, plan.alternatives)
        for number, trial in enumerate(trials)
    ]
    values = [[field.ids(f" {value}").tolist() for value in row] for row in drawn]
    longest = max(
        len(r.ids) + max(plan.new_tokens, *(len(v) for v in row)) for r, row in zip(read, values, strict=True)
    )
    if longest > model.max_seq_len:
        raise HRSError(
            f"a memory, a sentence and its value take {longest} tokens and the model's context is {model.max_seq_len}: "
            "make segments shorter"
        )
    scores = iter(log_probs(model, [(r, v) for r, row in zip(read, values, strict=True) for v in row]))
    texts = continuations(model, field, read, plan.new_tokens)
    answers = []
    for number, (trial, text) in enumerate(zip(trials, texts, strict=True)):
        row = np.array([next(scores) for _ in range(plan.alternatives)])
        rng = np.random.default_rng([plan.seed, 5, number])
        higher, equal = int((row > row[0]).sum()), int((row == row[0]).sum())
        answers.append(
            Answer(
                rank=1 + higher + int(rng.integers(equal)),
                log_prob=float(row[0]),
                found=contains_answer(text, trial.needle),
                continuation=text,
            )
        )
    return answers


def contains_answer(continuation: str, needle: Needle) -> bool:
    """Whether the value is a word of the continuation; words of the question and of the sentence never count."""
    asked = words(needle.question).keys() | words(needle.cloze).keys()
    return needle.answer.lower() in words(continuation).keys() - asked


@torch.no_grad()
def log_probs(model: LanguageModel, pairs: Sequence[tuple[Reading, Sequence[int]]]) -> list[float]:
    """Nats of tokens that follow what is read, for each pair of a reading and the tokens."""
    device = next(model.parameters()).device
    by_shape: dict[tuple[int, int, bool], list[int]] = {}
    for number, (read, value) in enumerate(pairs):
        by_shape.setdefault((len(read.ids), len(value), read.memory is None), []).append(number)
    found = [0.0] * len(pairs)
    for (_, n, without), rows in by_shape.items():
        for chosen in (rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)):
            ids = torch.tensor([[*pairs[i][0].ids, *pairs[i][1]] for i in chosen], device=device)
            context = None
            if not without:
                memory = np.stack([m for i in chosen if (m := pairs[i][0].memory) is not None])  # [B, S, d]
                context = WindowContext(memory=torch.from_numpy(memory).to(device))
            hidden = model.encode(ids, context).hidden[:, -n - 1 : -1]
            log_p = model.unembed(hidden).double().log_softmax(dim=-1)
            sums = log_p.gather(-1, ids[:, -n:].unsqueeze(-1)).sum(dim=(1, 2))
            for i, value_sum in zip(chosen, sums.tolist(), strict=True):
                found[i] = value_sum
    return found


def continuations(model: LanguageModel, field: Field, read: Sequence[Reading], n_tokens: int) -> list[str]:
    """The likeliest next tokens of each, as text, without what was read."""
    batch = ContinuousBatch(model, n_slots=16, end_id=field.end_id)
    sampling = Sampling(temperature=0, max_new_tokens=n_tokens)
    device = next(model.parameters()).device
    numbers = [
        batch.add(r.ids, sampling, memory=None if r.memory is None else torch.from_numpy(r.memory).to(device))
        for r in read
    ]
    new: dict[int, list[int]] = {number: [] for number in numbers}
    while batch.n_active or batch.n_waiting:
        for token in batch.step():
            new[token.row].append(token.id)
    return [field.decode(new[number]) for number in numbers]
