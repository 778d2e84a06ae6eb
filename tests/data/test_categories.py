"""Labels of tokens: exact ones against a walk through the documents, estimated ones against the original's recipe."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hrs.config import CategoryConfig, DataConfig
from hrs.data import TokenSplit, TokenStore, categories, open_tokens
from hrs.data.categories import document_labels, texts_of, token_labels
from hrs.errors import HRSError

EXACT, ESTIMATED = CategoryConfig(n_classes=4), CategoryConfig(n_classes=4, labels="estimated")
SEA, SKY = "wave tide ship harbour storm sail anchor deck", "cloud star moon wind plane comet orbit dawn"

Rows = list[dict[str, str]]


@pytest.fixture
def store_of(tmp_path: Path) -> Callable[[Rows], TokenStore]:
    """``store_of(rows)``: documents as a token store; a split that is not named is training."""

    def build(rows: Rows) -> TokenStore:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        held_out = {"title": "held out", "text": "The text of another day.", "split": "validation"}
        documents = [{"title": str(i), "split": "train"} | row for i, row in enumerate(rows)]
        if all(row["split"] != "validation" for row in documents):
            documents.append(held_out)
        path.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
        return open_tokens(DataConfig(corpus=f"jsonl:{path}", tokenizer="bpe:257"), tmp_path / "tokens")

    return build


def by_token(split: TokenSplit, labels: list[int]) -> list[int]:
    """The label of every token but the last: a document's own from the end of text in front of it on."""
    found = []
    for i, label in enumerate(labels):
        found += [label] * int(split.document_starts[i + 1] - split.document_starts[i])
    return found


# ---- topics of the corpus --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_exact_labels_are_the_topics_of_the_documents(small_store: TokenStore, name: str) -> None:
    split = small_store.split(name)
    labels = token_labels(small_store, name, EXACT)
    expected = by_token(split, [small_store.topics.index(title.split()[0]) for title in split.titles])
    assert labels.at(np.arange(len(split) - 1)).tolist() == expected
    assert labels.counts(len(split) - 1).tolist() == np.bincount(expected).tolist()


def test_documents_without_topic_have_no_label(store_of: Callable[[Rows], TokenStore]) -> None:
    store = store_of(
        [{"text": "wave tide", "topic": "sea"}, {"text": "no man's land"}, {"text": "star", "topic": "sky"}]
    )
    labels = token_labels(store, "train", EXACT)
    assert labels.at(np.arange(len(store.train) - 1)).tolist() == by_token(store.train, [0, -1, 1])
    own = np.diff(store.train.document_starts)
    assert labels.counts(len(store.train) - 1).tolist() == [own[0], own[2]]


def test_more_topics_than_classes_are_refused(small_store: TokenStore) -> None:
    with pytest.raises(
        HRSError, match=r"has 3 topics and the categorisation head 2 classes: set .*n_classes=3 or more"
    ):
        token_labels(small_store, "train", CategoryConfig(n_classes=2))


# ---- clusters --------------------------------------------------------------------------------------------------------


def two_kinds(n: int, **fields: str) -> Rows:
    """Documents of words of the sea and of the sky in turn."""
    draw = random.Random(len(fields))
    return [{"text": " ".join(draw.choices((SEA, SKY)[i % 2].split(), k=30)), **fields} for i in range(n)]


