"""Pieces of articles at two scales, segments and sentences, and every way to make engrams of them."""

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from tokenizers import Tokenizer

from hrs.config import ExperimentConfig
from hrs.data.store import TokenSplit
from hrs.errors import HRSError
from hrs.evaluation.separation import (
    LARGEST_DOCUMENTS,
    EngramSource,
    Floats,
    Integers,
    Segments,
    engram_sources,
    segment_length,
    segments_of,
)
from hrs.models import LanguageModel

Scale = Literal["article", "sentence"]
"""Segments of half the model's context, or single sentences."""
SCALES: tuple[Scale, ...] = get_args(Scale)
SENTENCES_PER_DOCUMENT = 5
SENTENCE_WORDS = (8, 40)
_FEWEST_DOCUMENTS = 4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pieces:
    """Stretches of text of any length, two of every document at least."""

    tokens: list[Integers]
    """[N] of [L]"""
    documents: Integers
    """[N], numbered from 0."""


_NEXT = r"""(?=["'(\[]?[A-Z0-9])"""
_SENTENCE_END = re.compile(rf"""(?<=[.!?])\s+{_NEXT}|(?<=[.!?]["')\]])\s+{_NEXT}|\n+""")


def sentences_of(text: str) -> list[str]:
    """Its sentences of 8 to 40 words, in order. Abbreviations in front of a capital letter end a sentence, too."""
    low, high = SENTENCE_WORDS
    return [s.strip() for s in _SENTENCE_END.split(text) if low <= len(s.split()) <= high]


def article_pieces(text: TokenSplit, max_seq_len: int, *, seed: int = 0) -> Pieces:
    """Segments as :func:`hrs.evaluation.separation.segments_of` cuts them, of half the context.

    Raises:
        HRSError: if too few documents are long enough.
    """
    cut = segments_of(text, segment_length(max_seq_len), seed=seed)
    return Pieces(tokens=list(cut.tokens), documents=cut.documents)


def sentence_pieces(text: TokenSplit, tokenizer: Tokenizer, max_seq_len: int, *, seed: int = 0) -> Pieces:
    """At most five sentences, spread evenly, of at most 96 documents, drawn; one longer than the context is cut there.

    Raises:
        HRSError: if too few documents have two sentences.
    """
    order = np.random.default_rng(seed).permutation(len(text.document_starts) - 1)
    tokens: list[Integers] = []
    documents: list[int] = []
    n_documents = 0
    for document in order:
        start, end = text.document_starts[document : document + 2]
        found = sentences_of(tokenizer.decode(text.tokens[start : end - 1].tolist()))
        if len(found) < 2:
            continue
        chosen = np.unique(np.linspace(0, len(found) - 1, min(SENTENCES_PER_DOCUMENT, len(found))).astype(int))
        for index in chosen:
            tokens.append(np.array(tokenizer.encode(found[index]).ids[:max_seq_len], dtype=np.int64))
            documents.append(n_documents)
        n_documents += 1
        if n_documents == LARGEST_DOCUMENTS:
            break
    if n_documents < _FEWEST_DOCUMENTS:
        raise HRSError(
            f"topic pairs of sentences need {_FEWEST_DOCUMENTS} documents with two sentences of {SENTENCE_WORDS[0]} to "
            f"{SENTENCE_WORDS[1]} words and this split has {n_documents}: use a corpus of prose"
        )
    return Pieces(tokens=tokens, documents=np.array(documents))


def piece_engrams(source: EngramSource, pieces: Pieces) -> Floats:
    """[N, d], each piece read alone and unpadded: those of one length together."""
    lengths = np.array([len(tokens) for tokens in pieces.tokens])
    engrams: list[Any] = [None] * len(lengths)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        none = np.zeros(len(rows), dtype=np.int64)
        alike = Segments(tokens=np.stack([pieces.tokens[row] for row in rows]), documents=none, topics=none - 1)
        for row, engram in zip(rows, source(alike), strict=True):
            engrams[row] = engram
    return np.stack(engrams)


def sources_and_chance(trained: LanguageModel, config: ExperimentConfig) -> dict[str, EngramSource]:
    """Those of :func:`hrs.evaluation.separation.engram_sources`, and vectors drawn at random, from which nothing can be
    told."""
    rng = np.random.default_rng(config.seed)
    sources = {str(name): make for name, make in engram_sources(trained, config).items()}
    return sources | {"random": lambda cut: rng.normal(size=(len(cut.tokens), trained.d_model))}
