"""Memories of windows: chunks of other training documents, found with the engram of the text in front of a window.

    bank = open_bank(config, store, base_directory, root)
    memory = bank.read("validation", starts)                    # [B, S, d], see hrs.models.base.WindowContext
    train(experiment, store, directory, memories=bank)

The query of a window is the last whole chunk of its document that ends in front of it, with those before it, so no
token of the window has a say in what it is given (Borgeaud et al. 2022 query with the chunk before, too). Neighbours
are the nearest chunks of the training text by cosine of their keys, exactly, one of each document; never one of a
document that the window touches. What a neighbour gives are its own slots and those of the chunk that follows it.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hrs.config import ExperimentConfig, RetrievalConfig, canonical_json
from hrs.data import TokenStore
from hrs.data.documents import SPLITS
from hrs.errors import HRSError
from hrs.files import built_once, read_manifest, whole_folder, write_manifest
from hrs.models import LanguageModel
from hrs.retrieval.bank.base import base_of, slots_per_chunk
from hrs.retrieval.bank.chunks import Chunks, cut, encode_chunks
from hrs.retrieval.bank.keys import engram_similarities, nearest, word_similarities

_log = logging.getLogger(__name__)

MANIFEST = "bank.json"
SPARE = 4
"""Neighbours that are known beyond those that are read: a window may lie in documents that some of them come from."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MemoryBank:
    """The memories of all windows of a token store; :class:`hrs.training.retrieval.TrainingMemories`."""

    store: TokenStore
    fingerprint: str
    base_weights: Mapping[str, Tensor]
    window: int
    """Tokens that a window predicts."""
    chunk_tokens: int
    neighbours: int
    slots: NDArray[np.float16]
    """[n, h, d] of the chunks of the training text, memory-mapped."""
    chunks: Mapping[str, Chunks]
    """By split."""
    found: Mapping[str, NDArray[np.int32]]
    """By split: [n, neighbours + SPARE] chunks of the training text nearest to each chunk, best first; -1 for none."""

    @property
    def n_slots(self) -> int:
        """S of :meth:`read`."""
        return 2 * self.neighbours * self.slots.shape[1]

    def read(
        self, split: str, starts: NDArray[np.int64], seekers: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """See :class:`hrs.data.windows.WindowMemories`."""
        found = self.neighbours_of(split, starts, seekers)  # [B, k]
        both = np.stack((found, self._following(found)), axis=-1)  # [B, k, 2]
        slots = self.slots[np.maximum(both, 0)].astype(np.float32)  # [B, k, 2, h, d]
        slots[both < 0] = 0.0
        return slots.reshape(len(starts), self.n_slots, -1)

    def span(self, chunk: int) -> slice:
        """Where in the training text a chunk and the one after it lie."""
        ends = self.chunks["train"].ends
        following = int(self._following(np.array([chunk]))[0])
        return slice(int(ends[chunk]) - self.chunk_tokens, int(ends[chunk if following < 0 else following]))

    def _following(self, found: NDArray[np.int64]) -> NDArray[np.int64]:
        """The chunk after each of ``found`` in its document; -1 where there is none, or -1 was found."""
        documents = self.chunks["train"].documents
        following = np.minimum(found + 1, len(documents) - 1)
        follows = (found >= 0) & (following > found) & (documents[following] == documents[found])
        return np.where(follows, following, -1)

    def neighbours_of(
        self, split: str, starts: NDArray[np.int64], seekers: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """Chunks of the training text [B, neighbours] that windows at ``starts`` [B] read; -1 for none."""
        text = self.store.split(split)
        asking = starts if seekers is None else seekers
        query = self.chunks[split].before(asking, text.document_of(asking + 1))
        found = np.full((len(starts), self.neighbours + SPARE), -1, dtype=np.int64)
        found[query >= 0] = self.found[split][query[query >= 0]]
        if split == "train":
            first = text.document_of(starts + 1)[:, None]
            last = text.document_of(np.minimum(starts + self.window, len(text) - 1))[:, None]
            document = self.chunks["train"].documents[np.maximum(found, 0)]
            found[(first <= document) & (document <= last)] = -1
        order = np.argsort(found < 0, axis=1, kind="stable")[:, : self.neighbours]
        return np.take_along_axis(found, order, axis=1)


def open_bank(config: ExperimentConfig, store: TokenStore, base_directory: Path, root: Path) -> MemoryBank:
    """The bank of ``config.training.retrieval`` below ``root``, built first if it is missing. Safe in many processes.

    Args:
        config: of a run that reads memories; ``model.engram.slots`` says how many each window gets.
        base_directory: of the base's run, or one of its checkpoints.

    Raises:
        HRSError: if the base cannot be read, has another fingerprint or another shape than the config says, the slots
            do not divide, or the text has no chunk.
    """
    retrieval, n_slots = config.training.retrieval, config.model.engram.slots
    base, per_chunk = base_of(config, base_directory, store.tokenizer), slots_per_chunk(config)
    # What only training does with the memories does not make another bank.
    same = canonical_json(dataclasses.replace(retrieval, base="", fingerprint="", memory="right"))
    parts = (retrieval.fingerprint, store.fingerprint, same, str(n_slots))
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = root / key

    def read(folder: Path) -> MemoryBank | None:
        return _open(folder, store, base, retrieval)

    def build() -> MemoryBank:
        _build(base, store, retrieval, per_chunk, folder)
        if (bank := read(folder)) is None:
            raise HRSError(f"memory bank {folder} was damaged while it was written: check the disk and try again")
        return bank

    return built_once(folder, read, build, "memory bank")


def _build(base: LanguageModel, store: TokenStore, config: RetrievalConfig, per_chunk: int, folder: Path) -> None:
    """Encode all splits, search, and write the files."""
    with whole_folder(folder, "memory bank") as building:
        keys: dict[str, NDArray[np.float32]] = {}
        chunks: dict[str, Chunks] = {name: cut(store.split(name), config.chunk_tokens) for name in SPLITS}
        if not len(chunks["train"]):
            raise HRSError(
                f"no training document has {config.chunk_tokens} tokens: set training.retrieval.chunk_tokens lower"
            )
        for name in SPLITS:
            keys[name] = _encode(base, store, name, chunks[name], config, per_chunk, building)
        if config.keys == "words":
            similarities = word_similarities(store, chunks, config.chunk_tokens, config.span)
        else:
            similarities = engram_similarities(keys, chunks, config.span)
        documents = chunks["train"].documents
        for name in SPLITS:
            own = documents if name == "train" else None
            found = nearest(similarities[name], len(chunks[name]), documents, config.neighbours + SPARE, own)
            np.save(building / f"{name}.found.npy", found)
        write_manifest(building / MANIFEST, {})


def _encode(
    base: LanguageModel,
    store: TokenStore,
    split: str,
    chunks: Chunks,
    config: RetrievalConfig,
    per_chunk: int,
    building: Path,
) -> NDArray[np.float32]:
    """Keys [n, d] of a split; slots of the training text go to a file as they come."""
    n, d, done = len(chunks), base.d_model, 0
    keys = np.empty((n, d), dtype=np.float32)
    slots = None
    if split == "train":
        shape = (n, per_chunk, d)
        slots = np.lib.format.open_memmap(building / "train.slots.npy", mode="w+", dtype=np.float16, shape=shape)
    for some_keys, some_slots in encode_chunks(base, store.split(split), chunks, config, per_chunk):
        rows = slice(done, done + len(some_keys))
        keys[rows], done = some_keys, rows.stop
        if slots is not None:
            slots[rows] = some_slots
    assert done == n, (done, n)
    if slots is not None:
        slots.flush()
    return keys


def _open(folder: Path, store: TokenStore, base: LanguageModel, config: RetrievalConfig) -> MemoryBank | None:
    """The bank in a folder; None if there is none, or if it is damaged, which is logged."""
    if not folder.exists():
        return None
    try:
        read_manifest(folder / MANIFEST)
        slots = np.load(folder / "train.slots.npy", mmap_mode="r")
        found: dict[str, NDArray[np.int32]] = {
            name: np.load(folder / f"{name}.found.npy", mmap_mode="r") for name in SPLITS
        }
    except (OSError, ValueError, HRSError) as error:
        _log.warning("memory bank %s is damaged: %s", folder, error)
        return None
    return MemoryBank(
        store=store,
        fingerprint=config.fingerprint,
        base_weights=base.state_dict(),
        window=base.max_seq_len,
        chunk_tokens=config.chunk_tokens,
        neighbours=config.neighbours,
        slots=slots,
        chunks={name: cut(store.split(name), config.chunk_tokens) for name in SPLITS},
        found=found,
    )
