"""Small files that are whole whatever happens, and manifests that name what is damaged."""

import json
import os
import threading
from pathlib import Path

import pytest

from hrs.errors import HRSError
from hrs.files import absolute_path, read_json, read_manifest, write_manifest, write_whole


def test_a_file_is_written_with_its_folders_and_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    write_whole(path, "ä")
    write_whole(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"
    assert os.listdir(path.parent) == ["file.json"], "nothing is left beside it"


def test_what_stood_there_stays_if_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(HRSError, match=r"file could not be written \(No space left on device\): make room"):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_readers_beside_many_writers_find_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    contents = [json.dumps([number] * 5000) for number in range(4)]
    write_whole(path, contents[0])
    threads = [threading.Thread(target=lambda c=c: [write_whole(path, c) for _ in range(20)]) for c in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(set(read_json(path))) == 1
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_manifest_names_the_file_that_is_not_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1111")
    (tmp_path / "two").write_bytes(b"2222")
    write_manifest(tmp_path / "list.json", {"kind": "numbers"})
    assert read_manifest(tmp_path / "list.json")["kind"] == "numbers"
    (tmp_path / "two").write_bytes(b"2223")
    with pytest.raises(HRSError, match=r"two is missing, cut off or not what was written"):
        read_manifest(tmp_path / "list.json")
    (tmp_path / "two").write_bytes(b"2222")
    text = (tmp_path / "list.json").read_text()
    for damaged in (text.replace("numbers", "letters"), text[:-5], "[]", "{}", '{"files": 3}'):
        (tmp_path / "list.json").write_text(damaged)
        with pytest.raises(HRSError, match=r"list.json is missing or damaged"):
            read_manifest(tmp_path / "list.json")


def test_a_path_below_the_home_of_nobody_is_one_sentence() -> None:
    with pytest.raises(HRSError, match=r"path ~nosuchuser/x cannot be found .* write it without ~"):
        absolute_path("~nosuchuser/x")
