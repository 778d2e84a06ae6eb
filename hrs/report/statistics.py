"""How sure a score is: a bootstrap over seeds and documents, and paired differences from a baseline.

A score is a ratio of sums over documents (nats to bytes, nats to tokens), averaged over seeds. Every seed of every
preset is scored on the same documents, so seeds and documents are crossed factors: one resample draws seeds with
replacement, then documents with replacement, and gives every preset the *same* documents (the pigeonhole bootstrap,
Owen 2007). What makes a document hard for all presets then cancels in a difference.

Two limits, which a report must state. The percentile interval takes the S seeds at hand for all seeds: it sees
(S - 1) / S of the variance between them and cannot reach beyond the best and the worst, while the median over all seeds
lies outside those with a chance of 1 in 2^(S - 1). Where seeds matter more than documents, "95 %" is 75 % for three.
With one seed the interval covers documents alone and says nothing about another seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrs.errors import HRSError

LEVEL = 0.95
RESAMPLES = 4000
_DRAWS_IN_MEMORY = 2_000_000

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What one preset scored, document by document. S seeds, D documents."""

    seeds: tuple[int, ...]
    numerators: Floats
    """[S, D], for example nats."""
    denominators: Floats
    """[D], for example bytes; the same for every seed."""

    def __post_init__(self) -> None:
        if not self.seeds or self.numerators.shape != (len(self.seeds), len(self.denominators)):
            raise HRSError(
                f"scores of {len(self.seeds)} seeds and {len(self.denominators)} documents "
                f"cannot come from an array of shape {self.numerators.shape}"
            )
        if not self.denominators.sum() > 0:
            raise HRSError("scores need documents that are not empty: the split has no text to divide by")

    def ratio(self) -> float:
        """The mean over seeds of sum(numerators) / sum(denominators)."""
        return float(self.numerators.mean(axis=0).sum() / self.denominators.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A preset's score and how far it lies from the baseline's."""

    score: Interval
    difference: Interval | None
    """Paired: this preset minus the baseline. None for the baseline itself, or if there is none."""


def bootstrap(
    presets: Sequence[Scores], *, baseline: int | None = 0, resamples: int = RESAMPLES, seed: int = 0
) -> list[Estimate]:
    """Intervals of every preset's ratio and of its paired difference from ``presets[baseline]``.

    All presets share the documents of a resample. Presets with the same set of seeds share its seeds too; otherwise
    the seeds are drawn independently, for there is nothing to pair. The draws depend on ``seed``, the seed sets and
    the number of documents alone: adding a preset leaves the other intervals as they were.

    Raises:
        HRSError: if the presets were not scored on equally many documents.
    """
    if not presets:
        return []
    if len({len(p.denominators) for p in presets}) > 1:
        raise HRSError("presets scored on different documents cannot be compared: evaluate them on one split")
    sums = resampled_sums(np.vstack([np.vstack((p.numerators, p.denominators)) for p in presets]), resamples, seed)
    replicates = []
    for preset in presets:
        mine, sums = sums[: len(preset.seeds) + 1], sums[len(preset.seeds) + 1 :]
        weights = seed_weights(preset.seeds, resamples, seed)
        replicates.append((weights * mine[:-1]).sum(axis=0) / mine[-1])
    estimates = []
    for index, preset in enumerate(presets):
        difference = None
        if baseline is not None and index != baseline:
            gap = preset.ratio() - presets[baseline].ratio()
            difference = _percentile(gap, replicates[index] - replicates[baseline])
        estimates.append(Estimate(score=_percentile(preset.ratio(), replicates[index]), difference=difference))
    return estimates


def resampled_sums(rows: Floats, resamples: int, seed: int) -> Floats:
    """[K, D] to [K, R]: the sum of every row over D documents drawn with replacement, the same draws for all rows."""
    n_documents = rows.shape[1]
    rng = np.random.default_rng([seed, 0])
    sums = np.empty((len(rows), resamples))
    chunk = max(1, _DRAWS_IN_MEMORY // n_documents)
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        sums[:, start:stop] = rows @ document_counts(rng, stop - start, n_documents).T
    return sums


def document_counts(rng: np.random.Generator, resamples: int, n_documents: int) -> Floats:
    """[R, D]: how often each document is drawn; rows are multinomial and sum to D."""
    # Counting uniform draws is several times faster than numpy's multinomial, which draws D binomials per row.
    draws = rng.integers(n_documents, size=(resamples, n_documents))
    draws += np.arange(resamples)[:, None] * n_documents
    counts = np.bincount(draws.ravel(), minlength=resamples * n_documents)
    return counts.reshape(resamples, n_documents).astype(np.float64)


def seed_weights(seeds: Sequence[int], resamples: int, seed: int) -> Floats:
    """[S, R]: the share of each seed in each resample; columns sum to 1. Equal seed sets give equal weights."""
    n_seeds = len(seeds)
    rng = np.random.default_rng([seed, 1, *repr(tuple(seeds)).encode()])
    return rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples).T / n_seeds


def _percentile(value: float, replicates: Floats) -> Interval:
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=value, low=float(low), high=float(high))
