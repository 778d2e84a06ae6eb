"""What the needles showed: raw ranks and answers, and rates, means and differences with their intervals."""

import dataclasses
import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrs import strict_json
from hrs.data.store import TokenStore
from hrs.identity import code_fingerprint, code_version
from hrs.models.base import LanguageModel
from hrs.report.statistics import Interval
from hrs.retrieval.needle.answers import Answer, Way, answer, readings
from hrs.retrieval.needle.plan import Field, NeedlePlan
from hrs.retrieval.needle.ranks import RANKERS, Ranker, rank_trials

RESAMPLES = 2000
EXAMPLES = 3
_Z = 1.959964  # 97.5 % quantile of the normal distribution

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NeedleResult:
    """D depths, n trials at each, L numbers of distractors. Every trial is a needle and a haystack of its own, so
    trials are independent; the numbers of distractors share them."""

    plan: NeedlePlan
    ranks: dict[Ranker, NDArray[np.int64]]
    """[D, n, L], from 1."""
    answers: dict[Way, list[Answer]]
    """[D * n], depth by depth."""
    examples: list[dict[str, str]]
    """A few needles with what was retrieved and how they were continued."""

    def n_segments(self, level: int) -> int:
        """Segments in the store."""
        return self.plan.haystack_segments + self.plan.distractors[level]

    def chance(self, level: int, k: int) -> float:
        """Recall at k of a drawn order."""
        return min(1.0, k / self.n_segments(level))

    def recall(self, ranker: Ranker, level: int, k: int, depth: int | None = None) -> Interval:
        """Share of needles among the first k, with its Wilson interval; of one depth, or of all."""
        found = (self._of(ranker, level, depth) <= k).ravel()
        return wilson(int(found.sum()), len(found))

    def reciprocal_rank(self, ranker: Ranker, level: int, depth: int | None = None) -> Interval:
        """Mean of 1 / rank, with a bootstrap interval."""
        return mean_interval(1 / self._of(ranker, level, depth).ravel())

    def chance_reciprocal_rank(self, level: int) -> float:
        n = self.n_segments(level)
        return float((1 / np.arange(1, n + 1)).mean())

    def found(self, way: Way) -> Interval:
        """Share of continuations with the value in them."""
        hits = [a.found for a in self.answers[way]]
        return wilson(sum(hits), len(hits))

    def first(self, way: Way) -> Interval:
        """Share of needles whose value is the likeliest of its alternatives."""
        hits = [a.rank == 1 for a in self.answers[way]]
        return wilson(sum(hits), len(hits))

    def mean_rank(self, way: Way) -> Interval:
        return mean_interval(np.array([a.rank for a in self.answers[way]], dtype=np.float64))

    def gain(self, way: Way, over: Way) -> Interval:
        """Nats by which the value is likelier, paired by needle."""
        return mean_interval(self._log_probs(way) - self._log_probs(over))

    def metrics(self) -> dict[str, float]:
        """Single numbers by short names."""
        found: dict[str, float] = {}
        for ranker in RANKERS:
            name = ranker.replace(", ", "_").replace(" ", "_")
            for level, n in enumerate(self.plan.distractors):
                for k in (1, 5):
                    found[f"recall_{k}/{name}/{n}"] = self.recall(ranker, level, k).value
                found[f"reciprocal_rank/{name}/{n}"] = self.reciprocal_rank(ranker, level).value
        for way in self.answers:
            name = way.replace(", ", "_")
            found |= {f"answer_found/{name}": self.found(way).value, f"answer_first/{name}": self.first(way).value}
            found[f"answer_mean_rank/{name}"] = self.mean_rank(way).value
        return found

    def to_json(self) -> str:
        """Everything, the raw ranks and answers included."""
        document: dict[str, Any] = {
            "plan": dataclasses.asdict(self.plan),
            "metrics": self.metrics(),
            "ranks": {ranker: values.tolist() for ranker, values in self.ranks.items()},
            "answers": {way: [dataclasses.asdict(a) for a in answers] for way, answers in self.answers.items()},
            "examples": self.examples,
        }
        return strict_json.dumps(document, indent=1, ensure_ascii=False)

    def _of(self, ranker: Ranker, level: int, depth: int | None) -> NDArray[np.int64]:
        chosen: NDArray[np.int64] = self.ranks[ranker][slice(None) if depth is None else depth, :, level]
        return chosen

    def _log_probs(self, way: Way) -> Floats:
        return np.array([a.log_prob for a in self.answers[way]])


def measure_needles(model: LanguageModel, tokens: TokenStore, plan: NeedlePlan) -> Generator[str, None, NeedleResult]:
    """Plant, seek and ask: a function of the model, the data and the plan. Yields lines of progress and returns the
    result, for ``result = yield from measure_needles(...)``.

    Args:
        model: in evaluation mode, on any device.
        tokens: of the model's own tokenizer.

    Raises:
        HRSError: if the split is too small, or segments, needles and questions do not fit into the model's context.
    """
    plan.cut.require_fit(model)
    field = Field(tokens, plan)
    trials = [field.trial(depth, number) for depth in range(len(plan.depths)) for number in range(plan.trials)]
    found = []
    for one in rank_trials(model, field, plan, trials):
        found.append(one)
        if len(found) % plan.trials == 0:
            yield f"sought {len(found)} of {len(trials)} needles"
    shape = (len(plan.depths), plan.trials, len(plan.distractors))
    ranks = {ranker: np.array([f.ranks[ranker] for f in found]).reshape(shape) for ranker in RANKERS}
    answers: dict[Way, list[Answer]] = {}
    for way, read in readings(field, trials, found, slots=model.takes_memory).items():
        answers[way] = answer(model, field, plan, trials, read)
        yield f"asked {len(trials)} times, memory: {way}"
    examples = []
    for i in range(0, len(trials), -(-len(trials) // EXAMPLES)):
        needle, segments = trials[i].needle, trials[i].segments
        texts = {"needle": needle.fact, "question": needle.question, "segment": field.text(segments[trials[i].target])}
        texts["retrieved"] = field.text(found[i].retrieved)
        examples.append(texts | {f"continued ({way})": given[i].continuation for way, given in answers.items()})
    return NeedleResult(plan=plan, ranks=ranks, answers=answers, examples=examples)


def measurement_key(plan: NeedlePlan, model: str, data: str) -> str:
    """16 hex digits of all that a result follows from: the plan, the fingerprints of model and data, and the code."""
    code = code_fingerprint(Path(__file__).parents[1].rglob("*.py"))
    content = strict_json.dumps([dataclasses.asdict(plan), model, data, code, code_version()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def wilson(hits: int, n: int) -> Interval:
    """A share and its 95 % interval (Wilson 1927), which keeps a width at 0 and 1."""
    share = hits / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * ((share * (1 - share) + _Z**2 / (4 * n)) / n) ** 0.5 / (1 + _Z**2 / n)
    return Interval(value=share, low=max(0.0, min(centre - half, share)), high=min(1.0, max(centre + half, share)))


def mean_interval(values: Floats, seed: int = 0) -> Interval:
    """A mean over independent needles [n] and its 95 % percentile interval of :data:`RESAMPLES` bootstrap resamples."""
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
    return Interval(value=float(values.mean()), low=float(low), high=float(high))
