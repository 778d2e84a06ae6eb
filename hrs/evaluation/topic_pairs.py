"""Do two pieces of text come from one article? A fixed cosine threshold against a learned classifier, on new articles.

:mod:`hrs.evaluation.separation` asks how well the cosine ranks pairs. Here an answer has to be given. The threshold and
the classifier (eight numbers of two engrams -> 32 -> 32 -> yes or no) are fitted on training articles and counted on
held-out ones: *articles* are split, never pairs, for pairs of one article share its segments. Either kind of pair
weighs one half, so that an answer that ignores the text is right half of the time.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import nn

from hrs.evaluation.separation import RESAMPLES, Floats, Integers

FEATURES = 8
_HIDDEN, _STEPS, _BATCH_PAIRS = 32, 600, 256

Booleans = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """A number with its 95 % percentile interval over documents drawn with replacement."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScores:
    """What one kind of engram tells of pairs of held-out articles."""

    auc: Bounds
    """Of the cosine: how often a pair of one article is closer than a pair of two."""
    auc_classifier: Bounds
    """The same of the classifier's answer, a mean over seeds."""
    accuracy: Bounds
    """Of the threshold; either kind of pair weighs one half."""
    accuracy_classifier: Bounds
    """Of the classifier, a mean over seeds."""
    difference: Bounds
    """Classifier minus threshold, in the same resamples."""
    above_trained: Bounds | None
    """AUC of the cosine minus that of the trained model, in the same resamples; None for the trained model itself."""
    majority: float
    """What always giving the better of the two answers reaches."""
    accuracy_fitted: float
    accuracy_classifier_fitted: float
    """Both on the articles that they were fitted on."""
    by_seed: tuple[float, ...]
    """The classifier's accuracy, one per seed."""
    threshold: float
    mean_same: float
    mean_different: float
    """Mean cosines of pairs of one held-out article, and of two."""
    n_fitted_documents: int
    n_documents: int
    n_same: int
    n_different: int
    """Pairs of either kind of held-out articles."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def pair_features(engrams: Floats) -> Floats:
    """[P, 8] of all pairs i < j of engrams [N, d]: cosine, distance, mean and standard deviation over dimensions of the
    product and of the absolute difference, the shorter and the longer norm. The order within a pair does not matter."""
    first, second = np.triu_indices(len(engrams), k=1)
    width = engrams.shape[1]
    norms = np.linalg.norm(engrams, axis=1)
    a, b = norms[first], norms[second]
    product = (engrams @ engrams.T)[first, second]
    square_of_product = ((engrams**2) @ (engrams**2).T)[first, second] / width
    apart = cdist(engrams, engrams)[first, second]
    absolute = cdist(engrams, engrams, "cityblock")[first, second] / width
    # Rounded as in the separation score, so that pieces with the same words tie.
    cosine = (product / np.maximum(a * b, np.finfo(np.float64).tiny)).round(12)
    columns = (
        cosine,
        apart,
        product / width,
        np.sqrt(np.maximum(square_of_product - (product / width) ** 2, 0)),
        absolute,
        np.sqrt(np.maximum(apart**2 / width - absolute**2, 0)),
        np.minimum(a, b),
        np.maximum(a, b),
    )
    return np.column_stack(columns)


def fit_threshold(cosine: Floats, same: Booleans) -> float:
    """The cosine above which to say "same", with the most right answers when either kind of pair weighs one half."""
    order = np.argsort(cosine, kind="stable")
    cosine, same = cosine[order], same[order]
    weights = np.where(same, 1 / same.sum(), 1 / (~same).sum())
    right = np.r_[0, np.cumsum(weights * ~same)] + np.r_[np.cumsum((weights * same)[::-1])[::-1], 0]
    allowed = np.r_[True, np.diff(cosine) > 0, True]  # equal cosines get one answer
    k = int(np.argmax(np.where(allowed, right, -1)))
    below, above = np.r_[-np.inf, cosine, np.inf][k : k + 2]
    return float((below + above) / 2)


def fit_classifier(features: Floats, same: Booleans, seed: int) -> Callable[[Floats], Floats]:
    """A small network trained on pairs [P, 8], each batch half of one kind and half of the other; gives logits [Q] of
    features [Q, 8], above 0 for "same". Adam at 1e-3, 600 batches of 256 pairs."""
    mean, std = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-12)
    scaled = torch.from_numpy((features - mean) / std).float()
    kinds = [np.flatnonzero(~same), np.flatnonzero(same)]
    rng = np.random.default_rng(seed)
    answers = torch.arange(2).repeat_interleave(_BATCH_PAIRS // 2).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = pair_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    for _ in range(_STEPS):
        rows = np.concatenate([rng.choice(kind, _BATCH_PAIRS // 2) for kind in kinds])
        loss = nn.functional.binary_cross_entropy_with_logits(network(scaled[rows]).squeeze(-1), answers)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    @torch.no_grad()
    def answer(other: Floats) -> Floats:
        logits: Floats = network(torch.from_numpy((other - mean) / std).float()).squeeze(-1).double().numpy()
        return logits

    return answer


def pair_network() -> nn.Sequential:
    """8 -> 32 -> 32 -> 1, 1,377 parameters."""
    layers = (nn.Linear(FEATURES, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1))
    return nn.Sequential(*layers)


# ---- the score -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Engrams:
    """Engrams of pieces of some articles."""

    vectors: Floats
    """[N, d]"""
    documents: Integers
    """[N], numbered from 0."""

    def same(self) -> Booleans:
        """[P], which pairs i < j are of one article."""
        first, second = np.triu_indices(len(self.documents), k=1)
        return self.documents[first] == self.documents[second]


def score_pairs(
    fitted: Mapping[str, Engrams], held_out: Mapping[str, Engrams], seeds: Sequence[int] = (0, 1, 2)
) -> dict[str, PairScores]:
    """Fit threshold and classifier on pairs of the ``fitted`` articles and count on those of the ``held_out`` ones, for
    every kind of engram by name; all kinds must be of the same pieces, and the first is "trained" for the differences.

    A resample draws articles with replacement: a pair counts as often as its article was drawn, or the product of how
    often its two were. Fits stay as they are.
    """
    documents = next(iter(held_out.values())).documents
    n_documents = int(documents.max()) + 1
    rng = np.random.default_rng([0, n_documents])
    drawn = rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=RESAMPLES).astype(np.float64)
    scores: dict[str, PairScores] = {}
    trained: _Counted | None = None
    for name, known in fitted.items():
        same, features = known.same(), pair_features(known.vectors)
        threshold = fit_threshold(features[:, 0], same)
        answers = [fit_classifier(features, same, seed) for seed in seeds]
        new, new_same = pair_features(held_out[name].vectors), held_out[name].same()
        logits = [answer(new) for answer in answers]
        right = [(new[:, 0] > threshold) == new_same, *((found > 0) == new_same for found in logits)]
        counted = _count(documents, [new[:, 0], *logits], right, drawn)
        fitted_right = [(answer(features) > 0) == same for answer in answers]
        auc, accuracy, by_seed = counted.auc, counted.accuracy, counted.accuracy[:, 1:]
        trained = trained or counted
        scores[name] = PairScores(
            auc=_bounds(auc[:, 0]),
            auc_classifier=_bounds(auc[:, 1:].mean(axis=1)),
            accuracy=_bounds(accuracy[:, 0]),
            accuracy_classifier=_bounds(by_seed.mean(axis=1)),
            difference=_bounds(by_seed.mean(axis=1) - accuracy[:, 0]),
            above_trained=None if counted is trained else _bounds(auc[:, 0] - trained.auc[:, 0]),
            majority=max(_balanced(np.full(len(new_same), kind) == new_same, new_same) for kind in (False, True)),
            accuracy_fitted=_balanced((features[:, 0] > threshold) == same, same),
            accuracy_classifier_fitted=float(np.mean([_balanced(r, same) for r in fitted_right])),
            by_seed=tuple(by_seed[0].tolist()),
            threshold=threshold,
            mean_same=float(new[new_same, 0].mean()),
            mean_different=float(new[~new_same, 0].mean()),
            n_fitted_documents=int(known.documents.max()) + 1,
            n_documents=n_documents,
            n_same=int(new_same.sum()),
            n_different=int((~new_same).sum()),
        )
    return scores


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counted:
    """[1 + R, M]: of all articles and of each resample, for M ways to answer."""

    auc: Floats
    accuracy: Floats


def _count(documents: Integers, scores: Sequence[Floats], right: Sequence[Booleans], drawn: Floats) -> _Counted:
    """Every sum over pairs is one over articles and pairs of articles first, which a resample then only weighs."""
    first, second = np.triu_indices(len(documents), k=1)
    a, b = np.minimum(documents[first], documents[second]), np.maximum(documents[first], documents[second])
    same, n_documents = a == b, drawn.shape[1]
    c = np.vstack((np.ones(n_documents), drawn))  # [1 + R, D]
    low, high = np.triu_indices(n_documents, k=1)
    both = c[:, low] * c[:, high]  # [1 + R, D (D - 1) / 2]
    number = np.zeros((n_documents, n_documents), dtype=np.int64)
    number[low, high] = np.arange(len(low))
    one, two = a[same], number[a[~same], b[~same]]  # the article, or the pair of articles, of each pair of pieces

    def per_article(values: Floats) -> Floats:
        sums: Floats = np.bincount(one, values, minlength=n_documents).astype(np.float64)
        return sums

    def per_two(values: Floats) -> Floats:
        sums: Floats = np.bincount(two, values, minlength=len(low)).astype(np.float64)
        return sums

    n_same, n_different = c @ per_article(np.ones(len(one))), both @ per_two(np.ones(len(two)))  # [1 + R]
    auc, accuracy = [], []
    with np.errstate(invalid="ignore"):  # a resample of one article alone has no pairs of two
        for hit in (np.asarray(r, dtype=np.float64) for r in right):
            accuracy.append((c @ per_article(hit[same]) / n_same + both @ per_two(hit[~same]) / n_different) / 2)
        for score in scores:
            near, far = score[same], score[~same]
            won = np.array(
                [
                    per_two(sum((x > far) + (x == far) / 2 for x in near[one == document]))
                    for document in range(n_documents)
                ]
            )  # [D, D (D - 1) / 2], how often the article's pairs are closer than those of two
            auc.append(((both @ won.T) * c).sum(axis=1) / (n_same * n_different))
    return _Counted(auc=np.array(auc).T, accuracy=np.array(accuracy).T)


def _balanced(right: Booleans, same: Booleans) -> float:
    return float((right[same].mean() + right[~same].mean()) / 2)


def _bounds(values: Floats) -> Bounds:
    """From the value itself and its replicates behind it."""
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return Bounds(value=float(values[0]), low=float(low), high=float(high))
