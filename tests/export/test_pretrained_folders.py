"""A folder of the transformers library is a model like any other to the commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hrs.cli import app
from hrs.data.tokenization import END_OF_TEXT, adopt_tokenizer
from hrs.errors import HRSError
from hrs.export import open_model, open_text

TEXT = "the tide took the harbour and the moon drew the sail over the wheat"


def save_tokenizer(folder: Path, *, end: str = "</s>", byte_level: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    if byte_level:
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", end], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token="<pad>")
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small-gpt"
    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path / "storage"))


def call(*arguments: str) -> None:
    app(list(arguments), standalone_mode=False)


def test_it_is_scored_on_named_text_with_its_own_tokenizer(
    folder: Path, small_corpus: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    call("evaluate", str(folder), "--corpus", f"jsonl:{small_corpus}", "--save", str(tmp_path / "result"))
    told = capsys.readouterr().out
    assert told.startswith("small-gpt on ") and "bits_per_byte" in told
    scores = json.loads((tmp_path / "result" / "evaluation.json").read_text())
    opened = open_model(folder, tmp_path / "tokens")
    store = open_text(opened, tmp_path / "tokens", f"jsonl:{small_corpus}")
    assert store.tokenizer.token_to_id(END_OF_TEXT) == 1
    # An untrained model gives all tokens about the same chance.
    assert scores["nats_per_token"] == pytest.approx(torch.tensor(300.0).log().item(), rel=0.05)
    with pytest.raises(HRSError, match="was trained elsewhere, on unknown text: name the text with --corpus"):
        call("evaluate", str(folder))


def test_it_continues_text_as_transformers_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("generate", str(folder), "--prompt", "the tide", "--temperature", "0", "--max-new-tokens", "8", "--json")
    told = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = PreTrainedTokenizerFast.from_pretrained(folder)("the tide", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert told["token_ids"][: len(expected)] == expected


def test_it_is_audited(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app(["audit", str(folder)], standalone_mode=False) == 0
    assert capsys.readouterr().out.startswith("causal: 7 of 7 checks passed")


def test_tokenizers_that_cannot_be_counted_in_bytes_are_refused(tmp_path: Path, folder: Path) -> None:
    save_tokenizer(tmp_path / "words", byte_level=False)
    with pytest.raises(HRSError, match="does not spell bytes, so bits per byte cannot be counted"):
        adopt_tokenizer(tmp_path / "words")
    with pytest.raises(HRSError, match="cannot be opened"):
        adopt_tokenizer(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{")
    with pytest.raises(HRSError, match=r"the tokenizer in .* cannot be opened"):
        adopt_tokenizer(tmp_path / "copy")
