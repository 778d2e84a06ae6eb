"""Seeking a needle's segment by its question: the engram beside what it has to beat.

The segment that holds the needle is ranked among all by the cosine of its key with the engram of the question. Beside
the engram stand three controls:

- plain word overlap (word counts, tf-idf), which needs no model and finds a rare name without fail;
- the engram of *another* needle's question: keys close to that are close to questions, not to this one;
- chance, k over the number of segments.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hrs.models.base import LanguageModel
from hrs.retrieval.engrams import engrams
from hrs.retrieval.needle.plan import Field, NeedlePlan, Trial
from hrs.retrieval.segments import Segment, read_segments
from hrs.retrieval.store import Normalisation, Transform, fit_transform

Ranker = Literal["engram", "engram, centred", "engram, whitened", "another question", "word counts", "tf-idf"]
RANKERS: tuple[Ranker, ...] = (
    "engram", "engram, centred", "engram, whitened", "another question", "word counts", "tf-idf"
)  # fmt: skip

_WORD = re.compile(r"\w+")

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """Ranks of one needle's segment, from 1, and what the engram put first."""

    ranks: dict[Ranker, list[int]]
    """By ranker: one for each number of distractors."""
    retrieved: Segment
    """Nearest to the question among all segments, by the plain engram."""
    keys: dict[str, NDArray[np.float32]]
    """[d], the keys of the ``right`` and the ``retrieved`` segment."""


def rank_trials(model: LanguageModel, field: Field, plan: NeedlePlan, trials: Sequence[Trial]) -> Iterator[Found]:
    """Read every haystack once and rank each needle's segment, in the order of the trials."""
    pool = field.distractors()
    pool_keys = read_segments(model, pool, block=plan.block)[0] if pool else np.empty((0, model.d_model), np.float32)
    pool_words = [words(field.text(segment)) for segment in pool]
    questions = engrams(model, [field.ids(t.needle.question).tolist() for t in trials], block=plan.block)
    for number, trial in enumerate(trials):
        rng = np.random.default_rng([plan.seed, 3, number])
        order = rng.permutation(len(pool))
        n_own = len(trial.segments)
        own_keys, _ = read_segments(model, trial.segments, block=plan.block)
        keys = np.concatenate((own_keys, pool_keys[order]))
        counts = [words(field.text(s)) for s in trial.segments] + [pool_words[i] for i in order]
        asked, asked_engram = words(trial.needle.question), questions[number]
        other = questions[_another(trials, number)]
        ranks: dict[Ranker, list[int]] = {ranker: [] for ranker in RANKERS}
        for n in plan.distractors:
            there, bags = keys[: n_own + n], counts[: n_own + n]
            scores: dict[Ranker, Floats] = {
                "engram": cosines(there, asked_engram),
                "engram, centred": cosines(there, asked_engram, _fit(there, "centred")),
                "engram, whitened": cosines(there, asked_engram, _fit(there, "whitened")),
                "another question": cosines(there, other),
                "word counts": word_cosines(bags, asked),
                "tf-idf": word_cosines(bags, asked, inverse_frequencies(bags)),
            }
            for ranker, score in scores.items():
                ranks[ranker].append(rank_of(score, trial.target, rng))
            nearest = int(scores["engram"].argmax())
        everything = trial.segments + [pool[i] for i in order]
        yield Found(
            ranks=ranks,
            retrieved=everything[nearest],
            keys={"right": keys[trial.target], "retrieved": keys[nearest]},
        )


def _fit(keys: NDArray[np.float32], normalisation: Normalisation) -> Transform:
    """As a store fits it to the keys it holds."""
    return fit_transform(lambda: [keys], normalisation, 1)


def _another(trials: Sequence[Trial], number: int) -> int:
    """The next trial with another name."""
    n = len(trials)
    return next(i % n for i in range(number + 1, number + n) if trials[i % n].needle.name != trials[number].needle.name)


def rank_of(scores: Floats, target: int, rng: np.random.Generator) -> int:
    """Rank of a score [N] from 1 for the highest; among equal ones a drawn one, so that ties are worth chance."""
    higher, equal = int((scores > scores[target]).sum()), int((scores == scores[target]).sum())
    return 1 + higher + int(rng.integers(equal))


def cosines(keys: NDArray[np.float32], query: NDArray[np.float32], transform: Transform | None = None) -> Floats:
    """[N], of keys [N, d] with a query [d]."""
    transform = transform or Transform()
    return transform.directions(keys)[0] @ transform.directions(query[None])[0][0]


def words(text: str) -> Counter[str]:
    """How often each word occurs, in lower case."""
    return Counter(_WORD.findall(text.lower()))


def inverse_frequencies(bags: Sequence[Counter[str]]) -> dict[str, float]:
    """ln((1 + N) / (1 + n)) + 1 for a word in n of N texts, as in scikit-learn."""
    n_texts = Counter(word for bag in bags for word in bag)
    return {word: float(np.log((1 + len(bags)) / (1 + n)) + 1) for word, n in n_texts.items()}


def word_cosines(bags: Sequence[Counter[str]], query: Counter[str], weights: dict[str, float] | None = None) -> Floats:
    """[N], cosines of weighted word counts; a word of the query that no text has counts nothing."""

    def vector(bag: Counter[str]) -> dict[str, float]:
        return {w: n * (1.0 if weights is None else weights.get(w, 0.0)) for w, n in bag.items()}

    asked = vector(query)
    asked_norm = sum(v * v for v in asked.values()) ** 0.5
    found = np.zeros(len(bags))
    for i, bag in enumerate(bags):
        own = vector(bag)
        norm = sum(v * v for v in own.values()) ** 0.5 * asked_norm
        found[i] = sum(v * own.get(w, 0.0) for w, v in asked.items()) / norm if norm else 0.0
    return found.round(12)  # equal texts tie whatever the order of the sums
