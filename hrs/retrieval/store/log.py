"""The log of an engram store: what was added and deleted, one checked frame after the other.

    bytes 0-3     magic; its first byte occurs in no text
    bytes 4-7     kind: 0 adds memories, 1 deletes them by number
    bytes 8-15    length of the payload, little-endian, a multiple of 8
    bytes 16-19   CRC-32 of bytes 0-15 and of the payload
    bytes 20-23   zero
    payload       an Arrow record batch message

A frame is written with one append and synced before it is acknowledged. So a process that dies while it writes leaves
at most one frame that is not whole, at the end, which never counted; the next writer cuts it off. Anything else that is
not a frame is damage.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import pyarrow as pa

from hrs.retrieval.store.layout import damaged

_MAGIC = b"\x89ENG"
_HEADER = struct.Struct("<4sIQII")
_CHECKED = 16
"""Bytes of the header that the checksum covers."""
NUMBERS = pa.schema([pa.field("number", pa.int64(), nullable=False)])
"""Payload of a deletion."""


class Kind(IntEnum):
    ADD = 0
    DELETE = 1


@dataclass(frozen=True, slots=True)
class Frame:
    """One entry of the log."""

    kind: Kind
    batch: pa.RecordBatch


def encode(frame: Frame) -> bytes:
    """A frame as it stands in the file."""
    payload = frame.batch.serialize().to_pybytes()
    payload += bytes(-len(payload) % 8)
    head = _HEADER.pack(_MAGIC, frame.kind, len(payload), 0, 0)[:_CHECKED]
    checksum = zlib.crc32(payload, zlib.crc32(head))
    return _HEADER.pack(_MAGIC, frame.kind, len(payload), checksum, 0) + payload


def append(path: Path, frame: Frame) -> int:
    """Add a frame to the log and sync it; returns the file's length in bytes.

    Raises:
        OSError: if the disk refuses. What was written of the frame is cut off again.
    """
    content = encode(frame)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        start = os.fstat(descriptor).st_size
        left = memoryview(content)
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            os.ftruncate(descriptor, start)  # not whole yet, so nobody has read it
            raise
        os.fsync(descriptor)
        return start + len(content)
    finally:
        os.close(descriptor)


def read(path: Path, start: int, row_schema: pa.Schema) -> tuple[list[Frame], int]:
    """All whole frames from byte ``start`` on, and where the last one ends; an unfinished frame after it is left out.

    Raises:
        HRSError: if there is no log, it is shorter than ``start``, or something else than frames stands between frames.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == start:
                return [], start
            if size < start:
                raise damaged(path)
            file.seek(start)
            content = pa.py_buffer(file.read(size - start))
    except FileNotFoundError as error:
        raise damaged(path) from error
    frames, end = [], 0
    try:
        for kind, payload, after in _whole(content):
            schema = row_schema if kind == Kind.ADD else NUMBERS
            frames.append(Frame(kind, pa.ipc.read_record_batch(payload, schema)))
            end = after
    except (pa.ArrowException, ValueError) as error:
        raise damaged(path) from error
    if _holds_frame(content, end):
        raise damaged(path)
    return frames, start + end


def _whole(content: pa.Buffer) -> Iterator[tuple[Kind, pa.Buffer, int]]:
    """Kind, payload and end of every frame up to the first that is not whole."""
    position = 0
    while (frame := _frame_at(content, position)) is not None:
        yield frame
        position = frame[2]


def _frame_at(content: pa.Buffer, position: int) -> tuple[Kind, pa.Buffer, int] | None:
    begin = position + _HEADER.size
    if begin > len(content):
        return None
    view = memoryview(content)
    magic, kind, length, checksum, zero = _HEADER.unpack_from(view, position)
    if magic != _MAGIC or zero or kind not in list(Kind) or begin + length > len(content):
        return None
    payload = view[begin : begin + length]
    if zlib.crc32(payload, zlib.crc32(view[position : position + _CHECKED])) != checksum:
        return None
    return Kind(kind), content.slice(begin, length), begin + length


def _holds_frame(content: pa.Buffer, start: int) -> bool:
    """Whether a whole frame stands anywhere after ``start``."""
    text = content.slice(start).to_pybytes()
    position = text.find(_MAGIC, 1)
    while position >= 0:
        if _frame_at(pa.py_buffer(text), position) is not None:
            return True
        position = text.find(_MAGIC, position + 1)
    return False
