"""The engram store against a list of texts and float64 cosines, under crashes, damage and many processes."""

import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf

from hrs.errors import HRSError
from hrs.retrieval.store import EngramStore, Hit, Memory, NewMemory, fit_transform, records, rewrite

WIDTH = 4
Keys = NDArray[np.float32]
FORK = multiprocessing.get_context("fork")


def opened(folder: Path, width: int = WIDTH, **more: Any) -> EngramStore:
    return EngramStore.open(folder, **{"fingerprint": "0123", "width": width, **more})


def texts(n: int, start: int = 0) -> list[NewMemory]:
    return [NewMemory(f"text {i}", i / 2, f"source {i % 3}", f"topic {i % 2}") for i in range(start, start + n)]


def random_keys(n: int, width: int = WIDTH, seed: int = 0) -> Keys:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def cosines(queries: NDArray[Any], keys: NDArray[Any]) -> NDArray[np.float64]:
    """[Q, n] in float64; NaN where a vector is zero."""
    a, b = queries.astype(np.float64), keys.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


def names(hits: list[Hit]) -> list[str]:
    return [hit.memory.text for hit in hits]


# ---- the whole interface against a model -----------------------------------------------------------------------------

SOURCES = st.sampled_from(["wiki", "talk", ""])
TOPICS = st.sampled_from([None, "sea", "sky"])
# Few whole numbers: many keys are equal or parallel, and some are zero.
KEY = st.lists(st.integers(-2, 2), min_size=WIDTH, max_size=WIDTH)
NAMES = st.none() | st.lists(st.sampled_from(["wiki", "talk", "", "sea", "sky", "unheard of"]), max_size=2)


class StoreAgainstList(RuleBasedStateMachine):
    """Two views of one folder, either of which may write, against a list of memories and keys."""

    @initialize(rows=st.integers(1, 12))
    def open(self, rows: int) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=os.environ["STORE_TEST_FOLDER"]))
        self.rows = rows
        self.views = [opened(self.folder, segment_rows=rows) for _ in range(2)]
        self.kept: list[tuple[Memory, list[int]]] = []
        self.deleted: list[str] = []

    @rule(
        which=st.integers(0, 1),
        new=st.lists(st.tuples(st.text(max_size=5), st.none() | st.floats(0, 9), SOURCES, TOPICS, KEY), max_size=9),
    )
    def add(self, which: int, new: list[tuple[str, float | None, str, str | None, list[int]]]) -> None:
        keys = np.array([key for *_, key in new]).reshape(len(new), WIDTH)
        added = self.views[which].add([NewMemory(*fields) for *fields, _ in new], keys)
        assert [(m.text, m.entropy, m.source, m.topic) for m in added] == [tuple(fields) for *fields, _ in new]
        self.kept += zip(added, [key for *_, key in new], strict=True)

    @rule(which=st.integers(0, 1), data=st.data())
    def delete(self, which: int, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from([m.id for m, _ in self.kept]), max_size=9)) if self.kept else []
        gone = data.draw(st.sampled_from(self.deleted)) if self.deleted else "no such id"
        assert self.views[which].delete([*chosen, gone]) == len(set(chosen))
        self.kept = [(m, key) for m, key in self.kept if m.id not in chosen]
        self.deleted += set(chosen)

    @rule(which=st.integers(0, 1))
    def compact(self, which: int) -> None:
        self.views[which].compact()

    @rule(which=st.integers(0, 1))
    def reopen(self, which: int) -> None:
        self.views[which] = opened(self.folder, segment_rows=self.rows)

    @rule(
        which=st.integers(0, 1),
        source=st.none() | SOURCES,
        topic=TOPICS,
        offset=st.integers(0, 9),
        limit=st.none() | st.integers(0, 9),
    )
    def look(self, which: int, source: str | None, topic: str | None, offset: int, limit: int | None) -> None:
        view = self.views[which]
        asked = [m for m, _ in self.kept if source in (None, m.source) and topic in (None, m.topic)]
        end = None if limit is None else offset + limit
        assert view.list(source=source, topic=topic, offset=offset, limit=limit) == asked[offset:end]
        assert len(view) == len(self.kept)
        backwards = [m for m, _ in reversed(self.kept)]
        assert view.get([*(m.id for m in backwards), *self.deleted, "other-0"]) == backwards

    @rule(
        which=st.integers(0, 1),
        queries=st.lists(KEY, min_size=1, max_size=3),
        k=st.integers(1, 6),
        least=st.sampled_from([-1.0, 0.0, 0.5]),
        topics=NAMES,
        sources=NAMES,
        exclude_topics=NAMES,
        exclude_sources=NAMES,
    )
    def search(
        self,
        which: int,
        queries: list[list[int]],
        k: int,
        least: float,
        topics: list[str] | None,
        sources: list[str] | None,
        exclude_topics: list[str] | None,
        exclude_sources: list[str] | None,
    ) -> None:
        found = self.views[which].search(
            np.array(queries),
            k,
            min_similarity=least,
            topics=topics,
            sources=sources,
            exclude_topics=exclude_topics,
            exclude_sources=exclude_sources,
        )
        asked = [
            (m, key)
            for m, key in self.kept
            if any(key)
            and (topics is None or m.topic in topics)
            and (sources is None or m.source in sources)
            and (exclude_topics is None or m.topic not in exclude_topics)
            and (exclude_sources is None or m.source not in exclude_sources)
        ]
        assert len(found) == len(queries)
        for query, hits in zip(queries, found, strict=True):
            check_hits(query, hits, asked, k, least)


