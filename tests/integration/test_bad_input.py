"""A user's mistake is one sentence on standard error and status 2, through the real entry points."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import jobs.ablation_sweep
import jobs.lr_search
import jobs.needle
from hrs import cli
from hrs.storage import open_storage
from hrs.tracking import Tracker
from jobs.entry import run_entry

Sentence = Callable[..., str]
HERE = str(Path(__file__).parent)


@pytest.fixture
def sentence_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sentence:
    """Runs ``hrs ...`` or a job and returns its one line of complaint."""
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path / "storage"))

    def run(*words: str) -> str:
        program, *arguments = words
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        modules = {"ablation_sweep": jobs.ablation_sweep, "lr_search": jobs.lr_search, "needle": jobs.needle}
        main = modules[program].main if program in modules else None
        with pytest.raises(SystemExit) as ended:
            cli.main() if main is None else run_entry(main)
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if not re.match(r"[\w-]+: reading|[\w-]+: tokenising", line)]
        assert ended.value.code == 2, printed
        assert len(lines) == 1, printed
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("hrs", "show", "full_hr"), ("unknown preset 'full_hr'", "did you mean full_hrs")),
        (("hrs", "diff", "full_hrs", "nothing"), ("unknown preset", "hrs presets")),
        (("hrs", "train", "full_hrs", "--scale", "huge"), ("unknown scale 'huge'", "micro, tiny, small, paper")),
        (("hrs", "train", "full_hrs", "--set", "model.depth=3"), ("unknown field model.depth",)),
        (("hrs", "train", "full_hrs", "--set", "model.n_layers=three"), ("model.n_layers", "type int")),
        (("hrs", "train", "full_hrs", "--set", "model.n_layers"), ("FIELD=VALUE",)),
        (("hrs", "train", "full_hrs", "--corpus", "text:/nowhere/at/all.txt"), ("/nowhere/at/all.txt",)),
        (("hrs", "train", "full_hrs", "--corpus", "novels"), ("novels", "wiki-mini")),
        (("hrs", "evaluate", "/nowhere/at/all"), ("/nowhere/at/all",)),
        (("hrs", "report", "v9-tiny"), ("no study 'v9-tiny'",)),
        (("ablation_sweep", "--presets", "dense_baseline,nope"), ("unknown preset 'nope'",)),
        (("ablation_sweep", "--seeds", "0"), ("--seeds",)),
        (("lr_search", "--preset", "dense_baseline", "--samples", "0"), ("--samples",)),
        (("lr_search",), ("--preset", "required")),
        (("hrs", "train", "dense_baseline", "--seed", "-1"), ("--seed",)),
        (("hrs", "train", "dense_baseline", "--seed", "1" + "0" * 23), ("--seed",)),
        (("hrs", "train", "dense_baseline", "--set", "seed=7"), ("seed cannot be overridden",)),
        (("hrs", "train", "dense_baseline", "--set", "model.rope_base=0"), ("model.rope_base must lie between 1",)),
        (("hrs", "train", "dense_baseline", "--set", "training.schedule.peak_lr=nan"), ("peak_lr must be finite",)),
        (("hrs", "train", "dense_baseline", "--corpus", "text:~nosuchuser/a.txt"), ("~nosuchuser",)),
        (("hrs", "train", "dense_baseline", "--threads", "1" + "0" * 23), ("--threads",)),
        (("hrs", "train"), ("preset", "hrs train --help")),
        (("hrs", "evaluate", HERE, "--save", __file__), ("--save", "is a file")),
        (("hrs", "evaluate", HERE, "--split", "dev"), ("unknown split 'dev'",)),
        (("hrs", "export", HERE, "--output", "/"), ("--output", "/")),
        (("hrs", "export", HERE, "--bits", "9"), ("--bits",)),
        (("hrs", "ui", "--port", "99999"), ("--port",)),
        (("hrs", "serve", HERE, "--port", "0"), ("--port",)),
        (("needle", "x", "--depths", "0,nan"), ("--depths", "between 0 and 1")),
        (("needle", "x", "--distractors", "4,2"), ("must rise",)),
        (("hrs", "export", HERE, "--budget", "9" * 400 + "GB"), ("is not a size",)),
        (("hrs", "generate", HERE, "--temperature", "nan"), ("temperature must lie between",)),
        (("ablation_sweep", "--seeds", "3", "--set", "seed=7"), ("seed cannot be overridden", "--seeds")),
        (("ablation_sweep", "--seeds", "1" + "0" * 23), ("--seeds: must lie between 1 and 10,000",)),
        (("ablation_sweep", "--presets", "full_hrs,full_hrs"), ("'full_hrs' is named twice",)),
        (("ablation_sweep", "--name", "a/b"), ("study name 'a/b-tiny'",)),
        (("ablation_sweep", "--checkpoint-minutes", "nan"), ("--checkpoint-minutes",)),
        (("ablation_sweep", "--gpus", "1xnan", "--dry-run"), ("'1xnan' describes no GPUs",)),
        (("ablation_sweep", "--gpus", "999999999999x24", "--dry-run"), ("describes no GPUs",)),
        (("ablation_sweep", "--frobnicate"), ("--frobnicate", "--help")),
    ],
)
def test_a_mistake_is_one_sentence(words: tuple[str, ...], parts: tuple[str, ...], sentence_of: Sentence) -> None:
    sentence = sentence_of(*words)
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    "words",
    [
        ("--presets", "dense_retrieved"),
        ("--set", 'training.phases=[{"name": "a", "frac": 1, "freeze": ["no.such"]}]'),
        ("--set", "training.batch_sequences=0"),
        ("--set", "model.engram.as_original=true"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(words: tuple[str, ...], sentence_of: Sentence) -> None:
    assert sentence_of("ablation_sweep", *words) == sentence_of("ablation_sweep", *words, "--dry-run")


@pytest.mark.parametrize("home", ["~nosuchuser/store", "/proc/version/store"])
def test_a_storage_that_cannot_be_is_one_sentence(
    home: str, sentence_of: Sentence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HRS_STORAGE", home)
    assert "HRS_STORAGE" in sentence_of("hrs", "train", "dense_baseline", "--scale", "micro")


def test_a_training_that_fails_closes_its_study_with_the_reason(
    sentence_of: Sentence, tmp_path: Path, small_corpus: Path
) -> None:
    words = ("--scale", "micro", "--corpus", f"jsonl:{small_corpus}", "--set", "data.tokenizer=bpe:300")
    sentence = sentence_of("hrs", "train", "dense_baseline", *words, "--set", "training.batch_sequences=10000")
    assert "shorter than one batch" in sentence
    tracker = Tracker(open_storage(tmp_path / "storage"))
    (study,) = tracker._history.by_tag("hrs.kind", ["study"])
    assert study.status == "FAILED"
    assert study.tags["hrs.outcome"] == "failed" and f"error: {study.tags['hrs.reason']}" == sentence


def test_an_empty_corpus_is_one_sentence(sentence_of: Sentence, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert str(empty) in sentence_of("hrs", "train", "dense_baseline", "--scale", "micro", "--corpus", f"jsonl:{empty}")


def test_a_corrupt_checkpoint_is_one_sentence(sentence_of: Sentence, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{")
    for command in ("evaluate", "audit"):
        assert "run" in sentence_of("hrs", command, str(tmp_path / "run"))


def test_an_unreachable_tracking_server_is_one_sentence(
    sentence_of: Sentence, monkeypatch: pytest.MonkeyPatch, small_corpus: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    arguments = ("--scale", "micro", "--corpus", f"jsonl:{small_corpus}", "--set", "data.tokenizer=bpe:300")
    assert "http://127.0.0.1:9 cannot be reached" in sentence_of("ablation_sweep", *arguments, "--dry-run")


def test_a_damaged_store_is_one_sentence(sentence_of: Sentence, tmp_path: Path) -> None:
    store = tmp_path / "storage" / "mlflow" / "mlflow.db"
    store.parent.mkdir(parents=True)
    store.write_bytes(b"this is no database" * 100)
    assert "mlflow.db" in sentence_of("hrs", "report", "v1-tiny")
