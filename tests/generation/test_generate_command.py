"""``hrs generate`` through the console script's entry, on a checkpoint written as training writes it."""

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hrs import cli
from hrs.data import TokenStore
from hrs.evaluation import AuditReport, AuditTest
from hrs.generation import Sampling, generate_text
from hrs.models import build_model
from hrs.presets import experiment
from hrs.training import load_model
from hrs.training.checkpoint import config_as_json
from hrs.training.checkpoint_writer import save_checkpoint

Command = Callable[..., tuple[int, str, str]]
LIMIT = ("--max-new-tokens", "12")


@pytest.fixture(scope="module")
def run_directory(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of random weights, a context of 16 tokens."""
    changes = {"data.tokenizer": "bpe:300", "data.corpus": f"jsonl:{small_corpus}", "model.max_seq_len": 16}
    config = experiment("dense_baseline", "micro", overrides=changes)
    torch.manual_seed(0)
    model = build_model(config.model)
    directory = tmp_path_factory.mktemp("runs") / "run"
    state = {"step": 1, "config": config_as_json(config)}
    save_checkpoint(directory, model, torch.optim.AdamW(model.parameters()), state, torch.device("cpu"))
    return directory


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture
def command(
    run_directory: Path, storage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """``command("--prompt", "x")``: status, standard output and the lines of standard error that are ours."""
    monkeypatch.setenv("HRS_STORAGE", str(storage))

    def run(*options: str, checkpoint: Path = run_directory) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hrs", "generate", str(checkpoint), *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        ours = [line for line in printed.err.splitlines() if line.startswith(("error:", "warning:", "note:"))]
        return int(ended.value.code or 0), printed.out, "\n".join(ours)

    return run


@pytest.fixture
def texts(run_directory: Path, small_store: TokenStore) -> Callable[..., list[str]]:
    """Prompt and continuation, made by the library."""

    def make(prompts: list[str], sampling: Sampling) -> list[str]:
        completions = generate_text(load_model(run_directory)[0], small_store.tokenizer, prompts, sampling)
        return [completion.prompt + completion.text for completion in completions]

    return make


def test_a_single_text_streamed_or_not(command: Command, texts: Callable[..., list[str]]) -> None:
    options = ("--temperature", "0.7", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.001")
    options += ("--repetition-penalty", "1.2", "--seed", "3", *LIMIT)
    (expected,) = texts(
        ["The ship"],
        Sampling(temperature=0.7, top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.2, seed=3, max_new_tokens=12),
    )
    assert command("--prompt", "The ship", *options) == (0, expected + "\n", "")
    assert command("--prompt", "The ship", "--no-stream", *options) == (0, expected + "\n", "")


def test_a_text_appears_as_it_grows(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    states: list[str] = []
    flushing = SimpleNamespace(write=written.write, flush=lambda: states.append(written.getvalue()))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", flushing)
        command("--prompt", "The ship", *LIMIT)
    assert states[0] == "The ship"
    assert len(set(states)) > 6
    assert all(after.startswith(before) for before, after in itertools.pairwise(states))


def test_several_texts_one_after_another(
    command: Command, texts: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("From a\nfile\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"From a pipe")))
    options = ("--prompt", "The", "--prompt-file", str(tmp_path / "prompt.txt"), "--prompt-file", "-", "--samples", "2")
    status, out, _ = command(*options, *LIMIT)
    prompts = [p for p in ("The", "From a\nfile", "From a pipe") for _ in range(2)]
    expected = ""
    for i, text in enumerate(texts(prompts, Sampling(max_new_tokens=12))):
        expected += f"--- prompt {i // 2 + 1} of 3, sample {i % 2 + 1} of 2 ---\n{text}\n"
    assert (status, out) == (0, expected)


def test_json_lines_hold_everything(command: Command, small_store: TokenStore) -> None:
    status, out, _ = command("--prompt", "The", "--samples", "3", "--stop", "e", "--json", "--max-new-tokens", "40")
    documents = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [(d["prompt_number"], d["sample"], d["prompt"]) for d in documents] == [(0, i, "The") for i in range(3)]
    for document in documents:
        ids = document["token_ids"]
        assert len(ids) == len(document["log_probs"]) == len(document["entropies"])
        assert all(0 < bits < 8.3 for bits in document["entropies"])  # log2 of 300 ids is 8.23
        assert "e" not in document["text"]
        if document["finish"] == "stop":
            assert small_store.tokenizer.decode(ids).startswith(document["text"] + "e")
    assert "stop" in {document["finish"] for document in documents}


def test_without_a_prompt_a_document_starts(command: Command, texts: Callable[..., list[str]]) -> None:
    assert command(*LIMIT) == (0, texts([""], Sampling(max_new_tokens=12))[0] + "\n", "")


def test_a_prompt_that_does_not_fit_is_noted(command: Command, small_store: TokenStore) -> None:
    prompt = "The harbour and the anchor of the ship " * 2
    n = len(small_store.tokenizer.encode(prompt).ids)
    _, out, err = command("--prompt", prompt, *LIMIT)
    assert out.startswith(prompt)
    assert err.startswith(f"note: prompt 1 has {n} tokens and the model's context 16: only the last ")


def test_a_run_that_failed_its_audit_is_warned_of(command: Command, run_directory: Path) -> None:
    path = run_directory / "audit.json"
    for passed, n_warnings in ((True, 0), (False, 1)):
        path.write_text(AuditReport([AuditTest(name="suffix_flip", passed=passed, detail="")]).to_json())
        for checkpoint in (run_directory, run_directory / "checkpoints" / "step_00000001"):
            status, _, err = command(*LIMIT, checkpoint=checkpoint)
            assert status == 0
            assert err.count("warning: this model is not causal") == len(err.splitlines()) == n_warnings
    path.unlink()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--temperature", "-1"), "temperature must lie between 0 and 100"),
        (("--top-p", "2"), "top_p must lie between 0 and 1"),
        (("--max-new-tokens", "0"), "max_new_tokens must be at least 1"),
        (("--samples", "0"), "samples must be at least 1"),
        (("--stop", ""), "stop must be"),
        (("--prompt-file", "/nowhere/at/all"), "prompt file /nowhere/at/all cannot be read"),
        (("--prompt", "x\udcff"), "prompt 0 is not valid UTF-8"),
    ],
)
def test_a_mistake_is_one_sentence(options: tuple[str, ...], part: str, command: Command) -> None:
    status, out, err = command(*options)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert part in err


def test_files_that_are_no_text_and_folders_that_are_no_run(command: Command, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    assert "is not UTF-8 at byte 2" in command("--prompt-file", str(tmp_path / "bytes"))[2]
    assert "holds no checkpoint" in command(checkpoint=tmp_path)[2]


@pytest.mark.slow
def test_train_then_generate(small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model trained by ``hrs train`` continues a text in the words of its corpus."""
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    program = [sys.executable, "-c", "from hrs.cli import main; main()"]
    settings = ["--set", "data.tokenizer=bpe:300", "--set", "training.steps=150"]
    train = [*program, "train", "full_hrs", "--scale", "micro", "--corpus", f"jsonl:{small_corpus}", *settings]
    subprocess.run(train, check=True, capture_output=True)
    (run,) = (tmp_path / "runs").iterdir()
    options = ["--prompt", "The", "--temperature", "0.5", "--max-new-tokens", "200"]
    generate = [*program, "generate", str(run), *options]
    made = subprocess.run(generate, check=True, capture_output=True, text=True)
    words = set(small_corpus.read_text().replace('"', " ").replace(".", " ").split())
    known = [word in words for word in made.stdout.split()]
    assert made.stdout.startswith("The ")
    assert sum(known) > 0.5 * len(known) > 10  # random weights write next to none
    assert "warning" not in made.stderr
