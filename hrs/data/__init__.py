"""Corpora, tokenizers, packed token stores and the windows cut from them."""

from hrs.data.corpora import absolute_corpus, load_corpus
from hrs.data.documents import Corpus, Document, split_of
from hrs.data.store import TokenSplit, TokenStore, data_fingerprint, open_tokens, open_tokens_in, stored_tokens
from hrs.data.windows import TrainingWindows, evaluation_windows

__all__ = [
    "Corpus",
    "Document",
    "TokenSplit",
    "TokenStore",
    "TrainingWindows",
    "absolute_corpus",
    "data_fingerprint",
    "evaluation_windows",
    "load_corpus",
    "open_tokens",
    "open_tokens_in",
    "split_of",
    "stored_tokens",
]
