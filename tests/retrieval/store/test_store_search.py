"""Searches of an engram store: exact in float64, with every transform of the keys, and by FAISS."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engram_stores import WIDTH, cosines, names, opened, random_keys, texts
from sklearn.covariance import ledoit_wolf

from hrs.errors import HRSError
from hrs.retrieval.store import fit_transform, records, rewrite


@pytest.mark.parametrize("normalisation", ["none", "centred", "whitened"])
def test_search_equals_float64(tmp_path: Path, normalisation: Any) -> None:
    """Keys with a large common part, that differ by less than float32 products can tell: float64 decides."""
    width, n = 48, 600
    keys = 20 + random_keys(1, width, 1) + 1e-3 * random_keys(n, width, 2)
    queries = 20 + random_keys(3, width, 3)
    store = opened(tmp_path / "s", width, normalisation=normalisation, segment_rows=250, fit_at=n)
    for start in range(0, n, 100):
        store.add(texts(100, start), keys[start : start + 100])
    exact, asked = keys.astype(np.float64), queries.astype(np.float64)
    if normalisation != "none":
        assert store.transform_version == 1
        exact, asked = exact - keys.mean(axis=0, dtype=np.float64), asked - keys.mean(axis=0, dtype=np.float64)
    if normalisation == "whitened":
        values, vectors = np.linalg.eigh(ledoit_wolf(exact, assume_centered=True)[0])
        root = vectors / np.sqrt(values)
        exact, asked = exact @ root, asked @ root
    expected = cosines(asked, exact)
    order = np.argsort(-expected, axis=1)[:, :20]
    for row, hits in enumerate(store.search(queries, 20)):
        assert names(hits) == [f"text {i}" for i in order[row]]
        np.testing.assert_allclose([hit.similarity for hit in hits], expected[row, order[row]], rtol=0, atol=1e-9)
        np.testing.assert_array_equal(np.stack([hit.key for hit in hits]), keys[order[row]])


def test_equal_keys_are_found_oldest_first(tmp_path: Path) -> None:
    """Also where far more of them are equal than are asked for, at any place in any part."""
    store = opened(tmp_path / "s", 33, segment_rows=700)
    key = random_keys(1, 33)
    for start in range(0, 2000, 250):
        store.add(texts(250, start), np.repeat(key, 250, axis=0))
    store.delete([m.id for m in store.list(limit=3)])
    (hits,) = store.search(key + 0.5, 12)
    assert names(hits) == [f"text {i}" for i in range(3, 15)]
    assert len({hit.similarity for hit in hits}) == 1


def test_best_keys_last(tmp_path: Path) -> None:
    """Each row is nearer than all before it, so that no bound found early leaves anything out."""
    n = 30_000
    angles = np.linspace(3, 0, n)
    store = opened(tmp_path / "s", 2, segment_rows=20_000)
    store.add(texts(n), np.stack([np.cos(angles), np.sin(angles)], axis=1))
    for q in (1, 3):
        for hits in store.search(np.repeat([[1.0, 0.0]], q, axis=0), 5):
            assert names(hits) == [f"text {i}" for i in range(n - 1, n - 6, -1)]


def test_keys_of_any_size_compare(tmp_path: Path) -> None:
    """Down to the smallest and up to the largest of float32; zero keys and zero queries match nothing."""
    store = opened(tmp_path / "s", 2)
    store.add(texts(4), [[1e-45, 0], [3e38, 3e38], [0, 0], [-1, 0]])
    assert [names(hits) for hits in store.search([[2, 1e-30], [0, 0]], 9)] == [["text 0", "text 1", "text 3"], []]
    assert store.search([[1.0, 0.0]], 9)[0][0].similarity == 1.0


def test_an_empty_store(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    assert (len(store), store.list(), store.search(random_keys(2), 3), store.add([], np.empty((0, WIDTH)))) == (
        0, [], [[], []], [],
    )  # fmt: skip
    assert store.search(np.empty((0, WIDTH)), 3) == []
    assert not opened(tmp_path / "s", create=False).list()


def test_one_batch_larger_than_a_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "LARGEST_SEGMENT", 16)
    monkeypatch.setattr(records, "LARGEST_SEGMENT", 16)
    store = opened(tmp_path / "s", segment_rows=8)
    keys = random_keys(55)
    store.add(texts(5), keys[:5])
    store.add(texts(50, 5), keys[5:])
    assert [m.text for m in store.list()] == [f"text {i}" for i in range(55)]
    assert [names(hits)[0] for hits in store.search(keys, 1)] == [f"text {i}" for i in range(55)]


def test_times_filter(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    before = time.time()
    first, second = (store.add(texts(1, i), random_keys(1))[0] for i in range(2))
    assert before <= first.created < second.created <= time.time()
    assert store.list(since=second.created) == [second] and store.list(until=second.created) == [first]
    assert store.list(since=first.created, until=first.created) == []


# ---- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 30, 3000])
def test_whitening_has_the_covariance_of_ledoit_and_wolf(n: int) -> None:
    keys = (5 + random_keys(n, 6) @ random_keys(6, 6, 1)).astype(np.float32)
    transform = fit_transform(lambda: iter([keys[:1], keys[1:]]), "whitened", 7)
    assert transform.version == 7 and transform.matrix is not None
    centred = keys - keys.mean(axis=0, dtype=np.float64)
    covariance, _ = ledoit_wolf(centred, assume_centered=True)
    np.testing.assert_allclose(transform.matrix.T @ covariance @ transform.matrix, np.eye(6), atol=1e-8)


def test_equal_keys_have_no_direction_once_centred(tmp_path: Path) -> None:
    store = opened(tmp_path / "s", normalisation="whitened", fit_at=5)
    store.add(texts(5), np.ones((5, WIDTH)))
    assert store.transform_version == 1 and store.search(np.ones((1, WIDTH)), 3) == [[]]
    store.add(texts(1, 5), [[1, 1, 1, 2]])
    assert names(store.search([[1, 1, 1, 3]], 3)[0]) == ["text 5"]


def test_fits_are_stated_moments(tmp_path: Path) -> None:
    """Nothing until ``fit_at``, then once; later only when asked for, and every view sees it."""
    keys = 3 + random_keys(40)
    store = opened(tmp_path / "s", normalisation="centred", fit_at=20)
    other = opened(tmp_path / "s", normalisation="centred")
    store.add(texts(19), keys[:19])
    raw = store.search(keys[:1], 1)[0][0]
    assert store.transform_version == 0 and raw.similarity == pytest.approx(1)
    assert store.search(keys[:1], 19)[0][-1].similarity > 0.5
    store.add(texts(21, 19), keys[19:])
    assert store.transform_version == other.transform_version == 1
    found = other.search(keys[:1], 40)[0]
    mean = keys.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(
        [hit.similarity for hit in found], np.sort(cosines(keys[:1] - mean, keys - mean)[0])[::-1], atol=1e-12
    )
    store.delete([m.id for m in store.list()[10:]])
    assert store.transform_version == 1
    assert store.fit() == 2 and other.transform_version == 2
    ten = keys[:10] - keys[:10].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(
        [hit.similarity for hit in other.search(keys[:1], 40)[0]], np.sort(cosines(ten[:1], ten)[0])[::-1], atol=1e-12
    )
    assert opened(tmp_path / "s", normalisation="centred").transform_version == 2


def test_what_cannot_be_fitted(tmp_path: Path) -> None:
    with pytest.raises(HRSError, match="compares keys as they are"):
        opened(tmp_path / "plain").fit()
    with pytest.raises(HRSError, match="is empty"):
        opened(tmp_path / "empty", normalisation="centred").fit()


# ---- FAISS -----------------------------------------------------------------------------------------------------------


def test_inverted_lists(tmp_path: Path) -> None:
    """Found memories are real, rightly scored and filtered; lists grow with the segments, and the log is exact."""
    pytest.importorskip("faiss")
    centres = 4 * random_keys(20, 16, 1)
    keys = (centres[np.arange(3000) % 20] + random_keys(3000, 16, 2)).astype(np.float32)
    store = opened(tmp_path / "s", 16, segment_rows=400)
    listed = opened(tmp_path / "s", 16, faiss_above=500)
    queries = keys[:40] + 0.1 * random_keys(40, 16, 3)
    for end in (300, 1200, 2000, 2990, 3000):
        store.add(texts(end - len(store), len(store)), keys[len(store) : end])
        for filters in ({}, {"topics": ["topic 1"], "exclude_sources": ["source 2"]}):
            exact, found = (s.search(queries, 5, **filters) for s in (store, listed))
            shared = 0
            for query, a, b in zip(queries, exact, found, strict=True):
                similarity = cosines(query[None], np.stack([hit.key for hit in b]))[0]
                np.testing.assert_allclose([hit.similarity for hit in b], similarity, atol=1e-12)
                assert (np.diff(similarity) <= 1e-15).all()
                if filters:
                    assert all(h.memory.topic == "topic 1" and h.memory.source != "source 2" for h in b)
                shared += len({h.memory.id for h in a} & {h.memory.id for h in b})
            assert shared > 0.9 * 5 * len(queries)
    for _ in range(2):
        store.delete([hit.memory.id for hits in listed.search(queries, 1) for hit in hits])
        kept = {m.id for m in store.list()}
        for _ in range(2):
            found = listed.search(queries, 5)
            assert all(len(hits) == 5 and kept.issuperset(hit.memory.id for hit in hits) for hits in found)
            store.compact()


def test_faiss_asked_for_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    opened(tmp_path / "s")
    with pytest.raises(HRSError, match="faiss_above asks for a FAISS index and the package is not installed"):
        opened(tmp_path / "s", faiss_above=10)
