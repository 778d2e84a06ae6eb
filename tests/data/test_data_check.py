"""``hrs data check``: what a corpus holds, counted against its definition."""

import json
import sys
from pathlib import Path

import pytest

from hrs import cli
from hrs.config import DataConfig
from hrs.data import load_corpus, open_tokens
from hrs.data.check import HUGE_BYTES, PROBLEMS, check_corpus, format_check, problems_of
from hrs.data.tokenization import build_tokenizer


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("Größe, café, 日本\t\r\n", []),
        (" \n", ["empty"]),
        ("x" * (HUGE_BYTES + 1), ["huge"]),
        ("日" * (HUGE_BYTES // 3 + 1), ["huge"]),
        ("x" * HUGE_BYTES, []),
        ("caf\ufffd", ["replaced"]),
        ("é".encode().decode("latin-1"), ["mangled"]),
        ("it\u2019s".encode().decode("cp1252"), ["mangled"]),
        ("a\0b", ["control"]),
        ("a\ufeffb", ["mark"]),
    ],
)
def test_what_is_odd_about_a_text_has_a_name(text: str, problems: list[str]) -> None:
    assert problems_of(text) == problems
    assert set(problems) <= set(PROBLEMS)


def test_sizes_are_those_of_the_token_store(small_corpus: Path, tmp_path: Path) -> None:
    store = open_tokens(DataConfig(corpus=f"jsonl:{small_corpus}", tokenizer="bpe:300"), tmp_path)
    check = check_corpus(load_corpus(f"jsonl:{small_corpus}"), store.tokenizer)
    for name, size in check.sizes.items():
        split = store.split(name)
        assert (size.documents, size.n_bytes) == (len(split.titles), split.n_bytes.sum())
        assert size.tokens == len(split) - 1
    assert check.duplicates == store.duplicates
    assert "problems: none" in format_check(check)


def test_the_command_prints_sizes_duplicates_and_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"text": "one two three", "title": "A", "split": "train"},
        {"text": "One  two three", "title": "B", "split": "validation"},
        {"text": "caf\ufffd", "title": "C", "split": "test"},
        {"text": "", "title": "D"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["hrs", "data", "check", f"jsonl:{tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().out
    tokenizer = build_tokenizer("gpt2", iter(()))
    assert ended.value.code in (0, None)
    assert [line.split() for line in said.splitlines()[2:5]] == [
        [row["split"], "1", str(len(row["text"].encode())), str(len(tokenizer.encode(row["text"])) + 1)]
        for row in rows[:3]
    ]
    assert "of 1 validation documents 1 exactly and 0 nearly are in train too" in said
    assert "1 documents: no text" in said and "(the first is 'D')" in said
    assert "U+FFFD" in said and "(the first is 'C')" in said