def check_hits(query: list[int], hits: list[Hit], asked: list[tuple[Memory, list[int]]], k: int, least: float) -> None:
    """Whole numbers make cosines that are equal or far apart, so ranks by rounded cosine and age are certain."""

    def cosine(key: list[int]) -> float:
        dot = sum(a * b for a, b in zip(query, key, strict=True))
        return dot / math.sqrt(sum(a * a for a in query) * sum(b * b for b in key))

    if not any(query):
        assert not hits
        return
    ranked = sorted(((-cosine(key), age, m, key) for age, (m, key) in enumerate(asked)), key=lambda row: row[:2])
    near = [row for row in ranked if -row[0] >= least + 1e-9]
    at_bound = [row for row in ranked if abs(-row[0] - least) < 1e-9]
    assert min(len(near), k) <= len(hits) <= min(len(near) + len(at_bound), k)
    expected = [-row[0] for row in ranked[: len(hits)]]
    np.testing.assert_allclose([hit.similarity for hit in hits], expected, atol=1e-12)
    by_id = {m.id: (age, m, key) for _, age, m, key in ranked}
    for hit in hits:
        assert -1 <= hit.similarity <= 1 and hit.similarity >= least
        age, memory, key = by_id[hit.memory.id]
        assert hit.memory == memory and hit.key.tolist() == key
        assert math.isclose(hit.similarity, cosine(key), abs_tol=1e-12)
    chosen = {hit.memory.id for hit in hits}
    for one, other in itertools.pairwise(hits):
        assert one.similarity > other.similarity or by_id[one.memory.id][0] < by_id[other.memory.id][0]
    for hit in hits:  # of equal keys the older ones are taken
        age, _, key = by_id[hit.memory.id]
        assert all(m.id in chosen for _, other, m, same in ranked if same == key and other < age)


