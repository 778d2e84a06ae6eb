"""What an engram store is on the disk.

manifest.json         names every other file that counts; replaced as a whole, so that it is the old one or the new one
segment-G-I.arrow     memories and keys that no longer change: Arrow IPC files of one record batch, oldest rows first
transform-G.arrow     mean and matrix of a fitted transform
log-G.bin             what was added and deleted since the segments were made (:mod:`hrs.retrieval.store.log`)
store.lock            held by whoever writes

G is the manifest's generation, one more with every rewrite.
"""

import contextlib
import functools
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hrs import strict_json
from hrs.errors import HRSError
from hrs.files import sync
from hrs.retrieval.store.transform import Normalisation, Transform

FORMAT = 1
MANIFEST = "manifest.json"
LOCK = "store.lock"
_LOCK_SECONDS = 60
_OURS = re.compile(r"(segment|transform|log)-\d{8}(-\d+)?\.(arrow|bin)|manifest\.json\.new")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that the manifest vouches for."""

    name: str
    rows: int
    size: int
    """Bytes."""
    crc32: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a store is, and which files it consists of."""

    tag: str
    """8 hex digits, drawn at creation: the first part of every id."""
    fingerprint: str
    width: int
    block: int | None
    normalisation: Normalisation
    fit_at: int
    generation: int = 0
    next_number: int = 0
    """Number of the first memory that the log adds."""
    carried: int = 0
    """Deletions at the front of the log, of rows that the segments still hold."""
    transform_version: int = 0
    transform: StoredFile | None = None
    segments: tuple[StoredFile, ...] = ()

    @property
    def log(self) -> str:
        return f"log-{self.generation:08d}.bin"

    def to_json(self) -> str:
        content = asdict(self)
        return strict_json.dumps({"format": FORMAT, "crc32": _checksum(content), "store": content}, indent=1)


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(strict_json.dumps(content, sort_keys=True).encode())


def parse_manifest(text: bytes, folder: Path) -> Manifest:
    """The manifest in the text of ``manifest.json``.

    Raises:
        HRSError: if a newer version wrote it, or it is damaged.
    """
    try:
        written = json.loads(text)
        if isinstance(written["format"], int) and written["format"] > FORMAT:
            raise HRSError(
                f"engram store {folder} has format {written['format']} and this version of hrs reads up to {FORMAT}: "
                "update hrs"
            )
        content = written["store"]
        if written["format"] != FORMAT or written["crc32"] != _checksum(content):
            raise ValueError("wrong checksum")
        transform = content["transform"]
        return Manifest(
            **content
            | {
                "segments": tuple(StoredFile(**entry) for entry in content["segments"]),
                "transform": None if transform is None else StoredFile(**transform),
            }
        )
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder / MANIFEST) from error


def damaged(path: Path) -> HRSError:
    """The error for a file that is not what was written, or not there."""
    return HRSError(
        f"engram store {path.parent} has a damaged or missing file {path.name}: put back a copy of the folder, or "
        "delete the folder and fill the store again"
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While this thread alone may write to the store in a folder.

    Raises:
        HRSError: if another holds the lock for a minute, or the disk refuses something meanwhile.
    """
    try:
        with filelock.FileLock(folder / LOCK, timeout=_LOCK_SECONDS):
            yield
    except filelock.Timeout as error:
        raise HRSError(
            f"another process has been writing to engram store {folder} for {_LOCK_SECONDS} seconds: try again, or end "
            "it if it hangs"
        ) from error
    except OSError as error:
        raise HRSError(
            f"engram store {folder} cannot be used ({error}): is the disk full, or the folder not writable?"
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest: all that it names is on the disk already, and so is it when this returns."""
    sync(folder)
    new = folder / f"{MANIFEST}.new"
    with new.open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / MANIFEST)
    sync(folder)


def holds_segments(folder: Path) -> bool:
    """Whether memories lie in a folder, if no manifest is there to say so."""
    return any(_OURS.fullmatch(path.name) for path in folder.glob("segment-*"))


def remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Delete what no longer counts. A process that still maps a deleted file keeps what it has."""
    named = {manifest.log, *(entry.name for entry in manifest.segments)}
    if manifest.transform is not None:
        named.add(manifest.transform.name)
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)


# ---- record batches --------------------------------------------------------------------------------------------------


@functools.cache
def row_schema(width: int) -> pa.Schema:
    """Columns of memories: ``key`` is the key as it was given, ``unit`` the direction of the transformed key and
    ``norm`` its length, 0 for no direction."""
    vector = pa.list_(pa.float32(), width)
    return pa.schema(
        [
            pa.field("number", pa.int64(), nullable=False),
            pa.field("created", pa.float64(), nullable=False),
            pa.field("text", pa.large_string(), nullable=False),
            pa.field("entropy", pa.float64()),
            pa.field("source", pa.large_string(), nullable=False),
            pa.field("topic", pa.large_string()),
            pa.field("norm", pa.float64(), nullable=False),
            pa.field("key", vector, nullable=False),
            pa.field("unit", vector, nullable=False),
        ]
    )


def vector_column(vectors: NDArray[Any]) -> pa.FixedSizeListArray:
    """[n, d] as an Arrow column."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))  # [n d]
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def vectors_of(batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    """[n, d], a view of an Arrow column of vectors."""
    column = batch.column(name)
    flat: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), column.type.list_size)


def write_batch(path: Path, batch: pa.RecordBatch) -> StoredFile:
    """Write a record batch as an Arrow IPC file; it is on the disk when this returns."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    sync(path)
    content = pa.memory_map(str(path)).read_buffer()
    return StoredFile(path.name, batch.num_rows, len(content), zlib.crc32(memoryview(content)))


def map_batch(folder: Path, entry: StoredFile) -> pa.RecordBatch:
    """The record batch of a file, memory-mapped, after its checksum was verified.

    Raises:
        HRSError: if it is damaged, or not there.
    """
    path = folder / entry.name
    try:
        source = pa.memory_map(str(path))
        content = source.read_buffer()
        if len(content) != entry.size or zlib.crc32(memoryview(content)) != entry.crc32:
            raise damaged(path)
        return pa.ipc.open_file(content).get_batch(0)
    except (pa.ArrowException, ValueError, FileNotFoundError) as error:
        raise damaged(path) from error


def write_transform(path: Path, transform: Transform) -> StoredFile:
    """Write a fitted transform; it is on the disk when this returns."""
    assert transform.mean is not None
    columns = {"mean": pa.array(transform.mean)}
    if transform.matrix is not None:
        columns["matrix"] = vector_column(transform.matrix)
    return write_batch(path, pa.record_batch(columns))


def read_transform(folder: Path, manifest: Manifest) -> Transform:
    """The transform that the manifest names, or that of keys as they are.

    Raises:
        HRSError: as :func:`map_batch`.
    """
    if manifest.transform is None:
        return Transform()
    batch = map_batch(folder, manifest.transform)
    matrix = vectors_of(batch, "matrix") if "matrix" in batch.schema.names else None
    return Transform(manifest.transform_version, batch.column("mean").to_numpy(), matrix)
