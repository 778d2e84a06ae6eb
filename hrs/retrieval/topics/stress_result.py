"""What a stress test says: how much of what belongs together is together, and of what does not is apart."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hrs.retrieval.topics.contexts import TopicContexts

Embed = Callable[[str], NDArray[Any]]
"""A text to its engram [d], always of one width."""

PASS = 0.8
"""Least rate, of both kinds, that passes."""
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class StressResult:
    """One stress test. Each rate is the other's negative control: one topic for everything makes the first perfect and
    the second nil, a topic for every prompt the reverse, and vectors drawn at random do no better than one of these."""

    name: str
    together: float
    """Share of what belongs together that got one topic; the mean over draws."""
    apart: float
    """Share of what does not belong together that got different topics; the mean over draws."""
    low: float
    high: float
    """95 % percentile interval of ``balanced`` over draws with replacement."""
    n_draws: int
    details: dict[str, Any] = field(default_factory=dict)
    """What else this test tells, by name."""

    @property
    def balanced(self) -> float:
        """Mean of the two rates: one half for labels without meaning, however many topics there are."""
        return (self.together + self.apart) / 2

    @property
    def passed(self) -> bool:
        return min(self.together, self.apart) >= PASS

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self) | {"balanced": self.balanced, "passed": self.passed}


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """When a prompt joins a topic and when topics merge, as in :class:`hrs.retrieval.topics.contexts.TopicContexts`."""

    join: float = 0.5
    merge: float = 0.8

    @classmethod
    def of(cls, join: float) -> "Thresholds":
        """With a merge threshold three fifths of the way from ``join`` to one, so that it is always above."""
        return cls(join=join, merge=join + 0.6 * (1 - join))


def summary(name: str, draws: Sequence[tuple[float, float]], details: dict[str, Any], seed: int = 0) -> StressResult:
    """The result of draws, each a pair of rates (together, apart)."""
    rates = np.array(draws, dtype=np.float64)  # [n, 2]
    chosen = np.random.default_rng(seed).integers(len(rates), size=(RESAMPLES, len(rates)))
    low, high = np.quantile(rates.mean(axis=1)[chosen].mean(axis=1), (0.025, 0.975))
    together, apart = rates.mean(axis=0).tolist()
    return StressResult(
        name=name,
        together=together,
        apart=apart,
        low=float(low),
        high=float(high),
        n_draws=len(rates),
        details=details,
    )


def route(vectors: Sequence[NDArray[Any]], thresholds: Thresholds) -> tuple[TopicContexts, list[str]]:
    """Assign engrams one after the other; the topics, and the one each ended in."""
    topics = TopicContexts(len(vectors[0]), join=thresholds.join, merge=thresholds.merge)
    ids = [topics.assign(vector, (), "").topic_id for vector in vectors]
    return topics, [topics.resolve(topic) for topic in ids]


def pair_rates(labels: ArrayLike, found: ArrayLike) -> tuple[float, float]:
    """Share of pairs of equal labels that were found together, and of different ones apart; NaN without such pairs."""
    first, second = np.triu_indices(len(np.asarray(labels)), k=1)
    equal = np.asarray(labels)[first] == np.asarray(labels)[second]
    joined = np.asarray(found)[first] == np.asarray(found)[second]
    together = float(joined[equal].mean()) if equal.any() else float("nan")
    return together, float(1 - joined[~equal].mean()) if not equal.all() else float("nan")


def purity(labels: Sequence[Any], found: Sequence[Any]) -> float:
    """Share of prompts with the commonest label of their topic. A topic for every prompt has purity one."""
    pairs = list(zip(found, labels, strict=True))
    return sum(max(pairs.count((topic, label)) for label in set(labels)) for topic in set(found)) / len(pairs)


def random_embed(width: int, seed: int = 0) -> Embed:
    """Vectors that know nothing of a text but whether it is the same: the control for every embedding."""

    def embed(text: str) -> NDArray[np.float64]:
        digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest)).normal(size=width)

    return embed
