"""Whether mean hidden states tell what a text is about: do two segments of one document lie closer than two of others?

An *engram* here is the mean final hidden state of a segment that the model reads alone. Two engrams are compared by
their cosine. The score is the area under the ROC curve: how often a pair that belongs together is closer than a pair
that does not, one half for chance whatever the share of either kind. An accuracy has no such fixed point, so it stands
beside the rate of the larger class, and its threshold is fitted on other documents than it is counted on.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrs import strict_json
from hrs.config import ExperimentConfig
from hrs.data.store import TokenSplit, TokenStore
from hrs.errors import HRSError
from hrs.models import LanguageModel, build_model

Task = Literal["document", "topic"]
"""``document``: same against another document. ``topic``: another document of the same topic against one of another."""
Source = Literal["trained", "untrained", "embeddings", "tokens"]
"""Mean hidden states of the trained model, or of the same model before its first step; means of the trained token
embeddings; counts of token ids. What the last three reach is not the merit of trained layers."""

TASKS: tuple[Task, ...] = get_args(Task)
RESAMPLES = 1000
LARGEST_DOCUMENTS = 96
"""Documents, at most, drawn from those that are long enough."""
SEGMENTS_PER_DOCUMENT = 4
"""Segments of one document, at most, so that no long one decides the score."""
_FEWEST_DOCUMENTS = 4
_BATCH_SEGMENTS = 16

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segments:
    """Stretches of text, each inside one document. N segments of L tokens."""

    tokens: Integers
    """[N, L]"""
    documents: Integers
    """[N], numbered from 0; every document has two segments at least."""
    topics: Integers
    """[N], -1 for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Separation:
    """How well one kind of engram tells pairs that belong together from pairs that do not."""

    auc: float
    """Area under the ROC curve of the cosine, ties counting half."""
    low: float
    high: float
    """95 % percentile interval over documents drawn with replacement."""
    accuracy: float
    """Share of pairs on the right side of the best threshold of *other* documents: the threshold is fitted on the pairs
    within one half of the documents and counted on those within the other half, then the other way around."""
    majority: float
    """Share of the larger class among those pairs: what always giving one answer reaches."""
    n_documents: int
    n_same: int
    n_different: int
    """Pairs of either kind."""
    replicates: tuple[float, ...]
    """[RESAMPLES], AUC of every resample of the documents. The draws depend on the number of documents alone, so those
    of two models over the same segments are paired."""


EngramSource = Callable[[Segments], Floats]
"""Segments [N, L] to engrams [N, d]."""
Separations = dict[Task, dict[Source, Separation]]


# ---- segments and engrams --------------------------------------------------------------------------------------------


