"""Memories of windows: found with the text in front of them alone, exactly, and never in their own documents."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import examples
from torch.nn import functional as F

from hrs.config import ExperimentConfig
from hrs.data import TokenStore
from hrs.data.documents import SPLITS
from hrs.data.tokenization import build_tokenizer
from hrs.data.windows import evaluation_windows
from hrs.errors import HRSError
from hrs.presets import experiment
from hrs.retrieval.bank import SPARE, MemoryBank, open_bank, weights_fingerprint
from hrs.retrieval.bank.chunks import Chunks, cut
from hrs.retrieval.bank.keys import engram_similarities, nearest, word_similarities
from hrs.retrieval.bank.overlap import documents_that_share
from hrs.training import Runtime, load_model, train

T, C, D, K, S = 32, 8, 16, 3, 18
SMALL = {
    "data.tokenizer": "bpe:300", "model.d_model": D, "model.n_heads": 2, "model.d_ff": 32, "model.max_seq_len": T,
    "training.steps": 2, "training.validations": 0,
}  # fmt: skip

Open = Callable[..., MemoryBank]


@pytest.fixture(scope="module")
def base(small_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("base")
    list(train(experiment("dense_baseline", "micro", overrides=SMALL), small_store, folder, Runtime(device="cpu")))
    return folder


def config_for(base: Path, **retrieval: object) -> ExperimentConfig:
    named = {"base": "base", "fingerprint": weights_fingerprint(load_model(base)[0]), "chunk_tokens": C}
    named |= {"neighbours": K} | retrieval
    changes = {f"training.retrieval.{name}": value for name, value in named.items()}
    return experiment("dense_retrieved", "micro", overrides=SMALL | {"model.engram.slots": S} | changes)


@pytest.fixture(scope="module")
def bank(base: Path, small_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> MemoryBank:
    return open_bank(config_for(base), small_store, base, tmp_path_factory.mktemp("banks"))


def windows(store: TokenStore, split: str, stride: int = 5) -> np.ndarray:
    return np.array([start for start, _ in evaluation_windows(len(store.split(split)), T, stride)])


# ---- chunks ----------------------------------------------------------------------------------------------------------


def test_chunks_are_whole_and_of_one_document_each(small_store: TokenStore) -> None:
    text = small_store.train
    chunks = cut(text, C)
    for end, document in zip(chunks.ends, chunks.documents, strict=True):
        places = np.arange(end - C, end)
        assert (text.document_of(places) == document).all()
        assert small_store.eot_id not in text.tokens[places]
    counts = np.bincount(chunks.documents, minlength=len(text.topic_ids))
    assert counts.tolist() == [(b - 1 - a) // C for a, b in itertools.pairwise(text.document_starts.tolist())]


@given(start=st.integers(0, 60), document=st.integers(0, 3))
def test_the_chunk_before_a_position_is_the_last_whole_one_of_its_document(start: int, document: int) -> None:
    ends, documents = np.array([9, 17, 25, 40, 48]), np.array([0, 0, 0, 2, 2])
    expected = max((i for i in range(5) if ends[i] <= start and documents[i] == document), default=-1)
    if expected >= 0 and any(e <= start and d > document for e, d in zip(ends, documents, strict=True)):
        return  # a position behind a later document's chunk is not one of this document
    found = Chunks(ends=ends, documents=documents).before(np.array([start]), np.array([document]))
    assert found.tolist() == [expected]


# ---- what is found ---------------------------------------------------------------------------------------------------


@examples(30)
@given(seed=st.integers(0, 999), n_documents=st.integers(1, 6), exclude=st.booleans())
def test_search_is_exact_takes_one_chunk_of_each_document_and_none_of_its_own(
    seed: int, n_documents: int, exclude: bool
) -> None:
    rng = np.random.default_rng(seed)
    documents = np.sort(rng.integers(n_documents, size=12))
    # Whole numbers whose products sum to less than 2^24 are exact in float32, in any order of adding.
    keys = rng.integers(-1000, 1001, (12, 4)).astype(np.float32)
    queries = keys if exclude else rng.integers(-1000, 1001, (5, 4)).astype(np.float32)
    assume(all(len(set(row)) == 12 for row in queries @ keys.T))  # of equal ones any may come first
    found = nearest(
        lambda rows: torch.from_numpy(queries[rows] @ keys.T),
        len(queries),
        documents,
        3,
        documents if exclude else None,
    )
    for i, row in enumerate(found):
        best: dict[int, int] = {}
        for j in np.argsort(-(keys @ queries[i]), kind="stable"):
            if not (exclude and documents[j] == documents[i]):
                best.setdefault(int(documents[j]), int(j))
        expected = list(best.values())[:3]
        assert row.tolist() == expected + [-1] * (3 - len(expected))


@pytest.mark.parametrize("span", [1, 3])
def test_engrams_are_compared_whitened_over_their_span(span: int, small_store: TokenStore) -> None:
    """Reference: chunk by chunk. Keys of the training text then have no direction that counts more than another."""
    chunks = {name: cut(small_store.split(name), C) for name in SPLITS}
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((D, D)) * np.linspace(0.1, 3, D)
    engrams = {name: (rng.standard_normal((len(c), D)) @ mixing + 5).astype(np.float32) for name, c in chunks.items()}
    means = {
        name: np.array([engrams[name][_same(c, i, span)].mean(0) for i in range(len(c))]) for name, c in chunks.items()
    }
    centre, covariance = means["train"].mean(0), np.cov(means["train"].T)
    ridge = 1e-3 * np.trace(covariance) / D * np.eye(D)
    inverse = np.linalg.inv(covariance + ridge)
    for name, similarity in engram_similarities(engrams, chunks, span).items():
        a, b = means[name] - centre, means["train"] - centre
        norms = (
            np.sqrt(np.einsum("nd,de,ne->n", a, inverse, a))[:, None],
            np.sqrt(np.einsum("nd,de,ne->n", b, inverse, b)),
        )
        expected = a @ inverse @ b.T / norms[0] / norms[1]
        np.testing.assert_allclose(similarity(slice(None)).numpy(), expected, atol=1e-4)


def _same(chunks: Chunks, i: int, span: int) -> list[int]:
    return [j for j in range(max(0, i - span + 1), i + 1) if chunks.documents[j] == chunks.documents[i]]


@pytest.mark.parametrize("span", [1, 3])
def test_words_are_compared_by_root_counts_and_rarity(span: int, small_store: TokenStore) -> None:
    chunks = {name: cut(small_store.split(name), C) for name in SPLITS}
    bags = {
        name: np.array(
            [np.bincount(small_store.split(name).tokens[e - C : e], minlength=small_store.vocab_size) for e in c.ends]
        )
        for name, c in chunks.items()
    }
    rarity = np.log(len(bags["train"]) / (1 + (bags["train"] > 0).sum(0))).clip(0)
    keys = {}
    for name, c in chunks.items():
        rows = np.sqrt([bags[name][_same(c, i, span)].sum(0) for i in range(len(c))]) * rarity
        keys[name] = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    for name, similarity in word_similarities(small_store, chunks, C, span).items():
        np.testing.assert_allclose(similarity(slice(3, 9)).numpy(), keys[name][3:9] @ keys["train"].T, atol=1e-5)


def test_words_find_the_same_topic(base: Path, small_store: TokenStore, tmp_path: Path) -> None:
    """The three topics of this corpus have words of their own."""
    bank = open_bank(config_for(base, keys="words"), small_store, base, tmp_path)
    starts = windows(small_store, "validation")
    found = bank.neighbours_of("validation", starts)
    mine = small_store.validation.topic_ids[small_store.validation.document_of(starts + 1)][:, None]
    theirs = small_store.train.topic_ids[bank.chunks["train"].documents[np.maximum(found, 0)]]
    assert (mine == theirs)[found >= 0].mean() > 0.95


def test_neighbours_are_never_of_a_document_that_the_window_touches(bank: MemoryBank, small_store: TokenStore) -> None:
    """Every training window, those that reach into the next documents and those that are given a stranger's, too."""
    text, starts = small_store.train, windows(small_store, "train", 3)
    touched_later = 0
    for seekers in (None, np.roll(starts, 1), np.roll(starts, 40)):
        found = bank.neighbours_of("train", starts, seekers)
        assert (found >= 0).any(1).mean() > 0.3
        for start, row in zip(starts, found, strict=True):
            own = set(text.document_of(np.arange(start + 1, start + T + 1)).tolist())
            touched_later += len(own) > 1
            assert not own & set(bank.chunks["train"].documents[row[row >= 0]].tolist())
    assert touched_later > 100


