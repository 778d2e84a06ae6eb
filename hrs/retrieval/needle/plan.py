"""Needle in a haystack: a fact that nobody can guess, hidden in a long text; is it found again by a question?

A needle is a sentence about an invented name with a drawn number or name for a value. It is planted at a depth of a
haystack of articles, which is then cut into segments as any text for a store. Further segments of other articles, every
second with another needle in it, are the distractors. :mod:`hrs.retrieval.needle.ranks` seeks the needle's segment by
the question, :mod:`hrs.retrieval.needle.answers` asks the model for the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hrs.config.checks import require_at_least
from hrs.data.store import TokenStore
from hrs.errors import HRSError
from hrs.generation.text import token_pieces
from hrs.retrieval.segments import Cut, Segment, cut_text

Kind = Literal["number", "name"]

# Sentence up to the value, question, kind of value.
TEMPLATES: tuple[tuple[str, str, Kind], ...] = (
    ("The code of the {} lighthouse is", "What is the code of the {} lighthouse?", "number"),
    ("The number of steps to the {} chapel is", "How many steps lead to the {} chapel?", "number"),
    ("The archive of {} keeps its deed under number", "Under which number is the deed of {} kept?", "number"),
    ("The population of the village of {} is", "What is the population of the village of {}?", "number"),
    ("The captain of the ship {} was called", "What was the captain of the ship {} called?", "name"),
    ("The river that rises in {} is the", "Which river rises in {}?", "name"),
    ("The teacher of the painter {} was", "Who was the teacher of the painter {}?", "name"),
    ("The oldest street in {} is named after", "After whom is the oldest street in {} named?", "name"),
)  # fmt: skip
_ONSETS = (*"bcdfghjklmnprstvwz", "br", "ch", "dr", "gr", "st", "th", "tr")
_VOWELS = (*"aeiou", "ai", "ea", "ou")
_CODAS = ("", "", "l", "n", "r", "s", "m", "ld", "nt", "rk")
_SENTENCE_ENDS = (b".", b"?", b"!", b"\n")

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Needle:
    """One fact."""

    template: int
    name: str
    """Whom or what it is about."""
    answer: str
    """One word."""

    @property
    def cloze(self) -> str:
        """The sentence up to its answer."""
        return TEMPLATES[self.template][0].format(self.name)

    @property
    def fact(self) -> str:
        return f"{self.cloze} {self.answer}."

    @property
    def question(self) -> str:
        return TEMPLATES[self.template][1].format(self.name)

    @property
    def kind(self) -> Kind:
        return TEMPLATES[self.template][2]


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedlePlan:
    """What is measured."""

    cut: Cut
    """How haystacks and distractors become segments."""
    split: str = "validation"
    haystack_segments: int = 16
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where in the haystack the needle is, 0 at its beginning and 1 at its end."""
    distractors: tuple[int, ...] = (0, 16, 64, 256)
    """Segments of other articles in the store, rising."""
    trials: int = 40
    """Needles per depth, each with a haystack of its own; all numbers of distractors share them."""
    block: int | None = None
    alternatives: int = 10
    """Answers that the true one is ranked among, itself included."""
    new_tokens: int = 8
    """Tokens of a continuation that is searched for the answer."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(self, haystack_segments=1, trials=2, alternatives=2, new_tokens=1, seed=0)
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise HRSError(f"depths must lie between 0 and 1, got {self.depths}")
        if not self.distractors or self.distractors[0] < 0 or sorted(set(self.distractors)) != list(self.distractors):
            raise HRSError(f"numbers of distractors must rise from 0 or more, got {self.distractors}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trial:
    """One needle in one haystack."""

    needle: Needle
    depth: int
    """Index into the plan's depths."""
    segments: list[Segment]
    """Of the haystack."""
    target: int
    """Which of them holds the needle, whole."""


# ---- needles ---------------------------------------------------------------------------------------------------------


def draw_name(rng: np.random.Generator) -> str:
    """An invented name of two or three syllables."""
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.integers(2, 4))]
    return ("".join(parts) + rng.choice(_CODAS)).capitalize()


def draw_answer(rng: np.random.Generator, kind: Kind) -> str:
    """A value: four digits, or an invented name."""
    return str(rng.integers(1000, 10_000)) if kind == "number" else draw_name(rng)


def draw_needle(rng: np.random.Generator, template: int) -> Needle:
    """A fact of a template with a name and an answer that differ."""
    while True:
        needle = Needle(template, draw_name(rng), draw_answer(rng, TEMPLATES[template][2]))
        if needle.answer not in needle.cloze.split():
            return needle


def draw_alternatives(rng: np.random.Generator, needle: Needle, n: int) -> list[str]:
    """``n`` different answers, the true one first. The others are drawn as it was: without memory, every order of
    them is as likely, so the true one is best with a chance of 1 / n."""
    answers = [needle.answer]
    while len(answers) < n:
        if (drawn := draw_answer(rng, needle.kind)) not in answers and drawn != needle.name:
            answers.append(drawn)
    return answers