def segments_of(text: TokenSplit, length: int, *, seed: int = 0) -> Segments:
    """Segments of ``length`` tokens, evenly spread over each document that holds two or more.

    Raises:
        HRSError: if too few documents do.
    """
    starts, ends = text.document_starts[:-1], text.document_starts[1:] - 1  # the end-of-text token is no text
    long_enough = np.flatnonzero(ends - starts >= 2 * length)
    if len(long_enough) < _FEWEST_DOCUMENTS:
        raise HRSError(
            f"topic separation needs {_FEWEST_DOCUMENTS} documents with two segments of {length} tokens and this split "
            f"has {len(long_enough)}: use a corpus with longer documents, or a smaller model.max_seq_len"
        )
    if len(long_enough) > LARGEST_DOCUMENTS:
        long_enough = np.sort(np.random.default_rng(seed).choice(long_enough, LARGEST_DOCUMENTS, replace=False))
    tokens, documents = [], []
    for number, document in enumerate(long_enough):
        room = ends[document] - starts[document] - length
        count = min(SEGMENTS_PER_DOCUMENT, room // length + 1)
        for offset in np.linspace(0, room, count).astype(int):
            start = starts[document] + offset
            tokens.append(text.tokens[start : start + length])
            documents.append(number)
    topics = text.topic_ids[long_enough[documents]].astype(np.int64)
    return Segments(tokens=np.stack(tokens).astype(np.int64), documents=np.array(documents), topics=topics)


@torch.no_grad()
def hidden_engrams(model: LanguageModel, segments: Segments) -> Floats:
    """[N, d], mean final hidden state of every segment, in evaluation mode and on the model's device."""
    was_training = model.training
    model.eval()
    try:
        return _means(lambda ids: model.encode(ids).hidden[..., : model.d_model], model, segments)
    finally:
        model.train(was_training)


@torch.no_grad()
def embedding_engrams(model: LanguageModel, segments: Segments) -> Floats:
    """[N, d], mean token embedding of every segment."""
    return _means(model.input_embedding, model, segments)


def _means(states_of: Callable[[Tensor], Tensor], model: LanguageModel, segments: Segments) -> Floats:
    device = next(model.parameters()).device
    batches = torch.from_numpy(segments.tokens).split(_BATCH_SEGMENTS)
    means: Floats = torch.cat([states_of(ids.to(device)).double().mean(dim=1).cpu() for ids in batches]).numpy()
    return means


def token_counts(segments: Segments, vocab_size: int) -> Floats:
    """[N, V], how often each token id occurs in every segment."""
    return np.stack([np.bincount(row, minlength=vocab_size) for row in segments.tokens]).astype(np.float64)


# ---- the score -------------------------------------------------------------------------------------------------------


def separate(engrams: Floats, segments: Segments, task: Task = "document", *, seed: int = 0) -> Separation | None:
    """Score engrams [N, d] of the segments; None if the task has no pairs of one of the two kinds.

    A resample draws documents with replacement: a pair counts as often as its document was drawn, or the product of how
    often its two were. Two draws of one document make no pair.
    """
    first, second = np.triu_indices(len(engrams), k=1)
    a, b = segments.documents[first], segments.documents[second]
    if task == "document":
        same, kept = a == b, np.ones(len(a), dtype=bool)
    else:
        topic, other = segments.topics[first], segments.topics[second]
        # Pairs within a document would lend the topic their closeness.
        same, kept = topic == other, (a != b) & (topic >= 0) & (other >= 0)
    unit = engrams / np.maximum(np.linalg.norm(engrams, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    # Rounded, so that segments with the same words tie whatever the order of the sums.
    cosine = (unit @ unit.T)[first, second].round(12)
    order = np.argsort(cosine, kind="stable")
    order = order[kept[order]]
    cosine, same, a, b = cosine[order], same[order], a[order], b[order]
    if same.all() or not same.any():
        return None
    n_documents = int(segments.documents.max()) + 1
    groups = _groups(cosine, same)
    rng = np.random.default_rng([seed, n_documents])
    drawn = rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=RESAMPLES).astype(np.float64)
    within = a == b
    replicates = np.array([_auc(same, np.where(within, c[a], c[a] * c[b]), groups) for c in drawn])
    low, high = np.nanquantile(replicates, (0.025, 0.975))
    accuracy, majority = _held_out(cosine, same, a, b, rng.permutation(n_documents) % 2)
    return Separation(
        auc=_auc(same, np.ones(len(same)), groups),
        low=float(low),
        high=float(high),
        accuracy=accuracy,
        majority=majority,
        n_documents=n_documents,
        n_same=int(same.sum()),
        n_different=int((~same).sum()),
        replicates=tuple(replicates.tolist()),
    )


def _groups(cosine: Floats, same: NDArray[np.bool_]) -> Integers:
    """Where runs of pairs begin that the curve cannot tell apart: equal cosines, or neighbours of one kind."""
    starts = np.flatnonzero(np.r_[True, np.diff(cosine) > 0])  # of equal cosines
    n_same = np.add.reduceat(same.astype(int), starts)
    n_all = np.diff(np.r_[starts, len(cosine)])
    kind = np.where(n_same == 0, 0, np.where(n_same == n_all, 1, 2))
    return starts[np.r_[True, (np.diff(kind) != 0) | (kind[1:] == 2)]]


def _auc(same: NDArray[np.bool_], weights: Floats, groups: Integers) -> float:
    """Weighted area under the curve of pairs in rising order of cosine, runs of them beginning at ``groups``; NaN
    without weight on one of the two kinds."""
    together = np.add.reduceat(weights * same, groups)
    apart = np.add.reduceat(weights * ~same, groups)
    total = together.sum() * apart.sum()
    return float(together @ (apart.cumsum() - apart / 2) / total) if total else float("nan")


def _held_out(cosine: Floats, same: NDArray[np.bool_], a: Integers, b: Integers, half: Integers) -> tuple[float, float]:
    """Accuracy and majority rate over the pairs within each half of the documents, cosines in rising order; NaN if the
    halves hold no pairs."""
    right, counts = 0, np.zeros(2)
    for fitted in (0, 1):
        inside = (half[a] == fitted) & (half[b] == fitted)
        outside = (half[a] != fitted) & (half[b] != fitted)
        if not (inside.any() and outside.any()):
            continue
        threshold = _best_threshold(cosine[inside], same[inside])
        right += int(((cosine[outside] > threshold) == same[outside]).sum())
        counts += np.bincount(same[outside].astype(int), minlength=2)
    if not counts.any():
        return float("nan"), float("nan")
    return float(right / counts.sum()), float(counts.max() / counts.sum())


def _best_threshold(cosine: Floats, same: NDArray[np.bool_]) -> float:
    """The cosine above which to say "same", so that most pairs, given in rising order, are right."""
    # Right answers if the first k pairs are called different, for k that do not part equal cosines.
    right = np.r_[0, np.cumsum(~same)] + np.r_[np.cumsum(same[::-1])[::-1], 0]
    allowed = np.r_[True, np.diff(cosine) > 0, True]
    k = int(np.argmax(np.where(allowed, right, -1)))
    below, above = np.r_[-np.inf, cosine, np.inf][k : k + 2]
    return float((below + above) / 2)  # midway between two


# ---- one run ---------------------------------------------------------------------------------------------------------


def engram_sources(trained: LanguageModel, config: ExperimentConfig) -> dict[Source, EngramSource]:
    """The trained model and what it has to beat; the experiment's seed gives the model before its first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        untrained = build_model(config.model).to(next(trained.parameters()).device)
    return {
        "trained": lambda cut: hidden_engrams(trained, cut),
        "untrained": lambda cut: hidden_engrams(untrained, cut),
        "embeddings": lambda cut: embedding_engrams(trained, cut),
        "tokens": lambda cut: token_counts(cut, trained.vocab_size),
    }


def measure_separation(
    trained: LanguageModel, config: ExperimentConfig, store: TokenStore, split: str = "validation"
) -> Separations:
    """Every source's separation by task, over segments of half the model's context; a task without pairs is left out.

    Args:
        config: the trained model's experiment; its seed gives the untrained model.

    Raises:
        HRSError: if the split has too few documents that are long enough.
    """
    segments = segments_of(store.split(split), segment_length(trained.max_seq_len))
    engrams = {source: engrams_of(segments) for source, engrams_of in engram_sources(trained, config).items()}
    found: Separations = {}
    for task in TASKS:
        scores = {source: separate(e, segments, task) for source, e in engrams.items()}
        if kept := {source: score for source, score in scores.items() if score is not None}:
            found[task] = kept
    return found


def segment_length(max_seq_len: int) -> int:
    """Tokens of a segment."""
    return max(1, max_seq_len // 2)


def to_dict(separations: Separations) -> dict[str, dict[str, Any]]:
    """As JSON has it."""
    return {task: {s: dataclasses.asdict(score) for s, score in scores.items()} for task, scores in separations.items()}


def from_dict(values: Mapping[Task, Mapping[Source, dict[str, Any]]]) -> Separations:
    """What :func:`to_dict` made, also after strict JSON, in which NaN is null."""
    return {task: {s: _separation(score) for s, score in scores.items()} for task, scores in values.items()}


def _separation(score: dict[str, Any]) -> Separation:
    numbers: dict[str, Any] = {name: strict_json.number(score[name]) for name in score if name != "replicates"}
    return Separation(**numbers, replicates=tuple(map(strict_json.number, score["replicates"])))
