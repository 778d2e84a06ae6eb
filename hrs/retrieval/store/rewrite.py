"""Turning the log of an engram store into segments, and small or thinned-out segments into larger ones."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from hrs.errors import HRSError
from hrs.files import sync
from hrs.retrieval.store.layout import (
    MANIFEST,
    Manifest,
    StoredFile,
    damaged,
    holds_segments,
    locked,
    remove_leftovers,
    vector_column,
    vectors_of,
    write_batch,
    write_manifest,
    write_transform,
)
from hrs.retrieval.store.log import NUMBERS, Frame, Kind, append
from hrs.retrieval.store.parts import Integers, Segment
from hrs.retrieval.store.transform import Transform
from hrs.retrieval.store.view import StoreView

LARGEST_SEGMENT = 65536
"""Rows."""
_MOST_DEAD = 0.25
"""Share of deleted rows in a segment that is kept as it is."""
_Rows: TypeAlias = "Segment | pa.RecordBatch"


def create_store(folder: Path, manifest: Manifest) -> None:
    """Make an empty store, unless another process does so first.

    Raises:
        HRSError: if the folder cannot be written to, or holds memories whose manifest is lost.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HRSError(f"engram store {folder} cannot be made ({error}): give another folder") from error
    with locked(folder):
        if not (folder / MANIFEST).is_file():
            if holds_segments(folder):
                raise damaged(folder / MANIFEST)
            _write_log(folder, manifest, np.zeros(0, dtype=np.int64))
            write_manifest(folder, manifest)


def rewrite(
    view: StoreView,
    added: Sequence[pa.RecordBatch] = (),
    *,
    transform: Transform | None = None,
    most_dead: float = _MOST_DEAD,
) -> None:
    """Make segments of the log and of ``added``; all is on the disk and in ``view`` when this returns.

    Args:
        view: up to date, of the process that holds the lock.
        added: rows that come after all others.
        transform: makes the units of all rows anew.
        most_dead: share of deleted rows in a segment that is kept as it is.
    """
    folder, old = view.folder, view.manifest
    generation = old.generation + 1
    files: list[StoredFile] = []
    tombstones = [np.zeros(0, dtype=np.int64)]
    for group in _groups([*view.segments, *_pieces([*view.tail.live_batches(), *added])]):
        only = group[0]
        if len(group) == 1 and isinstance(only, Segment) and transform is None and _share_dead(only) <= most_dead:
            files.append(only.file)
            tombstones.append(only.dead_numbers())
        else:
            path = folder / f"segment-{generation:08d}-{len(files)}.arrow"
            files.append(write_batch(path, _joined(group, transform)))
    carried = np.concatenate(tombstones)
    manifest = dataclasses.replace(
        old,
        generation=generation,
        carried=len(carried),
        next_number=view.next_number() + sum(batch.num_rows for batch in added),
        segments=tuple(files),
    )
    if transform is not None:
        file = write_transform(folder / f"transform-{generation:08d}.arrow", transform)
        manifest = dataclasses.replace(manifest, transform=file, transform_version=transform.version)
    _write_log(folder, manifest, carried)
    write_manifest(folder, manifest)
    remove_leftovers(folder, manifest)
    view.refresh_for_writing()


def _groups(items: Sequence[_Rows]) -> list[list[_Rows]]:
    """Neighbours to be merged. A segment joins a right neighbour that is not smaller: so each row is written a bounded
    number of times, log2 of the rows of the largest segment over those of a full log, and few segments are left."""
    groups: list[list[_Rows]] = []
    for item in items:
        if not _n_alive(item):
            continue
        groups.append([item])
        while len(groups) > 1:
            left, right = (sum(map(_n_alive, group)) for group in groups[-2:])
            if left > right or left + right > LARGEST_SEGMENT:
                break
            groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def _n_alive(item: _Rows) -> int:
    return item.n_alive if isinstance(item, Segment) else item.num_rows


def _share_dead(segment: Segment) -> float:
    return segment.n_dead / segment.n_rows


def _pieces(batches: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """The same rows in batches as large as segments may be."""
    batches = [batch for batch in batches if batch.num_rows]
    if not batches:
        return []
    table = pa.Table.from_batches(batches)
    starts = range(0, table.num_rows, LARGEST_SEGMENT)
    return [pa.concat_batches(table.slice(start, LARGEST_SEGMENT).to_batches()) for start in starts]


def _joined(group: Sequence[_Rows], transform: Transform | None) -> pa.RecordBatch:
    """All live rows of a group as one batch, with units of the transform if there is one."""
    batches = [batch for item in group for batch in (item.live_batches() if isinstance(item, Segment) else [item])]
    joined = batches[0] if len(batches) == 1 else pa.concat_batches(batches)
    return joined if transform is None else with_units(joined, transform)


def with_units(batch: pa.RecordBatch, transform: Transform) -> pa.RecordBatch:
    """The batch with ``unit`` and ``norm`` as the transform makes them of ``key``."""
    units, norms = transform.directions(vectors_of(batch, "key"))
    names = batch.schema.names
    batch = batch.set_column(names.index("norm"), batch.schema.field("norm"), pa.array(norms))
    unit = vector_column(units.astype(np.float32))
    return batch.set_column(names.index("unit"), batch.schema.field("unit"), unit)


def _write_log(folder: Path, manifest: Manifest, tombstones: Integers) -> None:
    """A new log; it begins with the deletions that the segments do not know of."""
    path = folder / manifest.log
    path.write_bytes(b"")
    if len(tombstones):
        append(path, Frame(Kind.DELETE, pa.record_batch([pa.array(tombstones)], schema=NUMBERS)))
    else:
        sync(path)
