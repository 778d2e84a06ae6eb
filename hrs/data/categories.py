"""What text is about: a label for every token of a split, from the corpus's own topics or from clusters of documents.

``exact`` labels follow the documents. ``estimated`` labels follow the token counts per line that the original guessed
from characters; see :func:`token_labels`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from hrs.config import CategoryConfig
from hrs.data.documents import SPLITS
from hrs.data.store import TokenSplit, TokenStore
from hrs.errors import HRSError

MAX_TERMS = 5000
"""Words and pairs of words that tell documents apart."""
LINES_PER_CHUNK = 10_000
"""Lines whose tokens the original counted together before it spread them by characters."""
_DOCUMENTS_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenLabels:
    """A label for each token of a split, as runs of equal ones."""

    starts: NDArray[np.int64]
    """[n_runs], position of the first token of each run, increasing; the first is 0."""
    labels: NDArray[np.int64]
    """[n_runs]; -1 for none."""

    def at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Labels of the tokens at these positions, in the shape of the positions."""
        return self.labels[np.searchsorted(self.starts, positions, side="right") - 1]

    def counts(self, n_tokens: int) -> NDArray[np.int64]:
        """How many of the first ``n_tokens`` tokens have label 0, 1, ...; those without any do not count."""
        lengths = np.diff(np.append(np.minimum(self.starts, n_tokens), n_tokens))
        known = self.labels >= 0
        return np.bincount(self.labels[known], weights=lengths[known]).astype(np.int64)


def token_labels(store: TokenStore, split: str, config: CategoryConfig) -> TokenLabels:
    """Labels 0..n_classes - 1, or -1, of every token of a split. The same store and config give the same labels.

    ``exact``: the label of the token's document, to which the end of text in front of it counts.

    ``estimated``: a defect of the original, kept for comparison. It knew how many tokens a chunk of 10,000 lines had,
    gave each line ``max(1, round(its share by characters))`` of them, and the last line what was still missing. But the
    one token of a line without characters comes on top of all that were spread, and what is too much is never taken
    back: the labels fall behind the text, chunk by chunk, until they belong to other documents. Outside of training
    text a document takes the label of the training document of its title, and without one keeps the label before it,
    at first 0.

    Raises:
        HRSError: if the corpus has more topics than classes, or no topics and too little text for the clusters.
    """
    by_document = document_labels(store, config.n_classes)
    text = store.split(split)
    if config.labels == "exact":
        return TokenLabels(starts=text.document_starts[:-1] - 1, labels=by_document[split])
    known = dict(zip(store.train.titles, by_document["train"].tolist(), strict=True))
    return _estimated(text, store.tokenizer, known)


# ---- documents -------------------------------------------------------------------------------------------------------

_KEPT = 4
_labels_by_store: dict[str, dict[str, NDArray[np.int64]]] = {}


def document_labels(store: TokenStore, n_classes: int) -> dict[str, NDArray[np.int64]]:
    """Labels [n_docs] by split: the corpus's topics if it has any (-1 for documents without), else clusters.

    Clusters are those of TF-IDF vectors under k-means, found on training documents alone; documents of other splits go
    to the nearest. They are kept for the next caller in this process.

    Raises:
        HRSError: if there are more topics than classes, or too little text for so many clusters.
    """
    if len(store.topics) > n_classes:
        raise HRSError(
            f"the corpus has {len(store.topics)} topics and the categorisation head {n_classes} classes: "
            f"set model.category.n_classes={len(store.topics)} or more"
        )
    if store.topics:
        return {name: store.split(name).topic_ids.astype(np.int64) for name in SPLITS}
    # The lengths tell apart stores of one corpus that were cut differently.
    key = f"{store.fingerprint} {n_classes} {[len(store.split(name)) for name in SPLITS]}"
    if key not in _labels_by_store:
        while len(_labels_by_store) >= _KEPT:
            del _labels_by_store[next(iter(_labels_by_store))]
        _labels_by_store[key] = _clusters(store, n_classes)
    return _labels_by_store[key]


