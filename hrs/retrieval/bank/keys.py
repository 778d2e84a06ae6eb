"""Keys of chunks, by which neighbours are found: what the base made of them, or the words that are in them."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from hrs.data import TokenStore
from hrs.retrieval.bank.chunks import Chunks

Similarity = Callable[[slice], Tensor]
"""From some of the queries to their cosines with all keys, [q, n]."""
_PER_DOCUMENT = 4
"""Candidates looked at for each neighbour kept, of which one per document remains."""
_QUERIES_AT_ONCE = 512
_LEAST_VARIANCE = 1e-3
"""Of any direction, as a share of the mean one: whitening must not blow up what is rounding."""


def engram_similarities(
    engrams: Mapping[str, NDArray[np.float32]], chunks: Mapping[str, Chunks], span: int
) -> dict[str, Similarity]:
    """By split: cosines of the engrams [n, d] of chunks, each averaged with those of the ``span - 1`` chunks before it
    in its document, centred and whitened by the training text's. Without whitening a few directions that all text
    shares decide."""
    means = {}
    for name, rows in engrams.items():
        band = _band(chunks[name], span)
        means[name] = np.asarray(band @ rows.astype(np.float64)) / band.sum(axis=1)[:, None]
    centre = means["train"].mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov((means["train"] - centre).T))
    whiten = axes / np.sqrt(np.maximum(variances, 0) + _LEAST_VARIANCE * variances.mean())
    keys = {name: _unit((rows - centre) @ whiten) for name, rows in means.items()}
    train = keys["train"].T

    def of(queries: Tensor) -> Similarity:
        return lambda rows: queries[rows] @ train

    return {name: of(rows) for name, rows in keys.items()}


def word_similarities(store: TokenStore, chunks: Mapping[str, Chunks], length: int, span: int) -> dict[str, Similarity]:
    """By split: cosines of root counts of tokens, weighted by their inverse document frequency (in training chunks), of
    each chunk with the ``span - 1`` before it in its document. No model has a part in them.

    Args:
        length: tokens per chunk.
    """
    counts = {name: _counts(store, name, some, length) for name, some in chunks.items()}
    rarity = np.log(counts["train"].shape[0] / (1 + np.asarray((counts["train"] > 0).sum(axis=0)).ravel()))
    keys = {}
    for name, rows in counts.items():
        weighted = (_band(chunks[name], span) @ rows).sqrt().multiply(np.maximum(rarity, 0.0)).tocsr()
        lengths = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
        keys[name] = sparse.csr_array(sparse.diags_array(1 / np.maximum(lengths, 1e-12)) @ weighted)
    train = keys["train"].T.tocsr()

    def of(queries: sparse.csr_array) -> Similarity:
        return lambda rows: torch.from_numpy((queries[rows] @ train).toarray().astype(np.float32))

    return {name: of(rows) for name, rows in keys.items()}


def _counts(store: TokenStore, split: str, chunks: Chunks, length: int) -> sparse.csr_array:
    """[n, V], how often each token stands in each chunk."""
    places = chunks.ends[:, None] - length + np.arange(length)  # [n, length]
    tokens = store.split(split).tokens[places].ravel().astype(np.int64)
    rows = np.repeat(np.arange(len(chunks)), length)
    ones = np.ones(len(tokens), dtype=np.float64)
    return sparse.csr_array((ones, (rows, tokens)), shape=(len(chunks), store.vocab_size))


def _band(chunks: Chunks, span: int) -> sparse.csr_array:
    """[n, n], 1 from each chunk to itself and the ``span - 1`` before it that are of its document."""
    n = len(chunks)
    pairs = [np.arange(n)] * 2
    rows, columns = [pairs[0]], [pairs[1]]
    for back in range(1, min(span, n)):
        row = np.flatnonzero(chunks.documents[back:] == chunks.documents[:-back]) + back
        rows.append(row)
        columns.append(row - back)
    where = np.concatenate(rows), np.concatenate(columns)
    return sparse.csr_array((np.ones(len(where[0])), where), shape=(n, n))


def _unit(rows: NDArray[np.float64]) -> Tensor:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return torch.from_numpy((rows / np.maximum(lengths, 1e-12)).astype(np.float32))


def nearest(
    similarity: Similarity, n_queries: int, documents: NDArray[np.int64], k: int, own: NDArray[np.int64] | None
) -> NDArray[np.int32]:
    """For each query the ``k`` nearest keys [Q, k], best first, the best one of each document; -1 for none.

    Looks at ``4 k`` candidates: where those lie in fewer documents the rest of the row is -1.

    Args:
        documents: [n], of each key.
        own: [Q], the document of each query, none of whose keys it may find; None if it is among no documents.
    """
    found = np.full((n_queries, k), -1, dtype=np.int32)
    of_key = torch.from_numpy(documents)
    for first in range(0, n_queries, _QUERIES_AT_ONCE):
        rows = slice(first, min(first + _QUERIES_AT_ONCE, n_queries))
        cosines = similarity(rows)  # [q, n]
        if own is not None:
            cosines = cosines.masked_fill(torch.from_numpy(own[rows])[:, None] == of_key, -torch.inf)
        best = cosines.topk(min(_PER_DOCUMENT * k, len(documents)))
        of_best = of_key[best.indices]  # [q, m]
        again = (of_best[:, :, None] == of_best[:, None, :]).tril(-1).any(-1)
        usable = ~again & best.values.isfinite()
        order = (~usable).long().argsort(dim=1, stable=True)[:, :k]
        chosen = torch.where(usable, best.indices, -1).gather(1, order)
        found[rows, : chosen.shape[1]] = chosen.numpy()
    return found
