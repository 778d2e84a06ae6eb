"""Text files as people have them: compressed, with a byte order mark, or damaged at a place that can be named."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from hrs.errors import HRSError

_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
_ZIP, _TAR, _TAR_AT = b"PK\x03\x04", b"ustar", 257
# A mark of UTF-32 begins like one of UTF-16, so it is looked for first.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@contextmanager
def open_text(file: Path) -> Iterator[io.TextIOWrapper]:
    """Open a text file, decompressed by its first bytes and decoded by its byte order mark, else as UTF-8.

    Raises:
        HRSError: from within the block as well, if the file cannot be read or decoded to its end; it names the place.
    """
    try:
        with open_bytes(file) as raw, io.TextIOWrapper(raw, encoding=_encoding(raw, file)) as text:
            yield text
    except UnicodeDecodeError as error:
        raise HRSError(f"{_undecodable(file, error)}: convert it, for example with iconv") from None


@contextmanager
def open_bytes(file: Path) -> Iterator[io.BufferedReader]:
    """Open a file for its bytes, decompressed if its first bytes say that it is gzip, bzip2, xz or Zstandard.

    Raises:
        HRSError: from within the block as well, if it cannot be read to its end.
    """
    try:
        with file.open("rb") as plain, _decompressed(plain) as raw:
            yield raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise HRSError(f"{file} cannot be read ({error}): it is damaged or cut off, or may not be read") from None


def _decompressed(plain: io.BufferedReader) -> io.BufferedReader:
    start = plain.peek(8)
    if start.startswith(_GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=plain))
    if start.startswith(_BZIP2):
        return io.BufferedReader(bz2.BZ2File(plain))
    if start.startswith(_XZ):
        return io.BufferedReader(lzma.LZMAFile(plain))
    if start.startswith(_ZSTD):
        return io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(cast(BinaryIO, plain), "zstd")))
    return plain


def _encoding(raw: io.BufferedReader, file: Path) -> str:
    start = raw.peek(_TAR_AT + len(_TAR))
    if start.startswith(_ZIP) or start[_TAR_AT:].startswith(_TAR):
        raise HRSError(f"{file} is an archive of files: unpack it and name the folder")
    return next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), "utf-8")


def _undecodable(file: Path, error: UnicodeDecodeError) -> str:
    """Return where a file is not what it should be: the error knows its place within a block only."""
    if error.encoding.startswith("utf-8"):
        position = 0
        with open_bytes(file) as raw:
            for number, line in enumerate(raw, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as found:
                    return f"{file} line {number} is not UTF-8 (byte {position + found.start})"
                position += len(line)
    return f"{file} is not {error.encoding.upper()} to its end"