# ---- haystacks -------------------------------------------------------------------------------------------------------


class Field:
    """The articles of a split, in a drawn order, and what is needed to plant needles in them."""

    def __init__(self, tokens: TokenStore, plan: NeedlePlan) -> None:
        self._store, self._plan = tokens, plan
        self._text = tokens.split(plan.split)
        self._pieces = token_pieces(tokens.tokenizer)
        self._break = self.ids("\n\n")
        order = np.random.default_rng([plan.seed, 0]).permutation(len(self._text.document_starts) - 1)
        sizes = np.diff(self._text.document_starts)[order]
        needed = (plan.distractors[-1] + 1) * plan.cut.length
        n_reserved = int(np.searchsorted(sizes.cumsum(), needed)) + 1
        self._reserved, self._free = order[:n_reserved], order[n_reserved:]
        room = sizes[n_reserved:].sum()
        if room < 2 * plan.haystack_segments * plan.cut.length:
            raise HRSError(
                f"the {plan.split} split has {len(self._text):,} tokens, too few for {plan.distractors[-1]} "
                f"distractors and a haystack of {plan.haystack_segments} segments: use fewer, or another split"
            )

    def ids(self, text: str) -> Integers:
        return np.array(self._store.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._store.tokenizer.decode(list(ids))
        return text

    def text(self, segment: Segment) -> str:
        return self.decode(segment.ids.tolist())

    @property
    def end_id(self) -> int:
        """The id of end of text."""
        return self._store.eot_id

    def trial(self, depth: int, number: int) -> Trial:
        """Needle and haystack number ``number`` of a depth: a function of the plan alone."""
        plan, rng = self._plan, np.random.default_rng([self._plan.seed, 1, depth, number])
        needle = draw_needle(rng, number % len(TEMPLATES))
        planted = self.ids(f" {needle.fact}")
        hay = self._hay(rng.permutation(self._free), plan.haystack_segments * plan.cut.length - len(planted))
        at = self._place(hay, len(planted), plan.depths[depth])
        whole = np.concatenate((hay[:at], planted, hay[at:]))
        segments = cut_text(whole, plan.cut, opening=np.array([self._store.eot_id]), source="haystack")
        return Trial(needle=needle, depth=depth, segments=segments, target=at // plan.cut.length)

    def distractors(self) -> list[Segment]:
        """Segments of articles that no haystack has, every second with another needle at a drawn place."""
        plan, rng = self._plan, np.random.default_rng([self._plan.seed, 2])
        n, length = plan.distractors[-1], plan.cut.length
        hay = self._hay(self._reserved, n * length)
        parts = []
        for number in range(n):
            own = hay[number * length : (number + 1) * length]
            if number % 2 == 0:
                planted = self.ids(f" {draw_needle(rng, int(rng.integers(len(TEMPLATES)))).fact}")
                own = own[: length - len(planted)]
                at = self._place(own, len(planted), rng.random())
                own = np.concatenate((own[:at], planted, own[at:]))
            parts.append(own)
        if not parts:
            return []
        opening = np.array([self._store.eot_id])
        return cut_text(np.concatenate(parts), plan.cut, opening=opening, source="distractors")

    def _hay(self, documents: Integers, n: int) -> Integers:
        """The first ``n`` tokens of articles one after the other, an empty line between them."""
        starts, parts, length = self._text.document_starts, [], 0
        for document in documents:
            if length >= n:
                break
            parts += [self._text.tokens[starts[document] : starts[document + 1] - 1].astype(np.int64), self._break]
            length += len(parts[-2]) + len(parts[-1])
        if length < n:
            raise HRSError(
                f"the {self._plan.split} split is too short for a haystack of {n} tokens: use fewer segments"
            )
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])[:n]

    def _place(self, hay: Integers, n_planted: int, depth: float) -> int:
        """Where to plant: as near to the depth as the needle fits into one segment, behind the end of a sentence if
        there is one within a segment's length, else between two words."""
        length = self._plan.cut.length
        places = np.arange(len(hay) + 1)
        fits = places // length == (places + n_planted - 1) // length
        if not fits.any():
            raise HRSError(
                f"a needle of {n_planted} tokens does not fit into a segment of {length}: make segments longer"
            )
        away = np.abs(places - depth * len(hay))
        pieces = [self._pieces[i] for i in hay]
        sentences = np.array([True, *(piece.endswith(_SENTENCE_ENDS) for piece in pieces)]) & (away <= length)
        words = np.array([*(piece.startswith(b" ") for piece in pieces), True])
        for wanted in (sentences, words, np.ones(len(places), dtype=bool)):
            if (chosen := places[fits & wanted]).size:
                break
        return int(chosen[away[chosen].argmin()])
