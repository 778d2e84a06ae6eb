"""Folders and files as people have them: what can be read is read, and of the rest file and place are named."""

import bz2
import gzip
import json
import lzma
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hrs.config import DataConfig
from hrs.data import Document, load_corpus, open_tokens
from hrs.errors import HRSError


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def titles_and_texts(corpus: str) -> list[tuple[str, str]]:
    return [(d.title, d.text) for d in load_corpus(corpus).documents()]


def complaint(corpus: str) -> str:
    """Return the sentence that reading a corpus ends with, which is short whatever the corpus holds."""
    with pytest.raises(HRSError) as error:
        loaded = load_corpus(corpus)
        loaded.fingerprint()
        list(loaded.documents())
    assert len(str(error.value)) < 500
    return str(error.value)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_through_links_and_without_hidden_files(tmp_path: Path) -> None:
    """A folder may be named like a file, linked folders count, circles of links end, editors' copies are no text."""
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / "x.txt", corpus / ".ipynb_checkpoints", elsewhere):
        folder.mkdir(parents=True)
    (corpus / "x.txt" / "inner.txt").write_text("inner")
    (corpus / ".ipynb_checkpoints" / "inner-checkpoint.txt").write_text("an old copy")
    (corpus / "._x.txt").write_text("a resource fork")
    (elsewhere / "far.txt").write_text("far")
    (corpus / "linked").symlink_to(elsewhere)
    (corpus / "circle").symlink_to(corpus)
    assert titles_and_texts(f"text:{corpus}") == [("linked/far", "far"), ("x.txt/inner", "inner")]


