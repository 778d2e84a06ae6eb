"""Topics in a file that several replicas read and change."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import filelock

from hrs.errors import HRSError
from hrs.files import sync
from hrs.retrieval.topics import TopicContexts, TopicInfo
from hrs.retrieval.topics.stress_result import Thresholds
from serve.errors import storing

T = TypeVar("T")


class SharedTopics:
    """One :class:`TopicContexts` below a folder; every change is on the disk, for all, when it returns.

    Args:
        max_topics: what :meth:`TopicContexts.forget` keeps after each change: every change writes all there is.
        thresholds: that the model was fitted with. Topics that were made with others do not compare: the first change
            sets them aside, as ``topics.old.json``, and begins anew. None keeps whatever there is.
    """

    def __init__(self, folder: Path, width: int, max_topics: int = 256, thresholds: Thresholds | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "topics.json"
        self._lock = filelock.FileLock(folder / "topics.lock")
        self._threads = threading.RLock()
        self._max_topics = max_topics
        self._thresholds = thresholds
        self._width, self._superseded = width, False
        self._topics = self._none()
        self._state: tuple[int, int, int] | None = None

    def _none(self) -> TopicContexts:
        """Return topics of which there are none yet."""
        return TopicContexts(self._width, **({} if self._thresholds is None else asdict(self._thresholds)))

    def read(self) -> list[TopicInfo]:
        """All topics as they are now, the most recent first."""
        with self._threads:
            return self._current().topics()

    def change(self, how: Callable[[TopicContexts], T]) -> T:
        """Apply ``how``, alone among all replicas and threads. If it raises, nothing has changed."""
        with self._threads, self._locked():
            topics = self._current()
            self._topics, self._state = self._none(), None  # what ``how`` leaves half done is not kept
            result = how(topics)
            topics.forget(self._max_topics)
            with storing():
                if self._superseded:
                    self._path.replace(self._path.with_suffix(".old.json"))
                    self._superseded = False
                part = self._path.with_suffix(".part")
                part.write_text(topics.to_json(), encoding="utf-8")
                sync(part)
                part.replace(self._path)
                sync(self._path.parent)
            return result

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with storing():
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _current(self) -> TopicContexts:
        with storing():
            try:
                stat = self._path.stat()
            except FileNotFoundError:
                return self._topics
            # A file that replaces another has an inode of its own, so no change within one tick of the clock is missed.
            state = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if state != self._state:
                try:
                    self._topics = self._parsed(self._path.read_text(encoding="utf-8"))
                except (HRSError, ValueError) as error:
                    raise HRSError(
                        f"topics {self._path} cannot be read ({error}): put back a copy, or delete them"
                    ) from error
                self._state = state
            return self._topics

    def _parsed(self, text: str) -> TopicContexts:
        topics = TopicContexts.from_json(text)
        if topics.width != self._width:
            raise HRSError(f"they are of width {topics.width} and the model has {self._width}")
        wanted = self._thresholds
        self._superseded = wanted is not None and (topics.join, topics.merge) != (wanted.join, wanted.merge)
        return topics.restarted(wanted.join, wanted.merge) if wanted is not None and self._superseded else topics
