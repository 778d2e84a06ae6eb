"""What an engram store survives: cut logs, damage, kills, full disks, and many writers and threads at once."""

import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from engram_stores import log_of, opened, random_keys, texts

from hrs.errors import HRSError
from hrs.retrieval.store import Memory, NewMemory

FORK = multiprocessing.get_context("fork")


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
        receiver.poll(None)
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
