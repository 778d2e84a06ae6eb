"""Building one token store: read the corpus, train the tokenizer, encode document by document, write Arrow files."""

import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from hrs.data.documents import SPLITS, Corpus, Document, SplitName, split_of
from hrs.data.duplicates import Deduplicate, DuplicateScan
from hrs.data.tokenization import build_tokenizer, end_of_text_id
from hrs.errors import HRSError
from hrs.files import write_manifest

_BATCH_DOCUMENTS = 256
_SECONDS_BETWEEN_LINES = 5.0


MANIFEST, TOKENIZER = "store.json", "tokenizer.json"


def write_store(corpus: Corpus, tokenizer: str | Tokenizer, folder: Path, deduplicate: Deduplicate = "none") -> None:
    """Write the store of a corpus into an empty folder; ``store.json`` lists the files with sizes and checksums.

    Duplicates are counted, and reported on stderr in one line if there are any.

    Args:
        deduplicate: see :class:`hrs.config.DataConfig`.
        tokenizer: the name of one, as :func:`hrs.data.tokenization.build_tokenizer` takes it. Or a tokenizer as it is:
            text that a model is only scored on may leave splits empty.

    Raises:
        HRSError: if the corpus is empty or malformed, too small for the tokenizer, or leaves a split without text.
    """
    name = tokenizer if isinstance(tokenizer, str) else "given"
    scan, removed = DuplicateScan(), frozenset[int]()
    if deduplicate != "none":
        for split, document in _documents(corpus, "comparing"):
            scan.add(split, document.text)
        removed = frozenset(scan.found(deduplicate)[1].tolist())
    if isinstance(tokenizer, str):
        tokenizer = corpus_tokenizer(corpus, tokenizer, removed)
    tokenizer.save(str(folder / TOKENIZER))
    topics: dict[str, int] = {}
    writers = {split: _SplitWriter(folder, split, tokenizer) for split in SPLITS}
    documents = _documents(corpus, "tokenising", removed)
    while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
        encodings = tokenizer.encode_batch_fast([document.text for _, document in batch], add_special_tokens=False)
        for (split, document), encoding in zip(batch, encodings, strict=True):
            topic_id = -1 if document.topic is None else topics.setdefault(document.topic, len(topics))
            writers[split].add(document, topic_id, encoding.ids)
            if deduplicate == "none":
                scan.add(split, document.text)
    for split, writer in writers.items():
        if writer.close() == 0 and split != "test" and name != "given":
            raise _empty_split(corpus, split)
    duplicates, _ = scan.found(deduplicate)
    if said := duplicates.sentence():
        hint = "; data.deduplicate=exact or near leaves such training documents out" if deduplicate == "none" else ""
        print(f"{corpus.name}: {said}{hint}", file=sys.stderr, flush=True)
    facts = {"corpus": corpus.name, "tokenizer": name, "licence": corpus.licence, "topics": list(topics)}
    write_manifest(folder / MANIFEST, facts | {"duplicates": dataclasses.asdict(duplicates)})


def corpus_tokenizer(corpus: Corpus, name: str, removed: frozenset[int] = frozenset()) -> Tokenizer:
    """Return the tokenizer of that name, trained on the corpus's training text if it is one that is trained.

    Args:
        removed: numbers of documents with text, counted from 0, that training leaves out.

    Raises:
        HRSError: if the name is unknown, or the training text is missing or too small.
    """
    training = (document.text for split, document in _documents(corpus, "reading", removed) if split == "train")
    if (first := next(training, None)) is None:
        raise _empty_split(corpus, "train")
    return build_tokenizer(name, itertools.chain([first], training))


def _empty_split(corpus: Corpus, split: SplitName) -> HRSError:
    documents = [document for _, document in _documents(corpus, "reading")]
    n_own = sum(document.split is not None for document in documents)
    n_titles = len({document.title for document in documents})
    return HRSError(
        f"corpus {corpus.name} has no document in its {split} split: of {len(documents)} documents {n_own} name a "
        f"split of their own, for the others the hash of the title decides (90/5/5), and there are {n_titles} "
        "different titles: add documents, give each a title of its own, or name splits in a field 'split'"
    )


def _documents(
    corpus: Corpus, doing: str, removed: frozenset[int] = frozenset()
) -> Iterator[tuple[SplitName, Document]]:
    """Documents that hold text, with their splits; says on stderr how fast they come if it takes long.

    Args:
        removed: numbers of those, counted from 0, that are left out.

    Raises:
        HRSError: if there are none, or the text cannot be read.
    """
    start = last_line = time.monotonic()
    count = 0
    for document in _read(corpus):
        if not document.text.strip():
            continue
        count += 1
        if count - 1 not in removed:
            yield document.split or split_of(document.title), document
        if (now := time.monotonic()) - last_line > _SECONDS_BETWEEN_LINES:
            last_line = now
            rate = count / (now - start)
            print(f"{corpus.name}: {doing}, {count:,} documents, {rate:,.0f} a second", file=sys.stderr, flush=True)
    if count == 0:
        raise HRSError(f"corpus {corpus.name} holds no text: name another, or put documents into it")


def _read(corpus: Corpus) -> Iterator[Document]:
    try:
        yield from corpus.documents()
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:  # of a corpus that is not the user's own files
        raise HRSError(
            f"corpus {corpus.name} cannot be read ({error}): its files are damaged, fetch them again"
        ) from None


class _SplitWriter:
    """Streams the ids of one split to disk, so that a corpus need not fit into memory."""

    def __init__(self, folder: Path, split: SplitName, tokenizer: Tokenizer) -> None:
        self._folder, self._split = folder, split
        self._dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int32
        self._eot_id = end_of_text_id(tokenizer)
        self._raw_path = folder / f"{split}.raw"
        self._raw = self._raw_path.open("wb")
        self._raw.write(np.array([self._eot_id], dtype=self._dtype).tobytes())
        self._n_tokens = 1
        self._titles: list[str] = []
        self._numbers: list[tuple[int, int, int, int]] = []

    def add(self, document: Document, topic_id: int, ids: list[int]) -> None:
        self._raw.write(np.array([*ids, self._eot_id], dtype=self._dtype).tobytes())
        self._n_tokens += len(ids) + 1
        self._titles.append(document.title)
        n_bytes, n_words = len(document.text.encode("utf-8")), len(document.text.split())
        self._numbers.append((topic_id, n_bytes, n_words, self._n_tokens))

    def close(self) -> int:
        """Write the Arrow files; returns the number of documents."""
        self._raw.close()
        with pa.memory_map(str(self._raw_path)) as raw:
            tokens = pa.Array.from_buffers(pa.from_numpy_dtype(self._dtype), self._n_tokens, [None, raw.read_buffer()])
            self._write("tokens", pa.record_batch({"tokens": tokens}))
        self._raw_path.unlink()
        topic_id, n_bytes, n_words, end = np.array(self._numbers, dtype=np.int64).reshape(-1, 4).T
        columns = {
            "title": pa.array(self._titles, pa.string()),
            "topic_id": pa.array(topic_id.astype(np.int32)),
            "n_bytes": pa.array(n_bytes),
            "n_words": pa.array(n_words),
            "end": pa.array(end),
        }
        self._write("documents", pa.record_batch(columns))
        return len(self._titles)

    def _write(self, what: str, batch: pa.RecordBatch) -> None:
        # One record batch: a column in several cannot be viewed as one numpy array without a copy.
        with pa.ipc.new_file(self._folder / f"{self._split}.{what}.arrow", batch.schema) as writer:
            writer.write_batch(batch)
