"""What an engram store costs, and what it refuses."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engram_stores import WIDTH, log_of, names, opened, random_keys, texts

from hrs.errors import HRSError
from hrs.retrieval.store import EngramStore, NewMemory


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