def test_clusters_separate_what_has_no_word_in_common(store_of: Callable[[Rows], TokenStore]) -> None:
    store = store_of(two_kinds(40) + two_kinds(6, split="validation") + two_kinds(4, split="test", note="x"))
    labels = document_labels(store, 2)
    sea, sky = labels["train"][:2]
    assert {sea, sky} == {0, 1}
    for name, n in (("train", 40), ("validation", 6), ("test", 4)):
        assert labels[name].tolist() == [sea, sky] * (n // 2)


def test_clusters_are_found_on_training_documents_alone_and_always_the_same(
    store_of: Callable[[Rows], TokenStore],
) -> None:
    store = store_of(two_kinds(30) + two_kinds(4, split="validation"))
    before = document_labels(store, 5)
    assert document_labels(store, 5) is before, "kept for the next caller"
    categories._labels_by_store.clear()
    again = document_labels(store, 5)
    other = document_labels(replace(store, validation=store.train), 5)
    for name in ("train", "validation", "test"):
        assert np.array_equal(before[name], again[name])
    assert np.array_equal(other["train"], before["train"]) and np.array_equal(other["validation"], before["train"])
    assert set(before["train"]) <= set(range(5)) and len(before["test"]) == 0


def test_texts_come_back_from_their_tokens(small_store: TokenStore, small_corpus: Path) -> None:
    rows = map(json.loads, small_corpus.read_text().splitlines())
    written = {row["title"]: row["text"] for row in rows}
    split = small_store.validation
    assert list(texts_of(split, small_store.tokenizer)) == [written[title] for title in split.titles]


def test_too_few_documents_to_cluster_are_refused(store_of: Callable[[Rows], TokenStore]) -> None:
    store = store_of(two_kinds(5))
    with pytest.raises(
        HRSError, match=r"5 training documents without topics do not make 50 clusters: set .*n_classes=5"
    ):
        document_labels(store, 50)


def test_documents_without_common_words_are_refused(store_of: Callable[[Rows], TokenStore]) -> None:
    store = store_of([{"text": f"word{i} term{i}"} for i in range(6)])
    with pytest.raises(HRSError, match=r"too few words in common to be clustered \(.*\): use a corpus with topics"):
        document_labels(store, 2)


# ---- the original's estimate -----------------------------------------------------------------------------------------

LINES = 24
"""Per document, every second one empty."""


def with_empty_lines(n: int, **fields: str) -> Rows:
    draw = random.Random(1)
    texts = [
        "\n".join(" ".join(draw.choices(SEA.split(), k=9)) if i % 2 else "" for i in range(LINES)) for _ in range(n)
    ]
    return [{"text": text, "topic": "abcd"[i % 4], **fields} for i, text in enumerate(texts)]


def original(split: TokenSplit, texts: list[str], labels: list[int], documents_per_chunk: int) -> list[int]:
    """The original's loop, token by token, for chunks that end where documents do."""
    found: list[int] = []
    for first in range(0, len(texts), documents_per_chunk):
        chosen = range(first, min(first + documents_per_chunk, len(texts)))
        begin = int(split.document_starts[first]) if first else 0
        n_tokens = int(split.document_starts[chosen[-1] + 1]) - begin
        lines = [(len(line), labels[i]) for i in chosen for line in texts[i].split("\n")]
        n_characters = sum(length for length, _ in lines)
        assigned = 0
        for length, label in lines:
            tokens = max(1, round(n_tokens * length / n_characters))
            found += [label] * tokens
            assigned += tokens
        found += [lines[-1][1]] * (n_tokens - assigned)  # nothing, when too many were assigned
    return found[: len(split)]


@pytest.mark.parametrize("documents_per_chunk", [1, 3, 100])
def test_estimated_labels_follow_the_originals_loop(
    store_of: Callable[[Rows], TokenStore], monkeypatch: pytest.MonkeyPatch, documents_per_chunk: int
) -> None:
    rows = with_empty_lines(20)
    store = store_of(rows)
    monkeypatch.setattr(categories, "LINES_PER_CHUNK", documents_per_chunk * LINES)
    found = token_labels(store, "train", ESTIMATED).at(np.arange(len(store.train))).tolist()
    assert found == original(store.train, [r["text"] for r in rows], [i % 4 for i in range(20)], documents_per_chunk)


def wrong_share(store: TokenStore) -> list[float]:
    """Share of the tokens of each training document whose estimated label is not its own."""
    positions = np.arange(len(store.train) - 1)
    wrong = token_labels(store, "train", ESTIMATED).at(positions) != token_labels(store, "train", EXACT).at(positions)
    return [float(part.mean()) for part in np.split(wrong, store.train.document_starts[1:-1] - 1)]


def test_estimated_labels_drift_through_text_with_empty_lines(
    store_of: Callable[[Rows], TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines with text get all tokens, and empty ones another each: the surplus adds up over chunks."""
    rows = with_empty_lines(120)
    for row in rows:
        row["text"] = row["text"].replace("\n\n", "\n\n\n\n\n")
    monkeypatch.setattr(categories, "LINES_PER_CHUNK", 50)  # chunks end inside of documents
    store = store_of(rows)
    assert len(store.train.tokens) > 10_000
    wrong = wrong_share(store)
    assert np.mean(wrong[:2]) < 0.5 < np.mean(wrong[60:]), wrong


def test_estimated_labels_hold_where_all_lines_are_alike(
    store_of: Callable[[Rows], TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(["storm and sail"] * 10)
    monkeypatch.setattr(categories, "LINES_PER_CHUNK", 34)
    wrong = wrong_share(store_of([{"text": text, "topic": "abcd"[i % 4]} for i in range(40)]))
    assert max(wrong) < 0.02, wrong


def test_held_out_titles_are_looked_up_in_training_text(store_of: Callable[[Rows], TokenStore]) -> None:
    """Unknown at first: label 0; known: the training document's; unknown again: the one before, gone stale."""
    line, fields = "storm and sail", {"split": "validation"}
    rows = [{"text": line, "title": f"t{i}", "topic": "abcd"[i]} for i in range(4)]
    held_out = [("new", "d"), ("t2", "a"), ("newer", "d"), ("t1", "c")]
    rows += [{"text": line, "title": title, "topic": topic, **fields} for title, topic in held_out]
    store = store_of(rows)
    positions = np.arange(len(store.validation) - 1)
    assert token_labels(store, "validation", EXACT).at(positions).tolist() == by_token(store.validation, [3, 0, 3, 2])
    expected = by_token(store.validation, [0, 2, 2, 1])
    assert token_labels(store, "validation", ESTIMATED).at(positions).tolist() == expected