def test_exclusion_at_reading_removes_what_search_had_found(bank: MemoryBank, small_store: TokenStore) -> None:
    """Without it some windows would be given a document that they reach into later."""
    text, starts = small_store.train, windows(small_store, "train", 3)
    query = bank.chunks["train"].before(starts, text.document_of(starts + 1))
    given_later = 0
    for start, chunk in zip(starts[query >= 0], query[query >= 0], strict=True):
        own = set(text.document_of(np.arange(start + 1, start + T + 1)).tolist())
        first = bank.found["train"][chunk][:K]
        given_later += bool(own & set(bank.chunks["train"].documents[first[first >= 0]].tolist()))
    assert given_later > 0


def test_windows_without_text_of_their_document_in_front_have_no_memory(
    bank: MemoryBank, small_store: TokenStore
) -> None:
    text = small_store.validation
    starts = text.document_starts[:-1] - 1  # each begins with the end of text in front of its document
    starts = starts[starts + T < len(text)]
    for offset in range(C + 1):
        assert not bank.read("validation", starts + offset).any()
    assert bank.read("validation", starts + C + 1).any((1, 2)).all()


def changed_from(store: TokenStore, position: int) -> TokenStore:
    """The validation text with every token at or after ``position`` another one; ends of text stay."""
    tokens = np.array(store.validation.tokens)
    later = np.arange(len(tokens)) >= position
    moved = np.where(tokens == store.eot_id, tokens, 1 + (tokens + 7) % 200)
    split = dataclasses.replace(store.validation, tokens=np.where(later, moved, tokens).astype(tokens.dtype))
    return dataclasses.replace(store, validation=split, fingerprint=f"{store.fingerprint}{position}")


