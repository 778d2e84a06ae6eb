"""Filling an engram store from a corpus: read every segment, keep those the model was unsure of, add what is missing.

What was read is kept in files beside the store, a piece at a time, and what was added is in the store: a job that ends
at any moment goes on from there, and one that ran to its end adds nothing when it runs again.
"""

import dataclasses
import hashlib
import io
import logging
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from hrs import strict_json
from hrs.data.store import TokenStore
from hrs.errors import HRSError
from hrs.files import write_whole
from hrs.identity import code_fingerprint
from hrs.models.base import LanguageModel
from hrs.retrieval.engrams import model_fingerprint
from hrs.retrieval.segments import Cut, Segment, cut_split, read_segments
from hrs.retrieval.store import EngramStore, NewMemory, Normalisation

_log = logging.getLogger(__name__)

SEGMENTS_PER_PIECE = 256
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_WHOLE = "whole.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Population:
    """What a store is filled with."""

    cut: Cut
    split: str = "train"
    keep_above: float = 0.0
    """Quantile of the segments' entropies: only those above it are kept. 0 keeps all. A number of bits would mean
    another share of the text for every model."""

    def __post_init__(self) -> None:
        if not 0 <= self.keep_above < 1:
            raise HRSError(f"keep_above must be a quantile from 0 up to 1, got {self.keep_above}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Filled:
    """How far a population is. Entropies are bits per token."""

    stage: str
    """``reading``, ``adding`` or ``done``."""
    done: int
    total: int
    """Segments of this stage."""
    n_segments: int
    n_kept: int = 0
    """Above the threshold; known once all are read."""
    n_added: int = 0
    """In this call."""
    n_in_store: int = 0
    threshold_bits: float | None = None
    """None if all are kept."""
    mean_bits: float = 0.0
    quantiles_bits: tuple[float, ...] = ()
    """At :data:`QUANTILES`."""


def populate(
    model: LanguageModel, tokens: TokenStore, population: Population, memories: EngramStore, readings: Path
) -> Iterator[Filled]:
    """Fill ``memories`` with segments of a split; yields as it goes, ends after ``done``.

    A memory that is in the store with the same text and source is not added again. Raising ``keep_above`` later takes
    nothing away. When something was added, a store that normalises keys is fitted to all it holds.

    Args:
        model: in evaluation mode, on any device.
        memories: of this model; its block is that of the keys.
        readings: a folder for what was read, which later calls use.

    Raises:
        HRSError: if the store belongs to another model, or segments do not fit into the model's context.
    """
    fingerprint = model_fingerprint(model)
    if memories.fingerprint != fingerprint:
        raise HRSError(
            f"the engram store belongs to model {memories.fingerprint} and this is {fingerprint}: keys of two models "
            "do not compare, so fill another store"
        )
    population.cut.require_fit(model)
    segments = cut_split(tokens, population.split, population.cut)
    n, folder = len(segments), readings / _reading_key(population, memories, tokens)
    keys, bits = [], []
    for start in range(0, n, SEGMENTS_PER_PIECE):
        piece = _read_piece(
            folder / f"{start:08d}.npz", model, segments[start : start + SEGMENTS_PER_PIECE], memories.block
        )
        keys.append(piece[0])
        bits.append(piece[1])
        yield Filled(stage="reading", done=min(start + SEGMENTS_PER_PIECE, n), total=n, n_segments=n)
    all_keys, all_bits = np.concatenate(keys), np.concatenate(bits)
    threshold = float(np.quantile(all_bits, population.keep_above)) if population.keep_above > 0 else None
    kept = np.arange(n) if threshold is None else np.flatnonzero(all_bits > threshold)
    state = Filled(
        stage="adding",
        done=0,
        total=len(kept),
        n_segments=n,
        n_kept=len(kept),
        threshold_bits=threshold,
        mean_bits=float(all_bits.mean()),
        quantiles_bits=tuple(np.quantile(all_bits, QUANTILES).tolist()),
    )
    there = Counter((memory.source, memory.text) for memory in memories.list())
    added = 0
    for start in range(0, len(kept), SEGMENTS_PER_PIECE):
        rows = kept[start : start + SEGMENTS_PER_PIECE]
        new, new_rows = [], []
        texts = tokens.tokenizer.decode_batch([segments[row].ids.tolist() for row in rows])
        for row, text in zip(rows, texts, strict=True):
            segment = segments[row]
            if there[segment.source, text]:  # one memory for one segment, also where a document repeats itself
                there[segment.source, text] -= 1
                continue
            entropy = float(all_bits[row])
            new.append(NewMemory(text=text, entropy=entropy, source=segment.source, topic=segment.topic))
            new_rows.append(row)
        if new:
            memories.add(new, all_keys[new_rows])
            added += len(new)
        yield dataclasses.replace(state, done=start + len(rows), n_added=added, n_in_store=len(memories))
    if added and memories.normalisation != "none":
        memories.fit()
    yield dataclasses.replace(state, stage="done", done=len(kept), n_added=added, n_in_store=len(memories))


def populated_once(
    model: LanguageModel,
    tokens: TokenStore,
    population: Population,
    root: Path,
    *,
    normalisation: Normalisation = "centred",
    block: int | None = None,
) -> Generator[Filled, None, EngramStore]:
    """A store that holds exactly one population, in a folder below ``root`` named by all that its content follows
    from. Yields as :func:`populate` does if there is something to fill, and returns the store. Of many processes at
    once one fills it and the others wait.

    Raises:
        HRSError: see :func:`populate`.
    """
    fingerprint = model_fingerprint(model)
    content = {
        "population": dataclasses.asdict(population),
        "model": fingerprint,
        "data": tokens.fingerprint,
        "normalisation": normalisation,
        "block": block,
        "code": code_fingerprint(Path(__file__).parent.rglob("*.py")),
    }
    folder = root / hashlib.sha256(strict_json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        store = EngramStore.open(
            folder, fingerprint=fingerprint, width=model.d_model, normalisation=normalisation, block=block
        )
        if not (folder / _WHOLE).exists():
            yield from populate(model, tokens, population, store, folder / "readings")
            shutil.rmtree(folder / "readings")
            write_whole(folder / _WHOLE, strict_json.dumps(content, indent=1))
    return store


def _reading_key(population: Population, memories: EngramStore, tokens: TokenStore) -> str:
    """Names what is read: everything but which segments are kept."""
    content = {
        "cut": dataclasses.asdict(population.cut),
        "split": population.split,
        "model": memories.fingerprint,
        "block": memories.block,
        "data": tokens.fingerprint,
    }
    return hashlib.sha256(strict_json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _read_piece(
    path: Path, model: LanguageModel, segments: list[Segment], block: int | None
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Keys [n, d] and entropies [n], from the file if it is there; a damaged one is read again and replaced."""
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                return file["keys"], file["bits"]
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            _log.warning("%s is damaged and is read again (%s)", path, error)
    keys, bits = read_segments(model, segments, block=block)
    content = io.BytesIO()
    np.savez(content, keys=keys, bits=bits)
    write_whole(path, content.getvalue())
    return keys, bits
