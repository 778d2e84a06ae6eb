"""Documents that a corpus holds more than once, in one split or in several.

Exact duplicates have the same text after Unicode normalisation (NFKC), case folding and joining of white space. Near
ones share at least :data:`NEAR` of their shingles, runs of :data:`SHINGLE` words (of characters where a text has no
spaces), as estimated from :data:`N_HASHES` MinHash values (Broder 1997); pairs are found by banding the values.
"""

import hashlib
import unicodedata
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hrs.data.documents import SPLITS, SplitName

NEAR = 0.8
SHINGLE = 5
N_HASHES = 64
_BANDS = 16
_SHINGLES_AT_ONCE = 2**14
_LONGEST_WORD = 20  # mean characters between spaces above which a text is taken to have none
_KEPT_WORDS = 2**20
_COMPARED = 8  # members of a band's group that all others are compared with, per split: pairs would be quadratic

Deduplicate = Literal["none", "exact", "near"]
PAIRS: tuple[tuple[SplitName, SplitName], ...] = (
    ("validation", "train"), ("test", "train"), ("test", "validation"),
)  # fmt: skip

_draw = np.random.default_rng(0)
_FACTORS = _draw.integers(2**63, size=N_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SHIFTS = _draw.integers(2**63, size=N_HASHES, dtype=np.uint64)
_POWERS = np.uint64(0x9E3779B97F4A7C15) ** np.arange(SHINGLE, dtype=np.uint64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplicates:
    """How often documents of a token store occur again. Near ones are counted without the exact ones."""

    documents: dict[str, int]
    """By split."""
    exact: dict[str, int]
    """``train``, ``validation``, ``test``: documents that occurred earlier in that split. ``A in B``: documents of A
    that B holds as well."""
    near: dict[str, int]
    """The same of documents that resemble another one."""
    removed: int = 0
    """Training documents that ``data.deduplicate`` left out; they are not counted above."""

    @property
    def validation_overlap(self) -> float:
        """Share of the validation documents that the training text holds, exactly or nearly."""
        name = "validation in train"
        return (self.exact[name] + self.near[name]) / max(1, self.documents["validation"])

    def sentence(self) -> str:
        """Return what there is to say, in one line; empty if there are no duplicates and none were removed."""
        parts = [
            f"of {self.documents[a]} {a} documents {self.exact[name]} exactly and {self.near[name]} nearly "
            f"are in {b} too"
            for a, b in PAIRS
            if self.exact[name := f"{a} in {b}"] or self.near[name]
        ]
        parts += [
            f"of {self.documents[split]} {split} documents {self.exact[split]} exactly and {self.near[split]} nearly "
            "repeat another"
            for split in SPLITS
            if self.exact[split] or self.near[split]
        ]
        parts += [f"{self.removed} training documents were removed"] if self.removed else []
        return "; ".join(parts)


def duplicates_from(facts: Mapping[str, Any] | None) -> Duplicates | None:
    """Return what ``dataclasses.asdict`` made of :class:`Duplicates`; None of a store that was written before them."""
    return None if facts is None else Duplicates(**facts)


class DuplicateScan:
    """Looks at documents one by one and keeps some 300 bytes of each."""

    def __init__(self) -> None:
        self._splits: list[int] = []
        self._texts: list[int] = []
        self._signatures: dict[int, NDArray[np.uint32]] = {}
        self._words: dict[str, int] = {}

    def add(self, split: SplitName, text: str) -> None:
        """Look at the next document."""
        text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        key = int.from_bytes(digest)
        self._splits.append(SPLITS.index(split))
        self._texts.append(key)
        if key not in self._signatures:
            self._signatures[key] = _signature(self._units(text))

    def _units(self, text: str) -> NDArray[np.uint64]:
        """Numbers of the words of a text, or of its characters if it has no spaces."""
        words = text.split()
        if len(text) > _LONGEST_WORD * len(words):
            return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
        if len(self._words) > _KEPT_WORDS:
            self._words.clear()
        known = self._words
        for word in words:
            if word not in known:
                known[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return np.array([known[word] for word in words], dtype=np.uint64)

    def found(self, deduplicate: Deduplicate = "none") -> tuple[Duplicates, NDArray[np.int64]]:
        """Return what was found, and which documents, by the order of :meth:`add`, are to be left out of training."""
        splits = np.array(self._splits, dtype=np.int64)
        _, firsts, node_of = np.unique(np.array(self._texts, dtype=np.uint64), return_index=True, return_inverse=True)
        signatures = np.stack([self._signatures[self._texts[i]] for i in firsts]) if len(firsts) else np.empty((0, 0))
        nodes = _Nodes(splits, node_of, signatures)
        leaking: NDArray[np.bool_] = np.zeros(len(nodes.counts), dtype=bool)
        if deduplicate != "none":
            leaking |= nodes.counts[:, 1:].any(axis=1)
        if deduplicate == "near":
            leaking |= nodes.near[:, 1:].any(axis=1)
        removed = np.flatnonzero((splits == 0) & leaking[node_of])
        if len(removed):  # what was removed is no duplicate of anything any more
            kept = np.setdiff1d(np.arange(len(splits)), removed)
            nodes = _Nodes(splits[kept], node_of[kept], signatures)
        return nodes.counted(len(removed)), removed


def _signature(units: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """The smallest of each hash function's values over all shingles, [N_HASHES]."""
    n = max(1, len(units) - SHINGLE + 1)
    signature = np.full(N_HASHES, 2**32 - 1, dtype=np.uint32)
    with np.errstate(over="ignore"):
        padded = np.concatenate([units, np.zeros(max(0, SHINGLE - len(units)), dtype=np.uint64)])
        shingles = sum((padded[i : i + n] * _POWERS[i] for i in range(SHINGLE)), np.zeros(n, dtype=np.uint64))
        shingles ^= shingles >> np.uint64(31)
        for start in range(0, n, _SHINGLES_AT_ONCE):
            part = shingles[start : start + _SHINGLES_AT_ONCE]
            values = (part * _FACTORS[:, None] + _SHIFTS[:, None]) >> np.uint64(32)  # [N_HASHES, n]
            signature = np.minimum(signature, values.min(axis=1).astype(np.uint32))
    return signature


class _Nodes:
    """Different texts, G of them: how often each split has them, and in which splits others resemble them."""

    def __init__(self, splits: NDArray[np.int64], node_of: NDArray[np.int64], signatures: NDArray[Any]) -> None:
        n_nodes, n_splits = len(signatures), len(SPLITS)
        self.counts = np.zeros((n_nodes, n_splits), dtype=np.int64)
        np.add.at(self.counts, (node_of, splits), 1)
        self._first = np.full((n_nodes, n_splits), len(splits), dtype=np.int64)
        np.minimum.at(self._first, (node_of, splits), np.arange(len(splits)))
        self.near = np.zeros((n_nodes, n_splits), dtype=bool)
        """[G, 3], whether another text of a split resembles this one."""
        self._repeats = np.zeros((n_nodes, n_splits), dtype=bool)
        """[G, 3], whether that other text came earlier in the split."""
        there = np.flatnonzero(self.counts.any(axis=1))
        bands = signatures.reshape(n_nodes, _BANDS, -1) if n_nodes else np.empty((0, _BANDS, 1))
        for band in range(_BANDS):
            for members in _groups(bands[there, band], there):
                self._compare(members, signatures)

    def _compare(self, members: NDArray[np.int64], signatures: NDArray[Any]) -> None:
        members = members[np.argsort(self._first[members].min(axis=1), kind="stable")]
        for split in range(len(SPLITS)):
            others = members[self.counts[members, split] > 0][:_COMPARED]
            if not len(others):
                continue
            shared = (signatures[members][:, None] == signatures[others][None]).mean(axis=-1)  # [M, R]
            alike = (shared >= NEAR) & (members[:, None] != others[None])
            earlier = self._first[others, split][None] < self._first[members, split][:, None]
            self.near[members, split] |= alike.any(axis=1)
            self._repeats[members, split] |= (alike & earlier).any(axis=1)

    def counted(self, removed: int) -> Duplicates:
        """Return the numbers, by split and by pair of splits."""
        counts, index = self.counts, {split: i for i, split in enumerate(SPLITS)}
        exact: dict[str, int] = {split: int(np.maximum(counts[:, i] - 1, 0).sum()) for split, i in index.items()}
        near: dict[str, int] = {s: int((self._repeats[:, i] & (counts[:, i] > 0)).sum()) for s, i in index.items()}
        for a, b in PAIRS:
            own, also = counts[:, index[a]], counts[:, index[b]] > 0
            exact[f"{a} in {b}"] = int(own[also].sum())
            near[f"{a} in {b}"] = int(own[~also & self.near[:, index[b]]].sum())
        documents: dict[str, int] = {split: int(counts[:, i].sum()) for split, i in index.items()}
        return Duplicates(documents=documents, exact=exact, near=near, removed=removed)


def _groups(keys: NDArray[Any], nodes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Nodes with equal keys, two or more together; keys [n, k] of nodes [n]."""
    if len(keys) < 2:
        return []
    rows = np.ascontiguousarray(keys).view(f"V{keys.dtype.itemsize * keys.shape[1]}").ravel()
    _, inverse, sizes = np.unique(rows, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    ends = np.cumsum(sizes)
    return [nodes[order[ends[i] - sizes[i] : ends[i]]] for i in np.flatnonzero(sizes > 1)]
