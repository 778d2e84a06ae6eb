"""Corpora in files of the user: plain text, JSON lines, Parquet. Each is one file or a folder of them."""

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from hrs.data.documents import Corpus, Document, fingerprint_files
from hrs.errors import HRSError

_COLUMNS = ("text", "title", "topic", "split")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8 cannot
_CHUNK_CHARACTERS = 4_000
_LONGEST_CHUNK_CHARACTERS = 16_000


class FileCorpus(Corpus):
    """Files below one path, in the order of their names."""

    kind: ClassVar[str]
    suffix: ClassVar[str]
    licence = "unknown (your own files)"

    def __init__(self, path: Path) -> None:
        path = path.expanduser()
        self.name = f"{self.kind}:{path}"
        self._path = path
        self._root = path if path.is_dir() else path.parent
        self._files = sorted(path.rglob(f"*{self.suffix}")) if path.is_dir() else [path]
        if not path.exists():
            raise HRSError(f"corpus {self.name} does not exist: check the path, or give an absolute one")
        if not self._files:
            raise HRSError(f"corpus {self.name} has no {self.suffix} file in it: name another folder, or one file")

    def documents(self) -> Iterator[Document]:
        for file in self._files:
            try:
                yield from self._read(file)
            except UnicodeDecodeError as error:
                raise HRSError(
                    f"{file} is not UTF-8 (byte {error.start}): convert it, for example with iconv"
                ) from None

    def fingerprint(self) -> str:
        return fingerprint_files(self.kind, self._files, self._root)

    @abstractmethod
    def _read(self, file: Path) -> Iterator[Document]:
        """Documents of one file."""

    def _title(self, file: Path) -> str:
        return file.relative_to(self._root).with_suffix("").as_posix()


class TextCorpus(FileCorpus):
    """A folder of ``.txt`` files, one document each; or a single file, cut at blank lines into documents of some kB."""

    kind, suffix = "text", ".txt"

    def _read(self, file: Path) -> Iterator[Document]:
        if self._path.is_dir():
            yield Document(title=self._title(file), text=file.read_text(encoding="utf-8"))
            return
        for index, text in enumerate(_chunks(file)):
            yield Document(title=f"{self._title(file)} {index}", text=text)


def _chunks(file: Path) -> Iterator[str]:
    """Pieces of at least 4,000 characters that end before a blank line, or after any line once they reach 16,000."""
    lines: list[str] = []
    length = 0
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            lines.append(line)
            length += len(line)
            if length >= (_LONGEST_CHUNK_CHARACTERS if line.strip() else _CHUNK_CHARACTERS):
                yield "".join(lines)
                lines, length = [], 0
    yield "".join(lines)


class JSONLCorpus(FileCorpus):
    """One JSON object a line with ``text`` and, if wanted, ``title``, ``topic`` and ``split``."""

    kind, suffix = "jsonl", ".jsonl"

    def _read(self, file: Path) -> Iterator[Document]:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise HRSError(f"{file} line {number} is not JSON ({error.msg}): mend or remove the line") from None
                yield _document(row, f"{self._title(file)} {number}", f"{file} line {number}")


class ParquetCorpus(FileCorpus):
    """Parquet files with the columns of :class:`JSONLCorpus`, read one record batch at a time."""

    kind, suffix = "parquet", ".parquet"

    def _read(self, file: Path) -> Iterator[Document]:
        try:
            table = pq.ParquetFile(file)
        except pa.ArrowInvalid:
            raise HRSError(f"{file} is not a Parquet file, or is cut off: write it again") from None
        with table:
            columns = [name for name in _COLUMNS if name in table.schema_arrow.names]
            if "text" not in columns:
                found = ", ".join(table.schema_arrow.names)
                raise HRSError(f"{file} has no column 'text' (it has {found}): rename the column that holds the text")
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield _document(row, f"{self._title(file)} {number}", f"{file} row {number}")


def _document(row: Any, default_title: str, where: str) -> Document:
    if not isinstance(row, Mapping) or "text" not in row:
        raise HRSError(f"{where} has no field 'text': every document needs one")
    fields = {name: row[name] for name in _COLUMNS if row.get(name) is not None}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise HRSError(f"{where} has a {name} that is not text ({value!r}): write it as a string")
        if _SURROGATE.search(value):
            raise HRSError(f"{where} has half a surrogate pair in its {name}: write the character whole")
    return Document(**{"title": default_title, "text": "", **fields})
