"""Corpora, tokenizers, packed token stores and the windows cut from them."""

from hrs.data.corpora import load_corpus
from hrs.data.documents import Corpus, Document, split_of
from hrs.data.store import TokenSplit, TokenStore, data_fingerprint, open_tokens
from hrs.data.windows import TrainingWindows, evaluation_windows

__all__ = [
    "Corpus",
    "Document",
    "TokenSplit",
    "TokenStore",
    "TrainingWindows",
    "data_fingerprint",
    "evaluation_windows",
    "load_corpus",
    "open_tokens",
    "split_of",
]
