"""A store of engrams: texts with the mean hidden state a model had while it read them, found again by cosine.

    store = EngramStore.open(folder, fingerprint=model_fingerprint(model), width=model.d_model)
    store.add([NewMemory(text, source="wiki")], engrams(model, [ids]))
    (hits,) = store.search(engrams(model, [question]), k=5)

Any number of threads and processes may use one folder at once. One writes at a time, behind a file lock; readers need
no lock and see what others wrote at their next call. What was acknowledged survives a crash of the writer.
"""

import secrets
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from hrs.errors import HRSError
from hrs.retrieval.store.exact import Shortlist
from hrs.retrieval.store.inverted import InvertedLists, import_faiss
from hrs.retrieval.store.layout import MANIFEST, Manifest, locked, vectors_of
from hrs.retrieval.store.log import NUMBERS, Frame, Kind, append
from hrs.retrieval.store.parts import Integers, Mask, Memory, NewMemory, Rows, Vectors
from hrs.retrieval.store.records import as_batches, as_id, as_vectors, number_of
from hrs.retrieval.store.rewrite import create_store, rewrite
from hrs.retrieval.store.search import Filter, Hit, nearest
from hrs.retrieval.store.transform import Normalisation, fit_transform
from hrs.retrieval.store.view import Snapshot, StoreView

__all__ = ["EngramStore", "Hit", "Memory", "NewMemory"]

Memories = list[Memory]
Hits = list[list[Hit]]