def test_two_views_against_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_TEST_FOLDER", str(tmp_path))
    # Small segments, so that they are merged, split and thinned out.
    monkeypatch.setattr(rewrite, "LARGEST_SEGMENT", 20)
    monkeypatch.setattr(records, "LARGEST_SEGMENT", 20)
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        StoreAgainstList,
        settings=settings(
            max_examples=12,
            stateful_step_count=25,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


# ---- exactness -------------------------------------------------------------------------------------------------------


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


# ---- crashes and damage ----------------------------------------------------------------------------------------------


def log_of(folder: Path) -> Path:
    (path,) = folder.glob("log-*.bin")
    return path


@pytest.mark.parametrize("deletes", [False, True])
def test_a_log_cut_at_every_byte_loses_the_last_record_alone(tmp_path: Path, deletes: bool) -> None:
    store = opened(tmp_path / "s")
    added = store.add(texts(2), random_keys(2))
    whole = log_of(store.path).stat().st_size
    if deletes:
        store.delete([added[0].id])
    else:
        store.add(texts(2, 2), random_keys(2, seed=1))
    content = log_of(store.path).read_bytes()
    assert len(content) > whole
    for cut in range(whole, len(content)):
        log_of(store.path).write_bytes(content[:cut])
        reader = opened(store.path)
        assert reader.list() == added
        if cut % 97 == 0 or cut in (whole, len(content) - 1):
            assert log_of(store.path).stat().st_size == cut  # a reader mends nothing
            later = reader.add(texts(1, 9), random_keys(1, seed=2))
            assert opened(store.path).list() == reader.list() == [*added, *later]
    log_of(store.path).write_bytes(content)
    assert len(opened(store.path)) == (1 if deletes else 4)


def test_zeros_after_the_log_are_no_record(tmp_path: Path) -> None:
    """As a file system may leave them when the power fails."""
    store = opened(tmp_path / "s")
    added = store.add(texts(2), random_keys(2))
    with log_of(store.path).open("ab") as file:
        file.write(bytes(5000))
    assert opened(store.path).list() == store.list() == added
    more = store.add(texts(1), random_keys(1))
    assert opened(store.path).list() == [*added, *more]


def test_damage_is_named(tmp_path: Path) -> None:
    """One wrong bit anywhere but in the last record of the log, or one byte less, and the store is refused."""
    folder = tmp_path / "s"
    store = opened(folder, segment_rows=4, normalisation="centred", fit_at=2)
    for start in range(0, 8):
        store.add(texts(1, start), random_keys(1, seed=start))
    first = log_of(folder).stat().st_size
    store.add(texts(1, 8), random_keys(1, seed=8))
    assert 0 < first < log_of(folder).stat().st_size
    draw = random.Random(0)
    for path in sorted(folder.iterdir()):
        if path.name == "store.lock":
            continue
        content = path.read_bytes()
        end = first if path == log_of(folder) else len(content)
        places = range(end) if path.name == "manifest.json" else sorted(draw.sample(range(end), 60))
        for place in places:
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(HRSError, match=f"damaged or missing file {path.name}"):
                opened(folder, normalisation="centred")
        if path != log_of(folder):
            path.write_bytes(content[:-1])
            with pytest.raises(HRSError, match=f"damaged or missing file {path.name}"):
                opened(folder, normalisation="centred")
        path.unlink()
        with pytest.raises(HRSError, match=f"damaged or missing file {path.name}"):
            opened(folder, normalisation="centred")
        path.write_bytes(content)
    assert len(opened(folder, normalisation="centred")) == 9


def test_a_wrong_bit_in_the_last_record_never_changes_it(tmp_path: Path) -> None:
    """It cannot be told from a record that was never finished, and is left out."""
    store = opened(tmp_path / "s")
    added = store.add(texts(1), random_keys(1))
    start = log_of(store.path).stat().st_size
    store.add(texts(1, 1), random_keys(1))
    content = log_of(store.path).read_bytes()
    for place in range(start, len(content), 7):
        log_of(store.path).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert opened(store.path).list() == added


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = opened(tmp_path / "s").path / "manifest.json"
    path.write_text(json.dumps({"format": 2, "whatever": "it holds"}))
    with pytest.raises(HRSError, match="has format 2 and this version of hrs reads up to 1: update hrs"):
        opened(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "other"), [("fingerprint", "4567"), ("width", 5), ("block", -2), ("normalisation", "centred")]
)
def test_keys_of_another_model_are_refused(tmp_path: Path, name: str, other: Any) -> None:
    opened(tmp_path / "s")
    with pytest.raises(HRSError, match=f"holds keys of {name} .* and {other} is asked for"):
        opened(tmp_path / "s", **{name: other})


def acknowledge(folder: Path, pipe: Any, seed: int) -> None:
    """Add and delete for ever, and tell what was acknowledged."""
    store = opened(folder, segment_rows=12)
    draw = random.Random(seed)
    while True:
        n = draw.randint(1, 5)
        pipe.send(("adding", n))
        pipe.send(("added", store.add(texts(n), random_keys(n, seed=draw.getrandbits(32)))))
        if draw.random() < 0.4:
            chosen = draw.choice(store.list())
            pipe.send(("deleting", chosen.id))
            store.delete([chosen.id])
            pipe.send(("deleted", chosen.id))
        if draw.random() < 0.1:
            store.compact()


