"""Token stores: a corpus as memory-mapped token ids with exact document labels, built once per content key.

A store is a folder of Arrow IPC files: per split the token ids (one record batch, so numpy views it without a copy) and
a table of documents; beside them ``tokenizer.json`` and ``store.json``, which lists every file with size and checksum.

The key of a store is the fingerprint of the data: a run is bound to it, and finds its tokens by it whatever became of
the corpus since.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from hrs.config import DataConfig
from hrs.data.build import MANIFEST, TOKENIZER, write_store
from hrs.data.corpora import load_corpus
from hrs.data.documents import SPLITS, Corpus, SplitName, require_split
from hrs.data.duplicates import Deduplicate, Duplicates, duplicates_from
from hrs.data.tokenization import end_of_text_id, load_tokenizer, token_bytes
from hrs.errors import HRSError
from hrs.files import built_once, read_manifest, whole_folder
from hrs.identity import code_fingerprint

_log = logging.getLogger(__name__)


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
    duplicates: Duplicates | None
    """What occurs more than once; None of a store that an earlier version wrote."""
    train: TokenSplit
    validation: TokenSplit
    test: TokenSplit

    def split(self, name: str) -> TokenSplit:
        """The split of that name.

        Raises:
            HRSError: if there is none.
        """
        require_split(name)
        split: TokenSplit = getattr(self, name)
        return split


def data_fingerprint(data: DataConfig) -> str:
    """16 hex digits of the raw text, the tokenizer's name and the code of this package. Reads the text, builds nothing.

    Raises:
        HRSError: if the corpus is unknown or missing.
    """
    return _key(load_corpus(data.corpus), data.tokenizer, data.deduplicate)


def _key(corpus: Corpus, tokenizer: str, deduplicate: Deduplicate = "none") -> str:
    code = code_fingerprint(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256("\n".join((corpus.fingerprint(), tokenizer, deduplicate, code)).encode()).hexdigest()[:16]


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_tokens(data: DataConfig, root: Path, fingerprint: str | None = None) -> TokenStore:
    """The store of ``data`` below ``root``, built first if it is missing or damaged. Safe in many processes at once.

    Args:
        fingerprint: of the store that is wanted, as a plan or a trained model names it. If that store lies below
            ``root``, the corpus is not looked at.

    Raises:
        HRSError: if the corpus is missing, empty, malformed, too small for the tokenizer or without validation text; or
            if it is no longer the text of ``fingerprint``.
    """
    if fingerprint is not None and (store := stored_tokens(root, fingerprint)) is not None:
        return store
    try:
        corpus = load_corpus(data.corpus)
    except HRSError as error:
        if fingerprint is None:
            raise
        raise HRSError(
            f"tokens {fingerprint} of {data.corpus} are missing or damaged in {root}, and {error}"
        ) from error
    key = _key(corpus, data.tokenizer, data.deduplicate)
    if fingerprint not in (None, key):
        raise HRSError(
            f"corpus {data.corpus} is no longer the text of tokens {fingerprint} (the text, or the code that cuts it, "
            f"has changed), and these tokens are missing or damaged in {root}: restore one of the two (`hrs evaluate "
            "--corpus` scores other text)"
        )
    return _opened_or_built(corpus, data.tokenizer, root / key, data.deduplicate)


def open_tokens_in(tokenizer: Tokenizer, corpus: str, root: Path) -> TokenStore:
    """The store of a corpus in the ids of a given tokenizer, for scores of text that a model was not trained on.

    Raises:
        HRSError: if the corpus is missing, empty or malformed.
    """
    found = load_corpus(corpus)
    key = _key(found, f"given {hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}")
    return _opened_or_built(found, tokenizer, root / key)


def stored_tokens(root: Path, fingerprint: str) -> TokenStore | None:
    """The store of that fingerprint below ``root``; None if it is not there, or damaged, which is logged."""
    if Path(fingerprint).name != fingerprint:  # an artifact of a stranger names it
        return None
    return _open(root / fingerprint)


def _opened_or_built(
    corpus: Corpus, tokenizer: str | Tokenizer, folder: Path, deduplicate: Deduplicate = "none"
) -> TokenStore:
    def build() -> TokenStore:
        with whole_folder(folder, "token store") as building:
            write_store(corpus, tokenizer, building, deduplicate)
        return read_store(folder)

    return built_once(folder, _open, build, "token store")


def _open(folder: Path) -> TokenStore | None:
    if not folder.exists():
        return None
    try:
        return read_store(folder)
    except HRSError as error:
        _log.warning("%s", error)
        return None


def read_store(folder: Path) -> TokenStore:
    """The store in a folder, every file of which is compared with its checksum, once per process.

    Raises:
        HRSError: naming the file that is missing, cut off, changed or unreadable.
    """
    try:
        facts = read_manifest(folder / MANIFEST)
        tokenizer = load_tokenizer(folder / TOKENIZER)
        splits = {name: _open_split(folder, name) for name in SPLITS}
        return TokenStore(
            fingerprint=folder.name,
            vocab_size=tokenizer.get_vocab_size(),
            tokenizer=tokenizer,
            eot_id=end_of_text_id(tokenizer),
            token_bytes=token_bytes(tokenizer),
            topics=tuple(facts["topics"]),
            licence=facts["licence"],
            duplicates=duplicates_from(facts.get("duplicates")),
            **splits,
        )
    except HRSError as error:
        raise HRSError(f"token store {folder} is damaged: {error}") from error
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise HRSError(f"token store {folder} is damaged ({error})") from error


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
