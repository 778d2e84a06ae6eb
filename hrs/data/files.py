"""Corpora in files of the user: plain text, JSON lines, Parquet. Each is one file or a folder of them."""

import json
import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from hrs.data.documents import Corpus, Document, fingerprint_files
from hrs.data.folders import files_below, partition_values, require_file, require_utf8_path, title_of
from hrs.data.streams import open_text
from hrs.errors import HRSError, shown
from hrs.files import absolute_path

_LABELS = ("title", "topic", "split")
_COLUMNS = ("text", *_LABELS)
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8 cannot
_CHUNK_CHARACTERS = 4_000
_LONGEST_CHUNK_CHARACTERS = 16_000
_CONVERTED_DIGITS = 300  # Python refuses to read integers of more than 4,300


class FileCorpus(Corpus):
    """Files below one path, in the order of their names."""

    kind: ClassVar[str]
    suffix: ClassVar[str]
    hidden: ClassVar[tuple[str, ...]] = (".",)
    """Beginnings of names that are no data, such as ``.ipynb_checkpoints``."""
    licence = "unknown (your own files)"

    def __init__(self, path: Path) -> None:
        path = absolute_path(path)
        self.name = f"{self.kind}:{path}"
        require_utf8_path(path)
        if not path.exists() and not path.is_symlink():
            raise HRSError(f"corpus {self.name} does not exist: check the path, or give an absolute one")
        self._path = path
        self._root = path if path.is_dir() else path.parent
        if path.is_dir():
            self._files = files_below(path, self.suffix, hidden=self.hidden)
        else:
            require_file(path)
            self._files = [path]
        if not self._files:
            raise HRSError(f"corpus {self.name} has no {self.suffix} file in it: name another folder, or one file")

    def documents(self) -> Iterator[Document]:
        for file in self._files:
            yield from self._read(file)

    def fingerprint(self) -> str:
        return fingerprint_files(self.kind, self._files, self._root)

    @abstractmethod
    def _read(self, file: Path) -> Iterator[Document]:
        """Documents of one file."""

    def _title(self, file: Path) -> str:
        return title_of(file, self._root)


class TextCorpus(FileCorpus):
    """A folder of ``.txt`` files, one document each; or a single file, cut at blank lines into documents of some kB."""

    kind, suffix = "text", ".txt"

    def _read(self, file: Path) -> Iterator[Document]:
        with open_text(file) as stream:
            if self._path.is_dir():
                yield Document(title=self._title(file), text=stream.read())
                return
            for index, text in enumerate(_chunks(stream)):
                yield Document(title=f"{self._title(file)} {index}", text=text)


def _chunks(stream: Iterator[str]) -> Iterator[str]:
    """Pieces of at least 4,000 characters that end before a blank line, or after any line once they reach 16,000."""
    lines: list[str] = []
    length = 0
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
        known = partition_values(file, self._root, _LABELS)
        with open_text(file) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"{file} line {number}"
                    yield _document(_parsed(line, where), known, f"{self._title(file)} {number}", where)


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise HRSError(f"{where} is not JSON ({error.msg}): mend or remove the line") from None
    except RecursionError:
        raise HRSError(f"{where} is nested too deeply to read: write its text without the other fields") from None


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _CONVERTED_DIGITS else math.copysign(math.inf, -digits.startswith("-") or 1)


class ParquetCorpus(FileCorpus):
    """Parquet files with the columns of :class:`JSONLCorpus`, read one record batch at a time."""

    kind, suffix = "parquet", ".parquet"
    hidden = (".", "_")  # Spark's marks and Delta's log are Parquet files as well

    def _read(self, file: Path) -> Iterator[Document]:
        number = 0
        known = partition_values(file, self._root, _LABELS)
        try:
            with pq.ParquetFile(file) as table:
                columns = _columns(table.schema_arrow, file)
                for batch in table.iter_batches(batch_size=1024, columns=columns):
                    for cells in zip(*(batch[name] for name in columns), strict=True):
                        number += 1
                        where = f"{file} row {number}"
                        row = {name: _decoded(cell, name, where) for name, cell in zip(columns, cells, strict=True)}
                        yield _document(row, known, f"{self._title(file)} {number}", where)
        except (OSError, pa.ArrowException) as error:  # OSError is also what Arrow says of pages that do not unpack
            if isinstance(error, pa.ArrowInvalid) and number == 0:
                raise HRSError(f"{file} is not a Parquet file, or is cut off: write it again") from None
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise HRSError(
                f"{file} cannot be read after row {number} ({reason}): it is damaged or may not be read, write it again"
            ) from None


def _columns(schema: pa.Schema, file: Path) -> list[str]:
    """Columns that make documents.

    Raises:
        HRSError: if there is no text, or one of them holds something else than text.
    """
    columns = [name for name in _COLUMNS if name in schema.names]
    if "text" not in columns:
        found = shown(", ".join(schema.names)).strip("'")
        raise HRSError(f"{file} has no column 'text' (it has {found}): rename the column that holds the text")
    for name in columns:
        if schema.names.count(name) > 1:
            raise HRSError(f"{file} has more than one column '{name}': rename all but one")
        if not _is_text(schema.field(name).type):
            found = shown(str(schema.field(name).type)).strip("'")
            raise HRSError(f"{file} has a column '{name}' of type {found}, not text: write it as strings")
    return columns


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    t = pa.types
    texts = (t.is_string, t.is_large_string, t.is_string_view, t.is_binary, t.is_large_binary, t.is_null)
    return any(is_kind(kind) for is_kind in texts)


def _decoded(cell: pa.Scalar, name: str, where: str) -> Any:
    try:
        value = cell.as_py()
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise HRSError(f"{where} is not UTF-8 (byte {error.start} of its {name}): write it as UTF-8") from None


def _document(row: Any, known: Mapping[str, str], default_title: str, where: str) -> Document:
    if not isinstance(row, Mapping) or "text" not in row:
        raise HRSError(f"{where} has no field 'text': every document needs one")
    fields = {name: row[name] for name in _COLUMNS if row.get(name) is not None} | dict(known)
    for name, value in fields.items():
        if not isinstance(value, str):
            raise HRSError(f"{where} has a {name} that is not text ({shown(value)}): write it as a string")
        if _SURROGATE.search(value):
            raise HRSError(f"{where} has half a surrogate pair in its {name}: write the character whole")
    filled = {name: value for name, value in fields.items() if value.strip()}  # a blank title is no title
    try:
        return Document(**{"title": default_title, "text": "", **filled})
    except HRSError as error:
        raise HRSError(f"{where}: {error}") from None
