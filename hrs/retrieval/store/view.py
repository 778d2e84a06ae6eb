"""What one process knows of an engram store: the files of a manifest, and how far it has read the log."""

import logging
from dataclasses import dataclass
from pathlib import Path

from hrs.errors import HRSError
from hrs.retrieval.store.layout import (
    MANIFEST,
    Manifest,
    StoredFile,
    damaged,
    locked,
    map_batch,
    parse_manifest,
    read_transform,
    row_schema,
)
from hrs.retrieval.store.log import Frame, Kind, read
from hrs.retrieval.store.parts import Integers, Names, Part, Rows, Segment, Tail
from hrs.retrieval.store.transform import Transform

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The rows of a store at one moment, oldest first, and the transform that made their units."""

    parts: list[Rows]
    transform: Transform
    topics: Names
    sources: Names
    tag: str
    """First part of every id."""


class StoreView:
    """The rows of a store, kept up with what any process writes: only what is new is read.

    Not safe in several threads at once.

    Raises:
        HRSError: from every method, if a file is damaged or of a newer version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manifest_path = self.log_path = folder / MANIFEST
        self.topics, self.sources = Names(), Names()
        self._text = b""
        self._tag: str | None = None
        self._transform_file: StoredFile | None = None
        self.manifest: Manifest
        self.transform = Transform()
        self.segments: list[Segment] = []
        self.tail = Tail(0)
        self.log_end = 0
        """Bytes of the log that hold whole frames."""
        self.log_changes = 0
        """Rows added and deleted since the segments were made."""

    def refresh(self) -> None:
        """Read what is new, without the lock unless something looks wrong."""
        try:
            self._read()
        except (HRSError, OSError):  # it may have changed while it was read
            with locked(self.folder):
                self.refresh_for_writing()

    def _read(self) -> None:
        try:
            with self._manifest_path.open("rb") as file:
                text = file.read()
        except FileNotFoundError as error:
            raise damaged(self._manifest_path) from error
        if text != self._text:
            self._open(text)
        frames, end = read(self.log_path, self.log_end, row_schema(self.manifest.width))
        for frame in frames:
            self._apply(frame)
        self.log_end = end

    def refresh_for_writing(self) -> None:
        """Read what is new, as the one who holds the lock: what is wrong now is wrong for good."""
        try:
            self._read()
        except HRSError:
            self._text = b""  # what was read while another process wrote may be a mixture: read all of the log again
            self._read()

    @property
    def parts(self) -> list[Part]:
        return [*self.segments, self.tail]

    @property
    def n_alive(self) -> int:
        return sum(part.n_alive for part in self.parts)

    def snapshot(self) -> Snapshot:
        parts = [part.rows() for part in self.parts if part.n_rows]
        return Snapshot(parts, self.transform, self.topics, self.sources, self.manifest.tag)

    def find(self, numbers: Integers) -> dict[int, tuple[Part, int]]:
        """Part and row of each number that is not deleted."""
        found = {}
        for part in self.parts:
            rows = part.rows()
            for row in part.find(numbers):
                if rows.alive[row]:
                    found[int(rows.numbers[row])] = (part, int(row))
        return found

    def next_number(self) -> int:
        """That of the next memory."""
        if self.tail.n_rows:
            return int(self.tail.rows().numbers[-1]) + 1
        return self.manifest.next_number

    def _open(self, text: bytes) -> None:
        """Take over another manifest; segments that it still names stay as they are."""
        manifest = parse_manifest(text, self.folder)
        if self._tag not in (None, manifest.tag):
            raise HRSError(f"engram store {self.folder} was replaced by another one: open it again")
        kept = {segment.file: segment for segment in self.segments}
        segments = [kept.get(file) or self._segment(file) for file in manifest.segments]
        if manifest.transform != self._transform_file:
            self.transform = read_transform(self.folder, manifest)
        self.manifest, self.segments, self.tail = manifest, segments, Tail(manifest.width)
        self.log_path, self.log_end, self.log_changes = self.folder / manifest.log, 0, -manifest.carried
        self._text, self._tag, self._transform_file = text, manifest.tag, manifest.transform

    def _segment(self, file: StoredFile) -> Segment:
        return Segment(file, map_batch(self.folder, file), self.topics, self.sources)

    def _apply(self, frame: Frame) -> None:
        self.log_changes += frame.batch.num_rows
        if frame.kind == Kind.ADD:
            self.tail.extend(frame.batch, self.topics, self.sources)
        else:
            numbers = frame.batch.column("number").to_numpy()
            for part in self.parts:
                part.kill(numbers)

    def cut_log(self) -> None:
        """Drop the unfinished frame of a writer that died. Only with the lock."""
        path = self.log_path
        if (surplus := path.stat().st_size - self.log_end) > 0:
            _log.warning("%s ends in %d bytes of a record that was never finished: they are cut off", path, surplus)
            with path.open("r+b") as file:
                file.truncate(self.log_end)