def test_a_file_name_that_is_not_utf8_becomes_a_title(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("coffee")
    assert titles_and_texts(f"text:{folder}") == [(r"caf\xe9", "coffee")]
    assert len(load_corpus(f"text:{folder}").fingerprint()) == 64
    inside = tmp_path / os.fsdecode(b"d\xe9j\xe0")
    inside.mkdir()
    assert "is not UTF-8: rename" in complaint(f"text:{inside}")


def test_a_spark_folder_is_read_with_the_columns_that_its_folders_spell(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "train.parquet"
    for name, text in (("topic=a%20b/split=train", "one"), ("topic=__HIVE_DEFAULT_PARTITION__/split=test", "two")):
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.table({"text": [text]}), folder / name / "part-0.parquet")
    (folder / "_SUCCESS").touch()
    (folder / "_delta_log").mkdir()
    pq.write_table(pa.table({"add": ["no text"]}), folder / "_delta_log" / "0.checkpoint.parquet")
    for corpus in (f"parquet:{folder}", f"parquet:{tmp_path / 'data'}"):
        found = {d.text: (d.topic, d.split) for d in load_corpus(corpus).documents()}
        assert found == {"one": ("a b", "train"), "two": (None, "test")}


@pytest.mark.parametrize("name", ["part-00000-c000.json", "part-00000", "part-00000.json.gz"])
def test_parts_that_spark_wrote_count_whatever_their_endings(tmp_path: Path, name: str) -> None:
    content = json.dumps({"text": "row"}).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert "has no .jsonl file in it" in complaint(f"jsonl:{tmp_path}")
    (tmp_path / "_SUCCESS").touch()
    assert [text for _, text in titles_and_texts(f"jsonl:{tmp_path}")] == ["row"]


@pytest.mark.parametrize("name", ["gone.txt", "gone"])
def test_a_dead_link_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("here")
    (tmp_path / name).symlink_to("/nowhere/at/all")
    assert complaint(f"text:{tmp_path}").startswith(f"{tmp_path / name} is a link to /nowhere/at/all")
    assert complaint(f"text:{tmp_path / name}").startswith(f"{tmp_path / name} is a link to /nowhere/at/all")


def test_a_pipe_is_refused_before_it_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "is not a regular file" in complaint(f"text:{tmp_path}")
    assert "is not a regular file" in complaint(f"jsonl:{tmp_path / 'pipe.txt'}")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed.txt").touch(mode=0)
    assert str(tmp_path / "closed.txt") in complaint(f"text:{tmp_path}")
    (tmp_path / "folder").mkdir(mode=0)
    assert str(tmp_path / "folder") in complaint(f"text:{tmp_path}")


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_the_home_of_nobody_is_one_sentence(kind: str) -> None:
    assert "~nosuchuser" in complaint(f"{kind}:~nosuchuser/data")


# ---- encodings and compressions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["", *COMPRESSIONS])
def test_byte_order_marks_and_compressions_change_no_document(tmp_path: Path, encoding: str, ending: str) -> None:
    compress = COMPRESSIONS.get(ending, bytes)
    rows = [{"text": "größe one", "title": "A"}, {"text": "日本 two"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / f"data.jsonl{ending}").write_bytes(compress(lines.encode(encoding)))
    (tmp_path / f"poem.txt{ending}").write_bytes(compress("größe one".encode(encoding)))
    expected = [Document(title="A", text="größe one"), Document(title="data 2", text="日本 two")]
    for path in (tmp_path, tmp_path / f"data.jsonl{ending}"):
        assert list(load_corpus(f"jsonl:{path}").documents()) == expected
    assert titles_and_texts(f"text:{tmp_path}") == [("poem", "größe one")]
    assert titles_and_texts(f"text:{tmp_path / f'poem.txt{ending}'}") == [("poem 0", "größe one")]


@pytest.mark.parametrize("ending", list(COMPRESSIONS))
def test_several_compressed_streams_in_a_row_are_one_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(b"".join(COMPRESSIONS[ending](part) for part in (b"one ", b"two")))
    assert titles_and_texts(f"text:{path}") == [("a 0", "one two")]


@pytest.mark.parametrize("ending", list(COMPRESSIONS))
def test_a_compressed_file_that_is_cut_off_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    whole = COMPRESSIONS[ending](random.Random(0).randbytes(50_000).hex().encode())
    path.write_bytes(whole[: len(whole) // 2])
    assert re.match(rf"{path} cannot be read \(.*cut off", complaint(f"text:{path}"))


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_the_place_of_a_byte_that_is_no_text_is_right_in_a_long_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{'txt' if kind == 'text' else 'jsonl'}"
    line = json.dumps({"text": "word " * 2000}).encode() + b"\n"
    path.write_bytes(line * 20 + b'{"text": "caf\xe9"}\n' + line)
    assert f"{path} line 21 is not UTF-8 (byte {20 * len(line) + 13})" in complaint(f"{kind}:{path}")


def test_an_archive_is_no_text(tmp_path: Path) -> None:
    import tarfile
    import zipfile

    (tmp_path / "a.txt").write_text("text")
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.txt", "a.txt")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "a.txt", "a.txt")
    for name in ("all.tar.gz", "all.zip"):
        assert "is an archive of files: unpack it" in complaint(f"text:{tmp_path / name}")


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_numbers_and_depth_that_python_does_not_read_are_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a"})[:-1] + f', "id": {"9" * 5000}}}\n')
    assert titles_and_texts(f"jsonl:{path}") == [("a 1", "a")]
    path.write_text(f'{{"text": {"9" * 5000}}}\n')
    assert "line 1 has a text that is not text" in complaint(f"jsonl:{path}")
    path.write_text('{"text": "a"}\n{"text": "b", "more": ' + "[" * 100_000 + "\n")
    assert "line 2 is nested too deeply" in complaint(f"jsonl:{path}")


def test_a_sentence_does_not_repeat_the_document(tmp_path: Path) -> None:
    rows = {"text": ["word"] * 40_000}, {"text": "a", "split": "dev" * 1000}, {"text": "a", "title": {"a": ["b"] * 999}}
    for row in rows:
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        assert "a.jsonl line 1" in complaint(f"jsonl:{tmp_path}")
    pq.write_table(pa.table({"text": [["word"] * 40_000]}), tmp_path / "a.parquet")
    assert "column 'text' of type list<element: string>, not text" in complaint(f"parquet:{tmp_path}")
    pq.write_table(pa.table({f"column {i}": [1] for i in range(500)}), tmp_path / "a.parquet")
    assert "has no column 'text'" in complaint(f"parquet:{tmp_path}")


@pytest.mark.parametrize("blank", ["", "  ", None])
def test_blank_titles_topics_and_splits_are_none(tmp_path: Path, blank: str | None) -> None:
    rows = [{"text": f"text {i}", "title": blank, "topic": blank, "split": blank} for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(load_corpus(f"jsonl:{tmp_path}").documents())
    assert found == [Document(title=f"a {i + 1}", text=f"text {i}") for i in range(300)]


def test_one_title_for_all_documents_is_what_the_sentence_says(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i}", "title": "x"}) + "\n" for i in range(300)))
    data = DataConfig(corpus=f"jsonl:{tmp_path}", tokenizer="gpt2")
    with pytest.raises(HRSError, match=r"300 documents 0 name a split .* 1 different titles.* a title of its own"):
        open_tokens(data, tmp_path / "tokens")


def test_texts_of_other_parquet_types_are_read(tmp_path: Path) -> None:
    plain = pa.array(["größe", "two"])
    kinds = (plain.cast(pa.large_string()), plain.dictionary_encode(), plain.cast(pa.binary()), plain)
    for kind in kinds:
        pq.write_table(pa.table({"text": kind}), tmp_path / "a.parquet")
        assert titles_and_texts(f"parquet:{tmp_path}") == [("a 1", "größe"), ("a 2", "two")]
    pq.write_table(pa.table({"text": pa.array([b"a", b"caf\xe9"])}), tmp_path / "a.parquet")
    assert "row 2 is not UTF-8 (byte 3 of its text)" in complaint(f"parquet:{tmp_path}")


def test_damaged_parquet_is_named_and_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, 200))) for _ in range(20_000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=5_000, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 100_000] = bytes(100_000)
    path.write_bytes(content)
    with pytest.raises(HRSError, match=rf"{path} cannot be read after row \d\d+ \(.*it is damaged"):
        open_tokens(DataConfig(corpus=f"parquet:{path}", tokenizer="gpt2"), tmp_path / "tokens")