def test_a_killed_writer_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """SIGKILL at random moments: all acknowledged changes are there, and at most the one that was under way besides."""
    folder = tmp_path / "s"
    watching = opened(folder)
    expected: list[Memory] = []
    draw = random.Random(1)
    for round in range(12):
        receiver, sender = FORK.Pipe(duplex=False)
        writer = FORK.Process(target=acknowledge, args=(folder, sender, round), daemon=True)
        writer.start()
        sender.close()
        assert receiver.poll(60)
        time.sleep(draw.uniform(0, 0.25))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        under_way: tuple[str, Any] | None = None
        while True:
            try:
                event, told = receiver.recv()
            except EOFError:
                break
            under_way = (event, told) if event.endswith("ing") else None
            if event == "added":
                expected += told
            elif event == "deleted":
                expected = [m for m in expected if m.id != told]
        found = opened(folder).list()
        if under_way is not None and under_way[0] == "adding":
            more = found[len(expected) :]
            assert len(more) in (0, under_way[1])  # all of a call or nothing
            expected = [*expected, *more]
        elif under_way is not None:
            expected = [m for m in expected if m.id != under_way[1] or m in found]
        assert found == expected == watching.list()
    assert len(expected) > 20
    watching.add(texts(1), random_keys(1))
    watching.compact()
    assert {p.name.split("-")[0] for p in folder.iterdir()} == {"manifest.json", "store.lock", "segment", "log"}
    assert len(opened(folder)) == len(expected) + 1


def fill_disk(folder: Path, pipe: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = opened(folder)
    size = log_of(folder).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 700, size + 700))
    try:
        store.add(texts(1, 1), random_keys(1))
    except HRSError as error:
        pipe.send((str(error), log_of(folder).stat().st_size == size, len(store)))


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    added = store.add(texts(1), random_keys(1))
    receiver, sender = FORK.Pipe(duplex=False)
    writer = FORK.Process(target=fill_disk, args=(store.path, sender))
    writer.start()
    sender.close()
    message, cut, length = receiver.recv()
    writer.join()
    assert "is the disk full" in message and cut and length == 1
    assert store.list() == added and len(store.add(texts(1), random_keys(1))) == 1


# ---- many processes and threads --------------------------------------------------------------------------------------


def write_many(folder: Path, pipe: Any, writer: int) -> None:
    store = opened(folder, segment_rows=30)
    ids = []
    for i in range(25):
        (memory,) = store.add([NewMemory(f"{writer} {i}", source=f"{writer}")], random_keys(1, seed=100 * writer + i))
        assert store.get([memory.id]) == [memory]
        ids.append(memory.id)
        if i % 5 == 4:
            assert store.delete([ids.pop(0)]) == 1
    pipe.send(ids)


def test_several_writers_and_a_reader(tmp_path: Path) -> None:
    """Every writer sees its own memory at once, ids are given once, and a reader never sees one vanish or come late."""
    folder = tmp_path / "s"
    reader = opened(folder)
    pipes = []
    for writer in range(3):
        receiver, sender = FORK.Pipe(duplex=False)
        FORK.Process(target=write_many, args=(folder, sender, writer), daemon=True).start()
        sender.close()
        pipes.append(receiver)
    seen: set[str] = set()
    polls = 0
    while not all(pipe.poll() for pipe in pipes):
        listed = [m.id for m in reader.list()]
        numbers = [int(id.split("-")[1]) for id in listed]
        assert numbers == sorted(set(numbers))
        newest = max((int(id.split("-")[1]) for id in seen), default=-1)
        assert all(int(id.split("-")[1]) > newest for id in set(listed) - seen)
        assert len(reader.search(random_keys(1), 5)[0]) >= min(len(listed) - 15, 5)
        seen |= set(listed)
        polls += 1
    ids = [pipe.recv() for pipe in pipes]
    assert polls > 3 and len(reader) == 60
    for writer, kept in enumerate(ids):
        assert [m.id for m in reader.list(source=f"{writer}")] == kept
    assert opened(folder).list() == reader.list()


def test_threads_of_one_process(tmp_path: Path) -> None:
    store = opened(tmp_path / "s", segment_rows=20)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(15):
                (memory,) = store.add(texts(1, i), random_keys(1, seed=number))
                assert any(hit.memory == memory for hit in store.search(random_keys(1, seed=number), 99)[0])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(store) == 60


# ---- cost ------------------------------------------------------------------------------------------------------------


