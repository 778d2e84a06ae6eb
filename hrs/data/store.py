"""Token stores: a corpus as memory-mapped token ids with exact document labels, built once per content key.

A store is a folder of Arrow IPC files: per split the token ids (one record batch, so numpy views it without a copy) and
a table of documents; beside them ``tokenizer.json`` and ``store.json``, which lists every file with its size.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from hrs.config import DataConfig
from hrs.data.build import write_store
from hrs.data.corpora import load_corpus
from hrs.data.documents import SPLITS, Corpus, SplitName
from hrs.data.tokenization import end_of_text_id, load_tokenizer, token_bytes
from hrs.errors import HRSError
from hrs.files import built_once, whole_folder
from hrs.identity import code_fingerprint


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenSplit:
    """One split as the stream EOT doc0 EOT doc1 EOT ... (EOT: end of text). ``len()`` is its number of tokens."""

    tokens: NDArray[Any]
    """Ids, 1-D, memory-mapped and read-only: uint16, or int32 for vocabularies above 65,536."""
    document_starts: NDArray[np.int64]
    """[n_docs + 1]. Targets of document i are ``tokens[document_starts[i]:document_starts[i + 1]]``: its tokens and the
    EOT after them. The first is 1, so that every target has a context."""
    topic_ids: NDArray[np.int32]
    """[n_docs], index into :attr:`TokenStore.topics`; -1 for none."""
    n_bytes: NDArray[np.int64]
    """[n_docs], length in UTF-8."""
    n_words: NDArray[np.int64]
    """[n_docs], words between white space."""
    documents: pa.Table
    """Columns title, topic_id, n_bytes, n_words and end, memory-mapped."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def titles(self) -> list[str]:
        """[n_docs], made anew at each call."""
        titles: list[str] = self.documents["title"].to_pylist()
        return titles

    def document_of(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Index of the document whose target stands at each position; -1 for the EOT at position 0."""
        return np.searchsorted(self.document_starts, positions, side="right") - 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenStore:
    """A corpus in tokens."""

    fingerprint: str
    """Content key, as :func:`data_fingerprint` gives it."""
    vocab_size: int
    """Number of ids, V."""
    tokenizer: Tokenizer
    """Encodes text to ids and back; never to the end-of-text id, whatever the text says."""
    eot_id: int
    """Id of end of text."""
    token_bytes: NDArray[np.int32]
    """[V], UTF-8 bytes of each id; 0 for end of text."""
    topics: tuple[str, ...]
    """Names of the topic ids."""
    licence: str
    """Licence of the text."""
    train: TokenSplit
    validation: TokenSplit
    test: TokenSplit

    def split(self, name: str) -> TokenSplit:
        """The split of that name.

        Raises:
            HRSError: if there is none.
        """
        if name not in SPLITS:
            raise HRSError(f"unknown split '{name}': choose one of {', '.join(SPLITS)}")
        split: TokenSplit = getattr(self, name)
        return split


def data_fingerprint(data: DataConfig) -> str:
    """16 hex digits of the raw text, the tokenizer's name and the code of this package. Reads the text, builds nothing.

    Raises:
        HRSError: if the corpus is unknown or missing.
    """
    return _key(load_corpus(data.corpus), data.tokenizer)


def _key(corpus: Corpus, tokenizer: str) -> str:
    code = code_fingerprint(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256("\n".join((corpus.fingerprint(), tokenizer, code)).encode()).hexdigest()[:16]


def open_tokens(data: DataConfig, root: Path) -> TokenStore:
    """The store of ``data`` below ``root``, built first if it is missing or damaged. Safe in many processes at once.

    Raises:
        HRSError: if the corpus is missing, empty, malformed, too small for the tokenizer or without validation text.
    """
    corpus = load_corpus(data.corpus)
    folder = root / _key(corpus, data.tokenizer)
    return built_once(folder, _open, lambda: _build(corpus, data.tokenizer, folder), "token store")


def _build(corpus: Corpus, tokenizer: str, folder: Path) -> TokenStore:
    with whole_folder(folder, "token store") as building:
        write_store(corpus, tokenizer, building)
    store = _open(folder)
    if store is None:
        raise HRSError(f"token store {folder} was damaged while it was written: check the disk and try again")
    return store


def _open(folder: Path) -> TokenStore | None:
    """The store in a folder; None if a file is missing, cut off or unreadable."""
    try:
        meta = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in meta["files"].items()):
            return None
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        splits = {name: _open_split(folder, name) for name in SPLITS}
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None
    return TokenStore(
        fingerprint=folder.name,
        vocab_size=tokenizer.get_vocab_size(),
        tokenizer=tokenizer,
        eot_id=end_of_text_id(tokenizer),
        token_bytes=token_bytes(tokenizer),
        topics=tuple(meta["topics"]),
        licence=meta["licence"],
        **splits,
    )


def _open_split(folder: Path, name: SplitName) -> TokenSplit:
    tokens = pa.ipc.open_file(pa.memory_map(str(folder / f"{name}.tokens.arrow"))).get_batch(0)
    documents = pa.ipc.open_file(pa.memory_map(str(folder / f"{name}.documents.arrow"))).get_batch(0)
    column = {c: documents[c].to_numpy() for c in ("topic_id", "n_bytes", "n_words", "end")}
    return TokenSplit(
        tokens=tokens["tokens"].to_numpy(zero_copy_only=True),
        document_starts=np.concatenate([np.ones(1, dtype=np.int64), column["end"]]),
        topic_ids=column["topic_id"],
        n_bytes=column["n_bytes"],
        n_words=column["n_words"],
        documents=pa.Table.from_batches([documents]),
    )
