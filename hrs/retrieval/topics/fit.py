"""When a prompt joins a topic, fitted to one model: what its engrams have in common is taken away, the threshold is the
one that sorts held-out text best, and other held-out text says how well that works.

Hidden states share a large mean, another one in every model, so no cosine of raw engrams is near or far for all models.
Documents stand for subjects: pieces of one document, as long as a short prompt, should share a topic. The mean and the
thresholds come from half of the documents of a split that the model was not trained on, the figures from the others.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hrs import strict_json
from hrs.data.store import TokenSplit
from hrs.errors import HRSError
from hrs.evaluation.separation import Segments, segment_length, segments_of, separate
from hrs.files import write_whole
from hrs.models import LanguageModel
from hrs.retrieval.engrams import engrams, model_fingerprint
from hrs.retrieval.topics.stress_result import Thresholds, pair_rates, route

PIECE_TOKENS = 32
"""Of a piece, as of a short prompt; half of the model's context if that is less."""
LEAST_AUC = 0.7
"""Below it, topics mix subjects more than they tell them apart: docs/retrieval.md has the figures."""
SUBJECTS = 5
"""Documents whose pieces come in turn, in a conversation that thresholds are tried on."""
_CONVERSATIONS, _CANDIDATES, _FEWEST_DOCUMENTS = 20, 30, 8

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicFit:
    """How one model's engrams become topics, and how well that works."""

    model: str
    """Fingerprint of the model, see :func:`hrs.retrieval.engrams.model_fingerprint`."""
    block: int | None
    """Whose output engrams are means of, see :func:`hrs.retrieval.engrams.engrams`."""
    mean: tuple[float, ...]
    """[d], taken away from every engram."""
    join: float
    merge: float
    """Thresholds of :class:`hrs.retrieval.topics.contexts.TopicContexts`."""
    auc: float
    low: float
    high: float
    """How often two pieces of one held-out document are nearer than two of different ones, with its 95 % interval."""
    together: float
    apart: float
    """Of held-out conversations on five subjects: shares of pairs of one subject that got one topic, and of pairs of
    two that got two."""
    n_fitted_documents: int
    n_documents: int
    """Held-out documents of the figures."""
    piece_tokens: int

    @property
    def id(self) -> str:
        """8 hex digits of what decides where a prompt goes."""
        return hashlib.sha256(repr((self.block, self.mean, self.join, self.merge)).encode()).hexdigest()[:8]

    def centred(self, engram: ArrayLike) -> Floats:
        """Return an engram [d] without what all have in common."""
        return np.asarray(engram, dtype=np.float64) - np.array(self.mean)

    def sentence(self) -> str:
        """Return how well topics separate, in one line."""
        return (
            f"AUC {self.auc:.2f} [{self.low:.2f}, {self.high:.2f}] on {self.n_documents} held-out documents; of "
            f"{SUBJECTS} subjects {self.together:.0%} of what belongs together is, {self.apart:.0%} of the rest apart"
        )

    def why_off(self, least_auc: float = LEAST_AUC) -> str | None:
        """Return why topics should not be used with this model, in one line; None if they may be."""
        if self.auc >= least_auc:
            return None
        return f"this model's engrams tell subjects apart with an AUC of {self.auc:.2f} only, below {least_auc:.2f}"

    def save(self, path: Path) -> None:
        """Write it as JSON: the whole file, or none.

        Raises:
            HRSError: if the disk refuses.
        """
        write_whole(path, strict_json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path, fingerprint: str, block: int | None = None) -> "TopicFit":
        """Return that of the model with this fingerprint, for engrams of this block.

        Raises:
            HRSError: if the file cannot be read, is something else, or is of another model or block.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            fit = cls(**values | {"mean": tuple(map(float, values["mean"]))})
            if not -1 < float(fit.join) < float(fit.merge) <= 1 or not 0 <= float(fit.auc) <= 1:
                raise ValueError("its thresholds or its AUC are out of range")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise HRSError(f"topic fit {path} cannot be read ({error}): fit again with hrs topics") from error
        if (fit.model, fit.block) != (fingerprint, block):
            raise HRSError(
                f"topic fit {path} is of model {fit.model} and block {fit.block}, and this is model {fingerprint} and "
                f"block {block}: fit again with hrs topics"
            )
        return fit


def fit_path(model: Path) -> Path:
    """Return where the fit of a model lies: in the folder of its run, or beside its artifact."""
    if model.parent.name == "checkpoints":
        return model.parent.parent / "topic_fit.json"
    return model.with_name(f"{model.name}.topics.json") if model.is_file() else model / "topic_fit.json"


def fit_topics(model: LanguageModel, text: TokenSplit, *, block: int | None = None, seed: int = 0) -> TopicFit:
    """Fit topics to a model on text that it was not trained on.

    Raises:
        HRSError: if fewer than eight documents hold two pieces, or the model lacks ids of the text.
    """
    length = min(PIECE_TOKENS, segment_length(model.max_seq_len))
    cut = segments_of(text, length, seed=seed)
    if (n_documents := int(cut.documents.max()) + 1) < _FEWEST_DOCUMENTS:
        raise HRSError(
            f"topics are fitted on {_FEWEST_DOCUMENTS} documents with two pieces of {length} tokens or more, and this "
            f"split has {n_documents}: use a corpus with more or longer documents"
        )
    vectors = engrams(model, cut.tokens.tolist(), block=block).astype(np.float64)
    fitted = cut.documents % 2 == 0
    mean = vectors[fitted].mean(axis=0)
    vectors -= mean
    thresholds = best_thresholds(vectors[fitted], cut.documents[fitted] // 2, seed=seed)
    held_out, documents = vectors[~fitted], cut.documents[~fitted] // 2
    separation = separate(
        held_out, Segments(tokens=cut.tokens[~fitted], documents=documents, topics=cut.topics[~fitted]), seed=seed
    )
    assert separation is not None, "there are documents, and each has two pieces"
    together, apart = _rates(held_out, documents, conversations(documents, seed), thresholds)
    return TopicFit(
        model=model_fingerprint(model),
        block=block,
        mean=tuple(mean.tolist()),
        join=thresholds.join,
        merge=thresholds.merge,
        auc=separation.auc,
        low=separation.low,
        high=separation.high,
        together=together,
        apart=apart,
        n_fitted_documents=(n_documents + 1) // 2,
        n_documents=n_documents // 2,
        piece_tokens=length,
    )


def best_thresholds(vectors: Floats, documents: Integers, *, seed: int = 0) -> Thresholds:
    """Return the thresholds that sort conversations best: highest is the mean of two shares, of pairs of one document
    that share a topic and of pairs of two that do not.

    Args:
        vectors: [N, d], engrams of pieces without their mean.
        documents: [N], numbered from 0.
    """
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    cosines = (units @ units.T)[np.triu_indices(len(units), k=1)]
    low, high = float(np.quantile(cosines, 0.05)), float(cosines.max())
    joins = np.clip(np.linspace(low, high, _CANDIDATES), -0.99, 0.999)
    tried, candidates = conversations(documents, seed), [Thresholds.of(float(join)) for join in joins]
    rates = np.array([sum(_rates(vectors, documents, tried, candidate)) for candidate in candidates])
    best = np.flatnonzero(rates >= rates.max() - 1e-9)
    return candidates[best[len(best) // 2]]  # of those that are equally good the middle one


def conversations(documents: Integers, seed: int) -> list[Integers]:
    """Return rows of pieces in the order of conversations, each with all pieces of five documents, shuffled."""
    rng = np.random.default_rng([seed, len(documents)])
    n_documents = int(documents.max()) + 1
    chosen = (rng.choice(n_documents, min(SUBJECTS, n_documents), replace=False) for _ in range(_CONVERSATIONS))
    return [rng.permutation(np.flatnonzero(np.isin(documents, subjects))) for subjects in chosen]


def _rates(
    vectors: Floats, documents: Integers, tried: Sequence[Integers], thresholds: Thresholds
) -> tuple[float, float]:
    rates = [pair_rates(documents[rows], route(list(vectors[rows]), thresholds)[1]) for rows in tried]
    together, apart = np.mean(rates, axis=0).tolist()
    return together, apart
