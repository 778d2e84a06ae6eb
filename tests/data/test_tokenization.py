"""Tokenizers: exact GPT-2 ids, deterministic training, and byte counts that add up for any text."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from properties import examples
from tokenizers import Tokenizer

from hrs.data.tokenization import build_tokenizer, end_of_text_id, token_bytes
from hrs.errors import HRSError

TEXTS = [f"The {a} {b} of number {i} isn't café 日本 😀.\n" for i, (a, b) in enumerate(
    (a, b) for a in ("red", "green", "longer", "shortest") for b in ("house", "river", "mountains", "walking")
)]  # fmt: skip

TRAIN_TWICE = (
    "import hashlib; from hrs.data.tokenization import build_tokenizer; from hrs.data import load_corpus;"
    "import itertools; texts = [d.text for d in itertools.islice(load_corpus('wiki-mini').documents(), 300)];"
    "a, b = (build_tokenizer('bpe:700', iter(texts)).to_str() for _ in range(2)); assert a == b;"
    "print(hashlib.sha256(a.encode()).hexdigest())"
)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return build_tokenizer("gpt2", iter(()))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return build_tokenizer("bpe:300", iter(TEXTS))


@pytest.fixture(scope="module")
def sizes(gpt2: Tokenizer, bpe: Tokenizer) -> dict[str, NDArray[np.int32]]:
    return {"gpt2": token_bytes(gpt2), "bpe": token_bytes(bpe)}


def test_gpt2_gives_the_published_ids(gpt2: Tokenizer) -> None:
    """Ids printed by OpenAI's encoder for text with words, contractions, spaces, digits and bytes outside ASCII."""
    assert gpt2.encode("Hello world").ids == [15496, 995]
    assert gpt2.encode("Hello, my dog is cute").ids == [15496, 11, 616, 3290, 318, 13779]
    assert gpt2.encode(" café").ids == [40304]
    assert gpt2.encode("I'm  two\n\nA").ids == [40, 1101, 220, 734, 198, 198, 32]
    assert gpt2.get_vocab_size() == 50257
    assert end_of_text_id(gpt2) == 50256


def test_gpt2_recovers_every_merge(gpt2: Tokenizer) -> None:
    """All ids but 256 bytes and end of text are merges, and each token is encoded as itself when it stands alone."""
    vocabulary = gpt2.get_vocab()
    assert len(vocabulary) == len(set(vocabulary.values())) == 50257
    merged = gpt2.model
    for spelling in list(vocabulary)[:50257:97]:
        if vocabulary[spelling] != 50256:
            assert [t.id for t in merged.tokenize(spelling)] == [vocabulary[spelling]]


def test_bpe_has_exactly_the_ids_it_was_asked_for(bpe: Tokenizer) -> None:
    assert bpe.get_vocab_size() == 300
    assert sorted(bpe.get_vocab().values()) == list(range(300))
    assert end_of_text_id(bpe) == 0


def test_text_too_small_for_the_vocabulary_names_the_largest_that_works() -> None:
    with pytest.raises(HRSError, match=r"yields only (\d+) BPE tokens: choose bpe:N with N <= \1") as error:
        build_tokenizer("bpe:4096", iter(["a few words a few words"]))
    largest = str(error.value).rpartition(" ")[2]
    assert build_tokenizer(f"bpe:{largest}", iter(["a few words a few words"])).get_vocab_size() == int(largest)


@pytest.mark.parametrize("name", ["gpt3", "bpe", "bpe:", "bpe:256", "bpe:-3", "bpe:1e3"])
def test_unknown_tokenizers_are_refused(name: str) -> None:
    with pytest.raises(HRSError, match="unknown tokenizer"):
        build_tokenizer(name, iter(TEXTS))


def test_training_twice_gives_identical_files_in_every_process() -> None:
    digests = {
        subprocess.check_output(
            [sys.executable, "-c", TRAIN_TWICE], env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}, text=True
        )
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
@examples(150)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example("👩‍👩‍👧‍👦 🇳🇴 é e\u0301 \u200b\x00\x7f\r\n\t  ")
@example("before <|endoftext|> after")
@example("   leading and trailing   ")
def test_token_bytes_sum_to_the_utf8_length_and_decoding_inverts(
    request: pytest.FixtureRequest, name: str, text: str
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    sizes = request.getfixturevalue("sizes")[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert sizes[ids].sum() == len(text.encode("utf-8"))
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert end_of_text_id(tokenizer) not in ids


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_only_end_of_text_stands_for_no_bytes(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer = request.getfixturevalue(name)
    assert (token_bytes(tokenizer) == 0).nonzero()[0].tolist() == [end_of_text_id(tokenizer)]
