"""A run owns its tokenizer and its tokens: what becomes of the corpus afterwards changes no number of it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hrs.cli import app
from hrs.data import open_tokens
from hrs.errors import HRSError
from hrs.export import load_artifact, open_model, open_text
from hrs.presets import experiment
from hrs.storage import Storage
from hrs.training import train

CHANGES = {
    "data.tokenizer": "bpe:300",
    "model.d_model": 16,
    "model.n_heads": 2,
    "model.d_ff": 32,
    "model.max_seq_len": 16,
    "training.steps": 20,
    "training.validations": 0,
    "training.schedule.peak_lr": 1e-2,
}
RUN = "0123456789abcdef"


@pytest.fixture(scope="module")
def trained(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the storage of one run and the corpus it was trained on."""
    folder = tmp_path_factory.mktemp("owned")
    shutil.copy(small_corpus, folder / "corpus.jsonl")
    storage = Storage(folder / "storage")
    config = experiment("dense_baseline", "micro", 0, CHANGES | {"data.corpus": f"jsonl:{folder / 'corpus.jsonl'}"})
    for _ in train(config, open_tokens(config.data, storage.tokens), storage.run(RUN)):
        pass
    return folder


@pytest.fixture
def corpus(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The corpus of that run, which a test may change; everything is put back afterwards."""
    kept = tmp_path / "kept"
    shutil.copytree(trained, kept)
    monkeypatch.setenv("HRS_STORAGE", str(trained / "storage"))
    monkeypatch.chdir(tmp_path)
    yield trained / "corpus.jsonl"
    shutil.rmtree(trained)
    shutil.copytree(kept, trained)


def hrs(*words: str | Path) -> str:
    """Output of a command that ends well."""
    ended = CliRunner().invoke(app, [str(word) for word in words])
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    assert ended.exit_code == 0, ended.output
    return ended.output


def bits(output: str) -> float:
    return float(re.search(r"bits_per_byte +(\S+)", output)[1])


def run_of(corpus: Path) -> Path:
    return corpus.parent / "storage" / "runs" / RUN


def append_other_text(corpus: Path) -> None:
    with corpus.open("a", encoding="utf-8") as file:
        for i in range(200):
            row = {"title": f"new {i}", "text": f"xyzzy plugh {i * 7919}", "split": ("validation", "train")[i % 2]}
            file.write(json.dumps(row) + "\n")


def move_away(corpus: Path) -> None:
    corpus.rename(corpus.with_name("moved.jsonl"))


@pytest.mark.parametrize("change", [append_other_text, move_away])
def test_a_changed_or_moved_corpus_changes_no_score_and_no_text(corpus: Path, change: Callable[[Path], None]) -> None:
    run, words = run_of(corpus), ("--prompt", "The", "--temperature", "0", "--max-new-tokens", "8")
    score, text = bits(hrs("evaluate", run)), hrs("generate", run, *words)
    hrs("export", run, "--output", "before.hrs")
    change(corpus)
    assert bits(hrs("evaluate", run)) == score and hrs("generate", run, *words) == text
    hrs("export", run, "--output", "after.hrs")
    before, after = (load_artifact(Path(name)) for name in ("before.hrs", "after.hrs"))
    assert before.tokenizer.to_str() == after.tokenizer.to_str() and before.header["data"] == after.header["data"]
    assert bits(hrs("evaluate", "after.hrs")) == bits(hrs("evaluate", "before.hrs"))


@pytest.mark.parametrize("change", [append_other_text, move_away])
def test_without_corpus_and_tokens_text_is_refused_and_the_tokenizer_is_still_there(
    corpus: Path, change: Callable[[Path], None]
) -> None:
    run, words = run_of(corpus), ("--prompt", "The", "--temperature", "0", "--max-new-tokens", "8")
    text = hrs("generate", run, *words)
    change(corpus)
    shutil.rmtree(corpus.parent / "storage" / "tokens")
    with pytest.raises(HRSError, match="missing or damaged"):
        hrs("evaluate", run)
    assert hrs("generate", run, *words) == text


def test_a_run_goes_on_when_its_corpus_lies_elsewhere(corpus: Path, tmp_path: Path) -> None:
    storage = Storage(corpus.parent / "storage")
    shutil.copy(corpus, tmp_path / "corpus.jsonl")
    config = experiment("dense_baseline", "micro", 0, CHANGES | {"data.corpus": f"jsonl:{tmp_path / 'corpus.jsonl'}"})
    assert list(train(config, open_tokens(config.data, storage.tokens), storage.run(RUN))) == [], "it is complete"


def test_tokens_that_were_lost_are_built_again_from_the_unchanged_corpus(corpus: Path) -> None:
    score = bits(hrs("evaluate", run_of(corpus)))
    shutil.rmtree(corpus.parent / "storage" / "tokens")
    assert bits(hrs("evaluate", run_of(corpus))) == score


def test_other_text_is_scored_when_it_is_named_in_the_tokenizer_of_the_run(corpus: Path) -> None:
    run = run_of(corpus)
    score = bits(hrs("evaluate", run))
    shutil.copy(corpus, "same.jsonl")  # relative: the working directory is another folder
    same = hrs("evaluate", run, "--corpus", "jsonl:same.jsonl")
    assert bits(same) == score
    assert f"jsonl:{Path('same.jsonl').absolute()} (not the text it was trained on, its own tokenizer)" in same
    append_other_text(corpus)
    other = bits(hrs("evaluate", run, "--corpus", f"jsonl:{corpus}"))
    opened = open_model(run, corpus.parent / "storage" / "tokens")
    text = open_text(opened, corpus.parent / "storage" / "tokens", f"jsonl:{corpus}")
    assert text.tokenizer.to_str() == opened.tokenizer.to_str() and other > score
    Path("little.txt").write_text("One document alone.\n", encoding="utf-8")
    with pytest.raises(HRSError, match="nothing to predict"):  # it is in one of the splits, the others are empty
        _ = [hrs("evaluate", run, "--corpus", "text:little.txt", "--split", s) for s in ("train", "validation", "test")]


def test_a_run_that_kept_no_tokenizer_takes_that_of_its_tokens(corpus: Path) -> None:
    """As runs of earlier versions."""
    run, words = run_of(corpus), ("--prompt", "The", "--temperature", "0", "--max-new-tokens", "8")
    text, score = hrs("generate", run, *words), bits(hrs("evaluate", run))
    (run / "tokenizer.json").unlink()
    append_other_text(corpus)
    assert hrs("generate", run, *words) == text and bits(hrs("evaluate", run)) == score
    shutil.rmtree(corpus.parent / "storage" / "tokens")
    with pytest.raises(HRSError, match="is no longer the text of tokens"):
        hrs("generate", run, *words)


def test_a_tokenizer_that_is_not_the_runs_own_is_refused(corpus: Path) -> None:
    path = run_of(corpus) / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(HRSError, match="not the tokenizer that this run learned with"):
        hrs("generate", run_of(corpus))