def io_bytes(kind: str) -> int:
    """Bytes this process has read or written by system calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)[kind])


needs_proc = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes in /proc/self/io")


@needs_proc
def test_inserts_write_in_proportion(tmp_path: Path) -> None:
    """Eight times as many keys: at most the share of merges more bytes for each."""

    def written(n: int) -> float:
        store = opened(tmp_path / str(n), 64, segment_rows=64)
        before = io_bytes("wchar")
        for start in range(0, n, 16):
            store.add(texts(16, start), random_keys(16, 64))
        return (io_bytes("wchar") - before) / n

    few, many = written(512), written(4096)
    assert many < 1.8 * few  # 3 + log2(8) writes of each key against 3 + log2(1)


@needs_proc
def test_a_search_reads_only_what_is_new(tmp_path: Path) -> None:
    reader, writer = (opened(tmp_path / "s", 64, segment_rows=600) for _ in range(2))
    for start in range(0, 1000, 50):
        writer.add(texts(50, start), random_keys(50, 64, seed=10 + start))
    reader.refresh()
    segments = reader._view.segments
    assert segments and log_of(reader.path).stat().st_size > 100_000
    for i in range(3):
        writer.add(texts(1, 1000 + i), random_keys(1, 64, seed=i))
        before = io_bytes("rchar")
        assert names(reader.search(random_keys(1, 64, seed=i), 1)[0]) == [f"text {1000 + i}"]
        assert io_bytes("rchar") - before < 10_000
    writer.add(texts(248, 2000), random_keys(248, 64))
    reader.refresh()
    assert len(reader._view.segments) > 1 and reader._view.segments[0] is segments[0]  # not mapped and checked again


def test_deleted_text_leaves_the_disk(tmp_path: Path) -> None:
    store = opened(tmp_path / "s", segment_rows=4)
    secret = store.add([NewMemory("a secret"), *texts(9)], random_keys(10))[0]
    held: Callable[[], bool] = lambda: any(b"a secret" in p.read_bytes() for p in store.path.iterdir())  # noqa: E731
    store.delete([secret.id])
    assert held()
    foreign = store.path / "topics.json"
    foreign.write_text("{}")
    store.compact()
    assert not held() and foreign.exists() and len(store) == 9


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda s: s.add(texts(2), random_keys(3)), "2 memories came with 3 keys"),
        (lambda s: s.add(texts(1), random_keys(1, 5)), r"shape \[1, 5\] and this store needs \[n, 4\]"),
        (lambda s: s.add(texts(1), [[1, 2, 3, math.nan]]), "not finite"),
        (lambda s: s.add(texts(1), [[1, 2, 3, 1e39]]), "not finite in float32"),
        (lambda s: s.add([NewMemory("half \ud800")], random_keys(1)), "a text that cannot be stored"),
        (lambda s: s.add([NewMemory(3)], random_keys(1)), "a text that cannot be stored"),
        (lambda s: s.add([NewMemory("", source=None)], random_keys(1)), "no source"),
        (lambda s: s.add([NewMemory("", math.inf)], random_keys(1)), "entropy that is not finite"),
        (lambda s: s.search(random_keys(1)[0], 1), r"shape \[4\]"),
        (lambda s: s.search(random_keys(1), 0), "k must be 1 or more"),
        (lambda s: s.search([[math.inf] * WIDTH], 1), "not finite"),
        (lambda s: s.search(random_keys(1), 1, topics="sea"), "topics takes a collection"),
        (lambda s: s.get("an id"), "ids takes a list"),
        (lambda s: s.list(limit=-1), "limit and offset must be 0 or more"),
        (lambda s: opened(s.path, segment_rows=0), "segment_rows must be 1 or more"),
        (lambda s: opened(s.path / "none", create=False), "there is no engram store at"),
        (lambda s: opened(s.path / "manifest.json"), "cannot be made"),
    ],
)
def test_mistakes_are_said(tmp_path: Path, act: Callable[[EngramStore], Any], said: str) -> None:
    store = opened(tmp_path / "s")
    kept = store.add(texts(1), random_keys(1))
    with pytest.raises(HRSError, match=said):
        act(store)
    assert opened(store.path).list() == kept


def test_a_store_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    shutil.rmtree(store.path)
    opened(store.path)
    with pytest.raises(HRSError, match="was replaced by another one: open it again"):
        len(store)


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
