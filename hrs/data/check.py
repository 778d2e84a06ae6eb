"""What a corpus holds before anything is trained on it: sizes, duplicates, odd documents, signs of a wrong encoding."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from hrs.data.documents import SPLITS, Corpus, Document, SplitName, split_of
from hrs.data.duplicates import Duplicates, DuplicateScan
from hrs.errors import shown

HUGE_BYTES = 2**20
"""A document beyond it is named: often a whole file that was meant to be many documents."""
_BATCH_DOCUMENTS = 256
_MANGLED = ("\u00c3\u00a4", "\u00c3\u00a9", "\u00c3\u00b6", "\u00c3\u00bc", "\u00e2\u20ac")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
PROBLEMS = {
    "empty": "no text, left out of the tokens",
    "huge": f"more than {HUGE_BYTES:,} bytes",
    "replaced": "U+FFFD in the place of bytes that could not be decoded",
    "mangled": "UTF-8 that was read as Windows or Latin-1 text, such as \u00c3\u00a9 for \u00e9",
    "control": "control characters or NUL, as of a binary file",
    "mark": "a byte order mark within the text",
}
"""What is looked for in a document, by name."""


@dataclass(kw_only=True, slots=True)
class SplitSize:
    """Sizes of one split, of the documents that hold text."""

    documents: int = 0
    n_bytes: int = 0
    """In UTF-8."""
    tokens: int = 0
    """With one end of text per document."""


@dataclass(kw_only=True, slots=True)
class CorpusCheck:
    """What :func:`check_corpus` found."""

    name: str
    licence: str
    sizes: dict[SplitName, SplitSize] = field(default_factory=lambda: {split: SplitSize() for split in SPLITS})
    problems: dict[str, list[str]] = field(default_factory=lambda: {problem: [] for problem in PROBLEMS})
    """Titles of documents by problem."""
    duplicates: Duplicates


def check_corpus(corpus: Corpus, tokenizer: Tokenizer) -> CorpusCheck:
    """Read a whole corpus and count; nothing is written.

    Raises:
        HRSError: naming file and place of what cannot be read.
    """
    scan = DuplicateScan()
    check = CorpusCheck(name=corpus.name, licence=corpus.licence, duplicates=scan.found()[0])
    documents = _with_text(corpus, check)
    while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
        encodings = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            split = document.split or split_of(document.title)
            scan.add(split, document.text)
            size = check.sizes[split]
            size.documents += 1
            size.n_bytes += len(document.text.encode("utf-8"))
            size.tokens += len(encoding) + 1
    check.duplicates, _ = scan.found()
    return check


def _with_text(corpus: Corpus, check: CorpusCheck) -> Iterator[Document]:
    for document in corpus.documents():
        for problem in problems_of(document.text):
            check.problems[problem].append(document.title)
        if document.text.strip():
            yield document


def problems_of(text: str) -> list[str]:
    """Return the names, out of :data:`PROBLEMS`, of what is odd about a text."""
    signs = {
        "empty": not text.strip(),
        "huge": len(text) > HUGE_BYTES or (len(text) > HUGE_BYTES // 4 and len(text.encode("utf-8")) > HUGE_BYTES),
        "replaced": "\ufffd" in text,
        "mangled": any(sign in text for sign in _MANGLED),
        "control": _CONTROL.search(text) is not None,
        "mark": "\ufeff" in text,
    }
    return [problem for problem, there in signs.items() if there]


def format_check(check: CorpusCheck) -> str:
    """Return the check as lines to print."""
    lines = [f"{check.name} ({check.licence})", f"{'split':<12}{'documents':>12}{'bytes':>16}{'tokens':>14}"]
    lines += [f"{s:<12}{n.documents:>12,}{n.n_bytes:>16,}{n.tokens:>14,}" for s, n in check.sizes.items()]
    said = check.duplicates.sentence()
    lines += ["duplicates:", *(f"  {part}" for part in said.split("; "))] if said else ["duplicates: none"]
    found = {problem: titles for problem, titles in check.problems.items() if titles}
    lines += ["problems:" if found else "problems: none"]
    lines += [f"  {len(t):,} documents: {PROBLEMS[p]} (the first is {shown(t[0])})" for p, t in found.items()]
    return "\n".join(lines)