def _clusters(store: TokenStore, n_classes: int) -> dict[str, NDArray[np.int64]]:
    # Here, because they take seconds to import and only corpora without topics need them.
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    n_documents = len(store.train.topic_ids)
    if n_documents < n_classes:
        raise HRSError(
            f"{n_documents} training documents without topics do not make {n_classes} clusters: "
            f"set model.category.n_classes={n_documents} or less, or use a larger corpus"
        )
    vectorizer = TfidfVectorizer(
        max_features=MAX_TERMS, ngram_range=(1, 2), stop_words="english", max_df=0.95, min_df=2
    )
    kmeans = MiniBatchKMeans(n_classes, random_state=42, batch_size=1000)
    try:
        kmeans.fit(vectorizer.fit_transform(texts_of(store.train, store.tokenizer)))
    except ValueError as error:  # no term left, or no vector
        raise HRSError(
            f"training documents have too few words in common to be clustered ({str(error).splitlines()[0]}): "
            "use a corpus with topics, or a larger one"
        ) from error
    labels: dict[str, NDArray[np.int64]] = {}
    for name in SPLITS:
        split = store.split(name)
        vectors = vectorizer.transform(texts_of(split, store.tokenizer)) if len(split.topic_ids) else None
        labels[name] = np.empty(0, np.int64) if vectors is None else kmeans.predict(vectors).astype(np.int64)
    return labels


def texts_of(split: TokenSplit, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each document, decoded from its tokens."""
    starts, ends = split.document_starts[:-1], split.document_starts[1:] - 1  # without the end of text
    for first in range(0, len(starts), _DOCUMENTS_AT_ONCE):
        chosen = slice(first, first + _DOCUMENTS_AT_ONCE)
        ids = [split.tokens[a:b].tolist() for a, b in zip(starts[chosen], ends[chosen], strict=True)]
        yield from tokenizer.decode_batch(ids)


# ---- the original's estimate -----------------------------------------------------------------------------------------


def _estimated(split: TokenSplit, tokenizer: Tokenizer, known: dict[str, int]) -> TokenLabels:
    """Runs of labels as long as the estimates per line say; those past the end of the text label nothing."""
    runs: list[tuple[int, int]] = []  # tokens, label
    chunk: list[tuple[int, int]] = []  # characters, label
    label, chunk_start = 0, 0
    texts = texts_of(split, tokenizer)
    for title, start, text in zip(split.titles, split.document_starts[:-1], texts, strict=True):
        label = known.get(title, label)
        lines = text.split("\n")
        for i, line in enumerate(lines):
            if len(chunk) == LINES_PER_CHUNK:
                # Position of the line: the document's tokens before it are those of the text before it.
                before = "".join(f"{earlier}\n" for earlier in lines[:i])
                end = int(start) + len(tokenizer.encode(before, add_special_tokens=False).ids)
                runs += _spread(chunk, end - chunk_start)
                chunk, chunk_start = [], end
            chunk.append((len(line), label))
    runs += _spread(chunk, len(split) - chunk_start)
    lengths, labels = np.array(runs, dtype=np.int64).T
    starts = np.cumsum(lengths) - lengths
    changed = np.append(True, labels[1:] != labels[:-1])
    return TokenLabels(starts=starts[changed], labels=labels[changed])


def _spread(chunk: Sequence[tuple[int, int]], n_tokens: int) -> list[tuple[int, int]]:
    """Tokens by line of (characters, label); at least ``n_tokens`` together, and more where lines are empty."""
    n_characters = sum(characters for characters, _ in chunk) or 1
    runs = [(max(1, round(n_tokens * characters / n_characters)), label) for characters, label in chunk]
    missing = n_tokens - sum(tokens for tokens, _ in runs)
    return [*runs, (missing, chunk[-1][1])] if missing > 0 else runs