def test_no_token_of_a_window_has_a_say_in_its_memory(
    base: Path, bank: MemoryBank, small_store: TokenStore, tmp_path: Path
) -> None:
    """The audit of the way to the model: another text from a window's first token on gives it the same bits, and text
    in front of it gives it others."""
    starts = windows(small_store, "validation", 7)
    memory = bank.read("validation", starts)
    for start in starts[memory.any((1, 2))][::12]:
        here = starts == start
        after = open_bank(config_for(base), changed_from(small_store, int(start)), base, tmp_path)
        assert np.array_equal(after.read("validation", starts[here]), memory[here])
        before = open_bank(config_for(base), changed_from(small_store, int(start) - 2 * C), base, tmp_path)
        assert not np.array_equal(before.read("validation", starts[here]), memory[here])


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["tokens", "states", "means"])
def test_slots_are_what_the_base_makes_of_the_chunk_and_the_one_after_it(
    values: str, base: Path, small_store: TokenStore, tmp_path: Path
) -> None:
    """Reference: one piece of one document at a time, token by token."""
    bank = open_bank(config_for(base, values=values), small_store, base, tmp_path) if values != "means" else None
    if bank is None:
        config = config_for(base, values=values, neighbours=1)
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, engram=dataclasses.replace(config.model.engram, slots=8))
        )
        bank = open_bank(config, small_store, base, tmp_path)
    model, _ = load_model(base)
    text, chunks, h = small_store.train, bank.chunks["train"], bank.slots.shape[1]
    for chunk in (0, 1, 5, len(chunks) - 1):
        document = int(chunks.documents[chunk])
        nth = int((chunks.ends[chunk] - text.document_starts[document]) // C) - 1
        start = int(text.document_starts[document]) + nth // (T // C) * T
        ids = torch.from_numpy(text.tokens[start : int(chunks.ends[chunk])].astype(np.int64))
        with torch.no_grad():
            output = model(ids[None])
        states, scores = output.hidden[0], output.logits[0].log_softmax(-1)
        places = range(len(ids) - C, len(ids))
        if values == "means":
            expected = [s.mean(0) for s in states[-C:].split(C // h)]
        else:
            first = [p for p in places if ids[p] not in ids[places[0] : p] and p > 0]
            best = sorted(first, key=lambda p: float(scores[p - 1, ids[p]]))[:h]
            unit = lambda v: F.rms_norm(v, (D,))  # noqa: E731
            expected = [
                states[p] if values == "states" else unit(states[p - 1]) + unit(model.embedding.weight[ids[p]])
                for p in best
            ]
        found = torch.from_numpy(bank.slots[chunk].astype(np.float32))
        wanted = torch.stack([F.rms_norm(v, (D,)) for v in expected]).detach()
        torch.testing.assert_close(found[: len(wanted)], wanted, rtol=2e-3, atol=2e-3)  # they are kept in 16 bits
        assert not found[len(wanted) :].any()


def test_reading_gives_neighbours_best_first_each_with_its_continuation(
    bank: MemoryBank, small_store: TokenStore
) -> None:
    starts = windows(small_store, "validation")
    memory, found = bank.read("validation", starts), bank.neighbours_of("validation", starts)
    assert memory.shape == (len(starts), S, D) and memory.dtype == np.float32 and bank.n_slots == S
    documents, h = bank.chunks["train"].documents, bank.slots.shape[1]
    alone = 0
    for row, chunks in zip(memory.reshape(-1, K, 2, h, D), found, strict=True):
        for slots, chunk in zip(row, chunks, strict=True):
            has_next = 0 <= chunk < len(documents) - 1 and documents[chunk + 1] == documents[chunk]
            assert np.array_equal(slots[0], bank.slots[chunk].astype(np.float32) if chunk >= 0 else 0 * slots[0])
            assert np.array_equal(slots[1], bank.slots[chunk + 1].astype(np.float32) if has_next else 0 * slots[1])
            alone += chunk >= 0 and not has_next
    assert alone > 0


def test_a_stranger_brings_the_memory_of_its_own_window(bank: MemoryBank, small_store: TokenStore) -> None:
    starts = windows(small_store, "validation")
    seekers = np.roll(starts, 9)
    assert np.array_equal(bank.read("validation", starts, seekers), bank.read("validation", seekers))


# ---- keeping and refusing --------------------------------------------------------------------------------------------


def test_a_bank_is_built_once_and_again_if_it_is_damaged(base: Path, small_store: TokenStore, tmp_path: Path) -> None:
    first = open_bank(config_for(base), small_store, base, tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = open_bank(config_for(base, memory="shuffled"), small_store, base, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    (folder / "train.slots.npy").write_bytes(b"cut off")
    third = open_bank(config_for(base), small_store, base, tmp_path)
    flipped = bytearray((folder / "train.found.npy").read_bytes())
    flipped[-1] ^= 1
    (folder / "train.found.npy").unlink()  # the third bank maps it
    (folder / "train.found.npy").write_bytes(flipped)
    fourth = open_bank(config_for(base), small_store, base, tmp_path)
    for bank in (again, third, fourth):
        assert np.array_equal(bank.found["train"], first.found["train"])
    assert first.found["train"].shape[1] == K + SPARE
    open_bank(config_for(base, values="states"), small_store, base, tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_what_does_not_fit_is_refused(base: Path, small_store: TokenStore, tmp_path: Path) -> None:
    for changes, message in (
        ({"fingerprint": "0" * 16}, "has fingerprint .* and training.retrieval.fingerprint says 0000"),
        ({"neighbours": 4}, r"engram.slots 18 must be a multiple of 2 \* training.retrieval.neighbours = 8"),
        ({"values": "means"}, "8 do not make 3 equal parts"),
        ({"chunk_tokens": 33}, "33 is longer than max_seq_len 32"),
    ):
        with pytest.raises(HRSError, match=message):
            open_bank(config_for(base, **changes), small_store, base, tmp_path)
    with pytest.raises(HRSError, match="does not exist"):
        open_bank(config_for(base), small_store, tmp_path / "nowhere", tmp_path)
    with pytest.raises(HRSError, match="belong together"):
        config_for(base, fingerprint="")


def test_a_base_reads_only_the_ids_that_it_learned(base: Path, small_store: TokenStore, tmp_path: Path) -> None:
    other = build_tokenizer("bpe:270", iter(["quite other words than those of the corpus"] * 9))
    with pytest.raises(HRSError, match="learned with another tokenizer"):
        open_bank(config_for(base), dataclasses.replace(small_store, tokenizer=other), base, tmp_path)


def test_the_fingerprint_is_of_the_weights(base: Path) -> None:
    model, _ = load_model(base)
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(load_model(base)[0])
    with torch.no_grad():
        model.blocks[0].mlp.output.weight[0, 0] += 1e-6
    assert weights_fingerprint(model) != before


def test_documents_that_share_text_with_their_memories_are_found(bank: MemoryBank, small_store: TokenStore) -> None:
    """A text that is a copy of its first neighbour's shares it; twelve tokens in a row are not shared by chance here,
    one is always."""
    assert documents_that_share(bank, "validation", T // 2, 1).sum() > 5
    known = documents_that_share(bank, "validation", T // 2, 24)
    start = int(
        windows(small_store, "validation")[bank.read("validation", windows(small_store, "validation")).any((1, 2))][0]
    )
    chunk = int(bank.neighbours_of("validation", np.array([start]))[0, 0])
    tokens = np.array(small_store.validation.tokens)
    copied = small_store.train.tokens[bank.span(chunk)][:16]
    tokens[start + 4 : start + 4 + len(copied)] = copied
    store = dataclasses.replace(small_store, validation=dataclasses.replace(small_store.validation, tokens=tokens))
    found = documents_that_share(dataclasses.replace(bank, store=store), "validation", 5, len(copied))
    assert found[small_store.validation.document_of(start + 4)]
    assert found.sum() < len(found) and known.sum() <= found.sum()