class EngramStore:
    """Memories in one folder; made by :meth:`open`.

    Every method raises HRSError if a file of the store is damaged, or another process holds the lock for a minute.

    Attributes:
        path: the folder.
        fingerprint: names the model whose engrams the keys are.
        width: d, numbers in a key.
        block: whose output the engrams are means of.
        normalisation: what is done to keys before they are compared, see :mod:`hrs.retrieval.store.transform`.
    """

    def __init__(self, view: StoreView, *, segment_rows: int, faiss_above: int | None) -> None:
        manifest = view.manifest
        self.path = view.folder
        self.fingerprint, self.width, self.block = manifest.fingerprint, manifest.width, manifest.block
        self.normalisation: Normalisation = manifest.normalisation
        self._view, self._tag, self._segment_rows, self._faiss_above = view, manifest.tag, segment_rows, faiss_above
        self._lists: InvertedLists | None = None
        self._threads = threading.RLock()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        fingerprint: str,
        width: int,
        normalisation: Normalisation = "none",
        block: int | None = None,
        create: bool = True,
        fit_at: int = 1024,
        segment_rows: int = 8192,
        faiss_above: int | None = None,
    ) -> "EngramStore":
        """The store in a folder.

        Args:
            path: the folder. Other files may lie in it.
            fingerprint: of the model, see :func:`hrs.retrieval.engrams.model_fingerprint`.
            width: numbers in a key.
            normalisation: what is done to keys before they are compared. Until the first fit, nothing.
            block: as :func:`hrs.retrieval.engrams.engrams` was given it.
            create: make an empty store if there is none.
            fit_at: of a new store, the number of memories at which ``centred`` or ``whitened`` is fitted by itself.
                Later fits are asked for: :meth:`fit`.
            segment_rows: rows added and deleted that the log takes before they become a segment.
            faiss_above: segment rows above which FAISS's inverted lists search them: faster and approximate. None for
                exact search at any size.

        Raises:
            HRSError: if there is no store and ``create`` is False, the store is of another model, width, block or
                normalisation, is damaged or of a newer format, or FAISS is asked for and not installed.
        """
        path = Path(path).absolute()
        for name, value in (("width", width), ("fit_at", fit_at), ("segment_rows", segment_rows)):
            if value < 1:
                raise HRSError(f"{name} must be 1 or more, got {value}")
        if faiss_above is not None:
            import_faiss()
        asked = Manifest(
            tag=secrets.token_hex(4),
            fingerprint=fingerprint,
            width=width,
            block=block,
            normalisation=normalisation,
            fit_at=fit_at,
        )
        if not (path / MANIFEST).is_file():
            if not create:
                raise HRSError(f"there is no engram store at {path}: check the path, or fill a store first")
            create_store(path, asked)
        view = StoreView(path)
        view.refresh()
        for name in ("fingerprint", "width", "block", "normalisation"):
            has, wanted = getattr(view.manifest, name), getattr(asked, name)
            if has != wanted:
                raise HRSError(
                    f"engram store {path} holds keys of {name} {has} and {wanted} is asked for: keys of both do not "
                    "compare, so use another folder"
                )
        return cls(view, segment_rows=segment_rows, faiss_above=faiss_above)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """See what other processes wrote; reads only what is new. All other methods do so by themselves."""
        with self._threads:
            self._view.refresh()

    def __len__(self) -> int:
        with self._threads:
            self.refresh()
            return self._view.n_alive

    @property
    def transform_version(self) -> int:
        """How often the transform of keys was fitted. Similarities of two versions do not compare."""
        return self._snapshot().transform.version

    def get(self, ids: Sequence[str]) -> Memories:
        """The memories with these ids, in this order; those that are unknown or deleted are left out."""
        numbers = self._numbers(ids)
        with self._threads:
            self.refresh()
            found = self._view.find(np.unique(numbers))
        places = [found[number] for number in numbers.tolist() if number in found]
        return [part.memory(row, self._tag) for part, row in places]

    def list(
        self,
        *,
        topic: str | None = None,
        source: str | None = None,
        since: float | None = None,
        until: float | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> Memories:
        """Memories, the oldest first.

        Args:
            topic: only this one.
            source: only this one.
            since: only those created at this Unix time in seconds or later.
            until: only those created before this time.
            limit: at most so many, after the first ``offset``.
            offset: how many to leave out at the front.

        Raises:
            HRSError: for a negative limit or offset.
        """
        if offset < 0 or (limit is not None and limit < 0):
            raise HRSError(f"limit and offset must be 0 or more, got {limit} and {offset}")
        snapshot = self._snapshot()
        chosen = Filter(
            topics=None if topic is None else [topic],
            sources=None if source is None else [source],
            since=since,
            until=until,
        )
        memories: Memories = []
        for part in snapshot.parts:
            rows = np.flatnonzero(chosen.mask(part, snapshot))
            skipped = min(offset, len(rows))
            offset -= skipped
            end = None if limit is None else skipped + limit - len(memories)
            memories += [part.part.memory(int(row), snapshot.tag) for row in rows[skipped:end]]
        return memories

    def count(self, *, topic: str | None = None, source: str | None = None) -> int:
        """Return how many memories there are, of one topic and of one source if they are given."""
        snapshot = self._snapshot()
        chosen = Filter(topics=None if topic is None else [topic], sources=None if source is None else [source])
        return sum(int(np.count_nonzero(chosen.mask(part, snapshot))) for part in snapshot.parts)

    def search(
        self,
        queries: ArrayLike,
        k: int,
        *,
        min_similarity: float = -1.0,
        topics: Collection[str] | None = None,
        sources: Collection[str] | None = None,
        exclude_sources: Collection[str] | None = None,
        exclude_topics: Collection[str] | None = None,
    ) -> Hits:
        """The k memories nearest to each query, by the cosine of transformed keys; exact unless FAISS searches.

        Best first, the older one of two that are equally near. A key without a direction (all zero, or the mean itself)
        is never found, and a query without one finds nothing.

        Args:
            queries: [Q, d]
            k: at most so many for each.
            min_similarity: only those at least as near.
            topics: only these. Memories without a topic are in none.
            sources: only these.
            exclude_sources: none of these.
            exclude_topics: none of these.

        Raises:
            HRSError: for queries of another width or not finite, or k below 1.
        """
        if k < 1:
            raise HRSError(f"k must be 1 or more, got {k}")
        chosen = Filter(topics=topics, sources=sources, exclude_topics=exclude_topics, exclude_sources=exclude_sources)
        vectors = as_vectors(queries, self.width, "queries")
        snapshot = self._snapshot()

        def propose(parts: Sequence[Rows], shortlist: Shortlist, units: Vectors, allowed: Sequence[Mask | None]) -> int:
            segments = [part for part in parts if not part.is_tail]
            if self._faiss_above is None or sum(map(len, segments)) <= self._faiss_above:
                return 0
            with self._threads:
                self._lists = self._lists or InvertedLists()
                self._lists.update(segments, snapshot.transform)
                self._lists.propose(shortlist, segments, units, k, allowed[: len(segments)])
            return len(segments)

        return nearest(snapshot, vectors, k, chosen, min_similarity, propose)

    def _snapshot(self) -> Snapshot:
        with self._threads:
            self.refresh()
            return self._view.snapshot()

    # ---- writing -----------------------------------------------------------------------------------------------------

    def add(self, memories: Sequence[NewMemory], keys: ArrayLike) -> Memories:
        """Remember texts with their keys [n, d]. All are on the disk when this returns; after a crash, all or none.

        Raises:
            HRSError: if there are not as many keys as memories, they have another width or are not finite in float32, a
                text is not Unicode, an entropy not finite, or the disk refuses.
        """
        vectors = as_vectors(keys, self.width, "keys")
        if len(vectors) != len(memories):
            raise HRSError(f"{len(memories)} memories came with {len(vectors)} keys: give one key for each")
        if not memories:
            return []
        with self._writing() as view:
            first, created = view.next_number(), time.time()
            batches = as_batches(memories, vectors, view.transform, first=first, created=created)
            if view.log_changes + len(memories) > self._segment_rows:
                rewrite(view, batches)
            else:
                self._append(view, Frame(Kind.ADD, batches[0]))
            due = self.normalisation != "none" and view.transform.version == 0
            if due and view.n_alive >= view.manifest.fit_at:
                self._fit(view)
        return [
            Memory(as_id(self._tag, first + i), m.text, m.entropy, m.source, m.topic, created)
            for i, m in enumerate(memories)
        ]

    def delete(self, ids: Sequence[str]) -> int:
        """Forget memories; returns how many there were. None of them is found when this returns.

        Their texts and keys leave the disk with a later rewrite, at the latest with :meth:`compact`.
        """
        numbers = np.unique(self._numbers(ids))
        with self._writing() as view:
            found = np.array(sorted(view.find(numbers)), dtype=np.int64)
            if len(found):
                self._append(view, Frame(Kind.DELETE, pa.record_batch([pa.array(found)], schema=NUMBERS)))
                if view.log_changes > self._segment_rows:
                    rewrite(view)
        return len(found)

    def compact(self) -> None:
        """Write anew what holds deleted memories: nothing of them is left in the store's files."""
        with self._writing() as view:
            rewrite(view, most_dead=0.0)

    def fit(self) -> int:
        """Fit the transform on all keys there are, and transform them with it; returns its version.

        Keys added later are transformed with it too. Takes time in proportion to the store.

        Raises:
            HRSError: if the store compares keys as they are, or has none.
        """
        with self._writing() as view:
            self._fit(view)
            return view.transform.version

    def _fit(self, view: StoreView) -> None:
        if self.normalisation == "none":
            raise HRSError(
                f"engram store {self.path} compares keys as they are, so nothing can be fitted: fill another one with "
                "normalisation centred or whitened"
            )
        if not view.n_alive:
            raise HRSError(f"engram store {self.path} is empty, so nothing can be fitted: add memories first")

        def keys() -> Iterator[Vectors]:
            return (vectors_of(batch, "key") for part in view.parts for batch in part.live_batches())

        rewrite(view, transform=fit_transform(keys, self.normalisation, view.transform.version + 1))

    def _append(self, view: StoreView, frame: Frame) -> None:
        append(view.log_path, frame)
        view.refresh_for_writing()

    @contextmanager
    def _writing(self) -> Iterator[StoreView]:
        """The view, up to date, while no other thread or process writes."""
        with self._threads, locked(self.path):
            self._view.refresh_for_writing()
            self._view.cut_log()
            yield self._view

    def _numbers(self, ids: Sequence[str]) -> Integers:
        """[n], the numbers in those ids that are of this store."""
        if isinstance(ids, str):
            raise HRSError(f"ids takes a list of ids and '{ids}' is an id: put it into a list")
        numbers = [number_of(id, self._tag) for id in ids]
        return np.array([number for number in numbers if number is not None], dtype=np.int64)
