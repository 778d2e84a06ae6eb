"""Corpora through ``datasets``, on local folders of data files: the same code path as the hub, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hrs.data import Corpus, load_corpus, split_of
from hrs.data.hub import articles
from hrs.errors import HRSError

WIKITEXT = """\

 = First =\x20

 Text of the first .

 = = Section = =\x20

 The legend of a table follows :
 = Home ; A = Away =\x20
 and more text .

 = Second ( film ) =\x20

 Text of the second .
"""


@pytest.fixture(autouse=True)
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def dataset(folder: Path, **splits: list[dict[str, object]]) -> Corpus:
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return load_corpus(f"hf:{folder}")


def test_articles_split_at_titles_only_and_keep_every_line() -> None:
    lines = WIKITEXT.splitlines(keepends=True)
    found = list(articles(lines))
    assert [title for title, _, _ in found] == ["First", "Second ( film )"]
    assert "".join(text for _, text, _ in found) == "".join(lines).lstrip("\n")
    assert "= Home ; A = Away =" in found[0][1]


def test_wikitext_comes_in_articles_with_its_own_splits(tmp_path: Path) -> None:
    # Rows as on the hub: one line each, blank ones empty.
    rows = [{"text": line.strip("\n") and line} for line in WIKITEXT.splitlines(keepends=True)]
    corpus = dataset(tmp_path / "wikitext", train=list(rows), validation=list(rows), test=list(rows))
    found = [(d.split, d.title) for d in corpus.documents()]
    assert found == [(s, t) for s in ("train", "validation", "test") for t in ("First", "Second ( film )")]
    assert "CC BY-SA" in corpus.licence


def test_a_dataset_with_all_splits_keeps_them(tmp_path: Path) -> None:
    def rows(split: str) -> list[dict[str, object]]:
        return [{"text": f"{split} text {i}", "title": f"{split} {i}", "topic": "t", "n": i} for i in range(40)]

    corpus = dataset(tmp_path / "full", train=rows("train"), validation=rows("validation"), test=rows("test"))
    found = list(corpus.documents())
    assert [d.split for d in found] == ["train"] * 40 + ["validation"] * 40 + ["test"] * 40
    assert found[41].title == "validation 1" and found[41].text == "validation text 1" and found[41].topic == "t"


def test_the_training_split_fills_only_the_splits_that_are_missing(tmp_path: Path) -> None:
    corpus = dataset(tmp_path / "two", train=[{"text": f"t{i}"} for i in range(300)], test=[{"text": "u"}] * 5)
    found = list(corpus.documents())
    for document in found[:300]:
        hashed = split_of(document.title)
        assert document.split == ("validation" if hashed == "validation" else "train")
    assert {d.split for d in found[300:]} == {"test"}
    assert "validation" in {d.split for d in found}


def test_the_fingerprint_follows_the_text_and_not_the_folder(tmp_path: Path) -> None:
    same = [dataset(tmp_path / name, train=[{"text": "a"}, {"text": "b"}]).fingerprint() for name in ("x", "y")]
    assert same[0] == same[1]
    assert dataset(tmp_path / "z", train=[{"text": "ab"}, {"text": ""}]).fingerprint() != same[0]


def test_datasets_that_cannot_be_used_say_what_they_have(tmp_path: Path) -> None:
    with pytest.raises(HRSError, match=r"no text column 'text' \(it has body\)"):
        dataset(tmp_path / "columns", train=[{"body": "a"}])
    with pytest.raises(HRSError, match=r"no split 'train' \(it has test\)"):
        dataset(tmp_path / "splits", test=[{"text": "a"}])


@pytest.mark.slow
def test_without_a_network_one_sentence_says_so(tmp_path: Path) -> None:
    code = (
        "from hrs.data import load_corpus\nfrom hrs.errors import HRSError\n"
        "try: load_corpus('wikitext-103')\nexcept HRSError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    message = subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip()
    assert message.startswith("corpus wikitext-103 cannot be loaded (") and "\n" not in message
    assert message.endswith("check its name and the network, or use wiki-mini, which needs neither")
