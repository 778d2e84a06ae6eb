"""Token stores: exact labels, built once, whole or not at all, and never silently wrong."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hrs.files
from hrs.config import DataConfig
from hrs.data import TokenStore, absolute_corpus, data_fingerprint, load_corpus, open_tokens, split_of, stored_tokens
from hrs.errors import HRSError

WORDS = ["the", "of", "river", "house", "mountain", "walks", "under", "blue", "日本", "café", "😀", "<|endoftext|>"]


def write_corpus(path: Path, n_documents: int = 60, **fields: str) -> DataConfig:
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(n_documents):
            text = " ".join(rng.choice(WORDS, size=rng.integers(1, 40)))
            row = {"text": text, "title": f"document {i}", "topic": ("a", "b", None)[i % 3], **fields}
            file.write(json.dumps(row) + "\n")
    return DataConfig(corpus=f"jsonl:{path}", tokenizer="bpe:280")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Path, TokenStore]:
    folder = tmp_path_factory.mktemp("built")
    data = write_corpus(folder / "corpus.jsonl")
    return data, folder / "tokens", open_tokens(data, folder / "tokens")


def test_every_document_is_found_again_with_its_labels(built: tuple[DataConfig, Path, TokenStore]) -> None:
    data, _, store = built
    read = {name: iter(range(len(store.split(name).titles))) for name in ("train", "validation", "test")}
    for document in load_corpus(data.corpus).documents():
        split, i = store.split(split_of(document.title)), next(read[split_of(document.title)])
        start, end = split.document_starts[i : i + 2]
        assert split.titles[i] == document.title
        assert store.tokenizer.decode(split.tokens[start : end - 1].tolist()) == document.text
        assert split.tokens[start - 1] == split.tokens[end - 1] == store.eot_id
        assert split.n_bytes[i] == len(document.text.encode()) == store.token_bytes[split.tokens[start:end]].sum()
        assert split.n_words[i] == len(document.text.split())
        assert (store.topics[split.topic_ids[i]] if split.topic_ids[i] >= 0 else None) == document.topic
    assert all(next(rest, None) is None for rest in read.values())


def test_starts_cover_every_target_once(built: tuple[DataConfig, Path, TokenStore]) -> None:
    _, _, store = built
    for split in (store.train, store.validation, store.test):
        starts = split.document_starts
        assert starts[0] == 1 and starts[-1] == len(split) == len(split.tokens)
        expected = [-1] + [i for i in range(len(starts) - 1) for _ in range(starts[i], starts[i + 1])]
        assert split.document_of(np.arange(len(split))).tolist() == expected
        # The literal text "<|endoftext|>" is spelled out: only the ids around documents are special.
        assert np.flatnonzero(split.tokens == store.eot_id).tolist() == [0, *(starts[1:] - 1)]


def test_tokens_are_memory_mapped_and_read_only(built: tuple[DataConfig, Path, TokenStore]) -> None:
    data, root, store = built
    assert store.train.tokens.dtype == np.uint16
    assert not store.train.tokens.flags.owndata and not store.train.tokens.flags.writeable
    maps = Path("/proc/self/maps").read_text() if sys.platform == "linux" else "train.tokens.arrow"
    assert "train.tokens.arrow" in maps
    assert store.vocab_size == 280 == len(store.token_bytes)
    assert store.fingerprint == data_fingerprint(data)
    assert sorted(p.name for p in root.iterdir() if not p.name.endswith(".lock")) == [store.fingerprint]


def test_a_second_opening_reads_what_the_first_wrote(built: tuple[DataConfig, Path, TokenStore]) -> None:
    data, root, store = built
    before = {p: p.stat().st_mtime_ns for p in (root / store.fingerprint).iterdir()}
    again = open_tokens(data, root)
    assert {p: p.stat().st_mtime_ns for p in (root / store.fingerprint).iterdir()} == before
    assert np.array_equal(again.train.tokens, store.train.tokens)
    assert again.topics == store.topics and again.licence == store.licence


def test_the_same_corpus_elsewhere_gives_the_same_bytes(
    built: tuple[DataConfig, Path, TokenStore], tmp_path: Path
) -> None:
    _, root, store = built
    again = open_tokens(write_corpus(tmp_path / "corpus.jsonl"), tmp_path)
    assert again.fingerprint == store.fingerprint
    for path in (root / store.fingerprint).glob("*.arrow"):
        assert path.read_bytes() == (tmp_path / again.fingerprint / path.name).read_bytes()


def test_the_fingerprint_changes_with_text_and_tokenizer(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "corpus.jsonl")
    keys = {data_fingerprint(one), data_fingerprint(DataConfig(corpus=one.corpus, tokenizer="bpe:281"))}
    write_corpus(tmp_path / "corpus.jsonl", n_documents=61)
    keys.add(data_fingerprint(one))
    assert len(keys) == 3


def test_own_splits_override_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"text": f"some words here {i}", "title": "same", "split": s} for i, s in enumerate(
        ["validation", "train", "train"] * 10)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    store = open_tokens(DataConfig(corpus=f"jsonl:{path}", tokenizer="bpe:260"), tmp_path)
    assert [len(s.titles) for s in (store.train, store.validation, store.test)] == [20, 10, 0]
    assert store.test.tokens.tolist() == [store.eot_id] and store.test.document_starts.tolist() == [1]


@pytest.mark.parametrize(
    ("rows", "tokenizer", "message"),
    [
        ([], "bpe:300", "holds no text"),
        ([{"text": "  \n"}], "bpe:300", "holds no text"),
        ([{"text": "a", "split": "validation"}], "bpe:300", "no document in its train split"),
        ([{"text": "a b c", "split": "train"}], "gpt2", "no document in its validation split"),
        ([{"text": "a b c", "split": "train"}], "bpe:300", "yields only"),
    ],
)
def test_corpora_that_are_too_small_leave_nothing_behind(
    tmp_path: Path, rows: list[dict[str, str]], tokenizer: str, message: str
) -> None:
    path = tmp_path / "small.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(HRSError, match=message):
        open_tokens(DataConfig(corpus=f"jsonl:{path}", tokenizer=tokenizer), tmp_path / "tokens")
    assert [p.suffix for p in (tmp_path / "tokens").iterdir()] == [".lock"]


def damage_by_cutting(folder: Path) -> None:
    path = folder / "train.tokens.arrow"
    os.truncate(path, path.stat().st_size - 100)


def damage_by_deleting(folder: Path) -> None:
    (folder / "validation.documents.arrow").unlink()


def damage_metadata(folder: Path) -> None:
    (folder / "store.json").write_text("{", encoding="utf-8")


def damage_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(b"x" * path.stat().st_size)


def damage_arrow(folder: Path) -> None:
    path = folder / "train.documents.arrow"
    path.write_bytes(b"x" * path.stat().st_size)


def damage_by_flipping_tokens(folder: Path) -> None:
    path = folder / "train.tokens.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # within the ids: the file still reads as Arrow
    path.write_bytes(content)


def damage_a_fact(folder: Path) -> None:
    path = folder / "store.json"
    path.write_text(path.read_text(encoding="utf-8").replace("unknown", "unheard"), encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_cutting,
        damage_by_deleting,
        damage_by_flipping_tokens,
        damage_a_fact,
        damage_metadata,
        damage_tokenizer,
        damage_arrow,
    ],
)
def test_a_damaged_store_is_built_again_with_a_warning(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    data = write_corpus(tmp_path / "corpus.jsonl")
    tokens = np.array(open_tokens(data, tmp_path).train.tokens)
    damage(tmp_path / data_fingerprint(data))
    store = open_tokens(data, tmp_path)
    assert np.array_equal(store.train.tokens, tokens)
    assert "damaged and is built again" in caplog.text


def test_each_file_is_hashed_once_per_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_corpus(tmp_path / "corpus.jsonl")
    open_tokens(data, tmp_path)
    monkeypatch.setattr(hrs.files, "sha256_of", lambda path: pytest.fail(f"{path} is hashed again"))
    open_tokens(data, tmp_path)


def test_a_store_of_an_earlier_version_has_sizes_only_and_still_opens(tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus.jsonl")
    built = open_tokens(data, tmp_path)
    path = tmp_path / built.fingerprint / "store.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({n: v for n, v in facts.items() if "sha256" not in n}), encoding="utf-8")
    changed = path.stat().st_mtime_ns
    assert np.array_equal(open_tokens(data, tmp_path).train.tokens, built.train.tokens)
    assert path.stat().st_mtime_ns == changed


def test_planned_tokens_are_opened_without_their_corpus_and_never_exchanged(tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus.jsonl")
    built = open_tokens(data, tmp_path / "tokens")
    write_corpus(tmp_path / "corpus.jsonl", n_documents=70)
    assert open_tokens(data, tmp_path / "tokens", built.fingerprint).fingerprint == built.fingerprint
    assert stored_tokens(tmp_path / "tokens", f"../tokens/{built.fingerprint}") is None, "a name, not a path"
    with pytest.raises(HRSError, match=f"no longer the text of tokens {built.fingerprint}"):
        open_tokens(data, tmp_path / "elsewhere", built.fingerprint)
    (tmp_path / "corpus.jsonl").unlink()
    assert open_tokens(data, tmp_path / "tokens", built.fingerprint).fingerprint == built.fingerprint
    with pytest.raises(HRSError, match="does not exist"):
        open_tokens(data, tmp_path / "elsewhere", built.fingerprint)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "hf"])
def test_a_path_means_the_same_in_every_working_directory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_corpus(f"{kind}:here") == absolute_corpus(f"{kind}:~/here") == f"{kind}:{tmp_path / 'here'}"
    assert absolute_corpus(f"{kind}:{tmp_path / 'here'}") == f"{kind}:{tmp_path / 'here'}"
    with pytest.raises(HRSError, match="write it without ~"):
        absolute_corpus(f"{kind}:~nosuchuser/here")


def test_other_names_of_corpora_are_left_as_they_are() -> None:
    for name in ("wiki-mini", "bbc", "hf:owner/data", "hf:owner/data:config", "text:", "nonsense"):
        assert absolute_corpus(name) == name


def test_the_rest_of_a_killed_build_is_cleared_away(tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus.jsonl")
    rest = tmp_path / f".{data_fingerprint(data)}-killed" / "store"
    rest.mkdir(parents=True)
    (rest / "train.raw").write_bytes(b"half")
    open_tokens(data, tmp_path)
    assert not rest.exists()


def test_a_root_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(HRSError, match="cannot be built"):
        open_tokens(data, tmp_path / "file" / "tokens")


def open_and_report(corpus: str, root: Path, barrier, results) -> None:
    barrier.wait()
    store = open_tokens(DataConfig(corpus=corpus, tokenizer="bpe:280"), root)
    inode = (root / store.fingerprint / "store.json").stat().st_ino
    results.put((inode, int(store.train.tokens.astype(np.int64).sum())))


def test_processes_that_start_together_build_one_store(tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus.jsonl", n_documents=400)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    args = (data.corpus, tmp_path / "tokens", barrier, results)
    processes = [context.Process(target=open_and_report, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    seen = {results.get() for _ in processes}
    assert len(seen) == 1, "each would have its own inode had it built its own"


def test_vocabularies_above_16_bits_are_stored_in_32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token ids beyond 65,535 survive: the width follows from the vocabulary, here one of 70,000 ids."""
    from tokenizers import AddedToken

    from hrs.data import build
    from hrs.data.tokenization import build_tokenizer

    def large(name: str, texts) -> object:
        tokenizer = build_tokenizer(name, texts)
        tokenizer.add_tokens([AddedToken(f"unused{i}", normalized=False) for i in range(70_000 - 281)])
        tokenizer.add_tokens([AddedToken("river", normalized=False)])
        return tokenizer

    monkeypatch.setattr(build, "build_tokenizer", large)
    store = open_tokens(write_corpus(tmp_path / "corpus.jsonl"), tmp_path)
    assert store.vocab_size == 70_000
    assert store.train.tokens.dtype == np.int32
    assert 69_999 in store.train.tokens


def test_a_long_build_reports_progress_on_stderr(tmp_path: Path) -> None:
    """With the pause between lines set to zero, each pass over the documents says how fast it goes."""
    data = write_corpus(tmp_path / "corpus.jsonl")
    code = (
        "import pathlib; from hrs.config import DataConfig; from hrs.data import build, open_tokens;"
        "build._SECONDS_BETWEEN_LINES = 0.0;"
        f"open_tokens(DataConfig(corpus={data.corpus!r}, tokenizer='bpe:280'), pathlib.Path({str(tmp_path)!r}))"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert f"{data.corpus}: tokenising, 60 documents, " in lines


@pytest.mark.slow
def test_wiki_mini_builds_and_its_bytes_add_up(tmp_path: Path) -> None:
    store = open_tokens(DataConfig(corpus="wiki-mini", tokenizer="bpe:2048"), tmp_path)
    for name in ("train", "validation", "test"):
        split = store.split(name)
        assert store.token_bytes[split.tokens].sum() == split.n_bytes.sum()
    titles = [set(store.split(name).titles) for name in ("train", "validation", "test")]
    assert sum(map(len, titles)) == len(set.union(*titles)), "no title is in two splits"
    assert len(store.topics) == 11
