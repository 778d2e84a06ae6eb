"""Duplicates of documents against slow, obvious references, and what is done about them."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from hrs.config import DataConfig
from hrs.data import TokenStore, data_fingerprint, open_tokens
from hrs.data.documents import SPLITS
from hrs.data.duplicates import NEAR, PAIRS, SHINGLE, Duplicates, DuplicateScan

Row = tuple[str, str]
FULL_WIDTH = "\uff42 C"
VOCABULARY = [f"word{i}" for i in range(400)]


def scanned(rows: list[Row]) -> DuplicateScan:
    scan = DuplicateScan()
    for split, text in rows:
        scan.add(split, text)  # type: ignore[arg-type]
    return scan


def jaccard(a: str, b: str) -> float:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}

    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def counted_slowly(rows: list[Row]) -> tuple[dict[str, int], dict[str, int]]:
    """The definition, pair by pair."""
    exact, near = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for i, (split, text) in enumerate(rows):
        earlier = [other for s, other in rows[:i] if s == split]
        if any(other.lower().split() == text.lower().split() for other in earlier):
            exact[split] += 1
        elif any(jaccard(text, other) >= NEAR for other in earlier):
            near[split] += 1
    for a, b in PAIRS:
        theirs = [text for split, text in rows if split == b]
        same = [any(t.lower().split() == text.lower().split() for t in theirs) for s, text in rows if s == a]
        alike = [any(jaccard(text, t) >= NEAR for t in theirs) for s, text in rows if s == a]
        exact[f"{a} in {b}"] = sum(same)
        near[f"{a} in {b}"] = sum(n and not s for n, s in zip(alike, same, strict=True))
    return exact, near


def changed(text: str, draw: random.Random, n_words: int) -> str:
    words = text.split()
    for place in draw.sample(range(len(words)), n_words):
        words[place] = draw.choice(VOCABULARY)
    return " ".join(words)


def test_counts_equal_those_of_all_pairs() -> None:
    """Texts are far from the threshold on either side, where the estimate leaves no doubt."""
    draw = random.Random(0)
    rows: list[Row] = []
    for _ in range(60):
        text = " ".join(draw.choices(VOCABULARY, k=300))
        rows.append((draw.choice(SPLITS), text))
        for kind in draw.choices(("none", "copy", "shout", "near", "far"), k=3):
            if kind != "none":
                made = {"copy": text, "shout": f"  {text.upper()}\n", "near": changed(text, draw, 1)}
                rows.append((draw.choice(SPLITS), made.get(kind) or changed(text, draw, 120)))
    for (_, a), (_, b) in itertools.combinations(rows, 2):
        assert not 0.5 < jaccard(a, b) < 0.92
    found, removed = scanned(rows).found()
    assert (found.exact, found.near) == counted_slowly(rows)
    assert found.exact["train"] > 3 and found.near["validation in train"] > 3, "the draw has something to find"
    assert len(removed) == 0 and found.documents == {s: sum(r[0] == s for r in rows) for s in SPLITS}


@examples(50)
@given(
    st.lists(
        st.tuples(st.sampled_from(SPLITS), st.sampled_from(["a", "A ", "b c", FULL_WIDTH, "", "日本", "日本 "])),
        max_size=12,
    )
)
def test_exact_duplicates_of_short_texts_are_counted_and_removed(rows: list[Row]) -> None:
    normal = {"A ": "a", FULL_WIDTH: "b c", "日本 ": "日本"}
    plain = [(split, normal.get(text, text)) for split, text in rows]
    found, _ = scanned(rows).found()
    exact, _ = counted_slowly(plain)
    assert found.exact == exact
    after, removed = scanned(rows).found("exact")
    evaluated = {text for split, text in plain if split != "train"}
    assert removed.tolist() == [i for i, (s, text) in enumerate(plain) if s == "train" and text in evaluated]
    assert after.exact["validation in train"] == after.exact["test in train"] == 0 and after.removed == len(removed)


def test_text_without_spaces_is_compared_by_characters() -> None:
    draw = random.Random(1)
    text = "".join(chr(0x4E00 + draw.randrange(2000)) for _ in range(500))
    found, _ = scanned([("train", text), ("validation", f"{text[:-2]}的的"), ("test", text[::-1])]).found()
    assert found.near["validation in train"] == 1 and found.near["test in train"] == 0


def test_a_million_copies_of_one_text_are_no_million_comparisons() -> None:
    scan = scanned(
        [("validation", "the same words over and over again"), ("train", "The same words over and over again")]
    )
    scan._splits *= 500_000
    scan._texts *= 500_000
    found, _ = scan.found()
    assert found.exact["validation in train"] == 500_000


def test_nothing_is_found_in_nothing() -> None:
    found, removed = DuplicateScan().found("near")
    assert found.sentence() == "" and len(removed) == 0 and found.validation_overlap == 0


# ---- stores ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 validation documents that are all in the training text, half of them with a word changed."""
    draw = random.Random(2)
    folder = tmp_path_factory.mktemp("leaking")
    rows = [{"text": " ".join(draw.choices(VOCABULARY, k=120)), "split": "train"} for _ in range(100)]
    for i in range(36):
        text = rows[i]["text"] if i % 2 else changed(rows[i]["text"], draw, 1)
        rows.append({"text": text, "split": "validation"})
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def store_of(leaking: Path, deduplicate: str) -> TokenStore:
    data = DataConfig(corpus=f"jsonl:{leaking / 'a.jsonl'}", tokenizer="bpe:300", deduplicate=deduplicate)
    return open_tokens(data, leaking / "tokens")


def test_an_overlap_is_said_once_and_kept_with_the_tokens(leaking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = store_of(leaking, "none")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "of 36 validation documents 18 exactly and 18 nearly are in train too" in said[0]
    assert "data.deduplicate" in said[0]
    again = store_of(leaking, "none")
    assert capsys.readouterr().err == ""
    assert isinstance(again.duplicates, Duplicates) and again.duplicates == store.duplicates
    assert again.duplicates.validation_overlap == 1


@pytest.mark.parametrize(("deduplicate", "n_left", "overlap"), [("exact", 82, 0.5), ("near", 64, 0.0)])
def test_deduplication_takes_out_of_training_what_is_evaluated(
    leaking: Path, deduplicate: str, n_left: int, overlap: float
) -> None:
    store, whole = store_of(leaking, deduplicate), store_of(leaking, "none")
    assert len(store.train.titles) == n_left
    assert store.validation.titles == whole.validation.titles
    assert store.duplicates is not None and store.duplicates.removed == 100 - n_left
    assert store.duplicates.validation_overlap == overlap
    assert store.fingerprint != whole.fingerprint
    assert [t for t in whole.train.titles if t in set(store.train.titles)] == store.train.titles


def test_a_corpus_without_duplicates_is_built_in_silence(
    small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {
        mode: DataConfig(corpus=f"jsonl:{small_corpus}", tokenizer="bpe:300", deduplicate=mode)
        for mode in ("none", "near")
    }
    stores = {mode: open_tokens(config, tmp_path) for mode, config in data.items()}
    assert capsys.readouterr().err == ""
    assert np.array_equal(stores["none"].train.tokens, stores["near"].train.tokens)
    assert data_fingerprint(data["none"]) != data_fingerprint(data["near"])
