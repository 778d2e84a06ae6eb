"""Text from tokens: whole characters, stop strings wherever they fall, and the same text streamed or not."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.generation import Completion, Sampling, generate, generate_text, stream_text
from hrs.generation.text import TextAssembler, token_pieces
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment

LETTERS = st.text("abé€🙂", max_size=12)
STOPS = st.lists(st.text("abé€🙂", min_size=1, max_size=4), max_size=3)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(c for c in cuts if c < len(data)), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def assembled(pieces: list[bytes], stops: list[str]) -> tuple[list[str], bool]:
    assembler = TextAssembler(stops)
    parts = [assembler.push(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    return parts, assembler.stopped


def until_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first end of a stop string, and of those that end there the longest."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], True
    return text, False


@given(LETTERS, STOPS, st.lists(st.integers(0, 40)))
def test_text_does_not_depend_on_the_pieces_it_came_in(text: str, stops: list[str], cuts: list[int]) -> None:
    parts, stopped = assembled(cut(text.encode(), cuts), stops)
    assert ("".join(parts), stopped) == until_stop(text, stops)


@given(st.binary(max_size=20), st.lists(st.integers(0, 20)))
def test_bytes_that_are_not_utf8_become_replacement_characters(data: bytes, cuts: list[int]) -> None:
    parts, _ = assembled(cut(data, cuts), [])
    assert "".join(parts) == data.decode("utf-8", errors="replace")


def test_only_what_is_uncertain_is_held_back() -> None:
    parts, stopped = assembled([b"one E", b"N", b"d", b" \xe2\x82", b"\xac \xf0\x9f", b""], ["END", "Enough"])
    assert parts == ["one ", "", "ENd", " ", "€ ", "\N{REPLACEMENT CHARACTER}"]
    assert not stopped
    assert assembled([b"one E", b"N", b"D two", b"three"], ["END"]) == (["one ", "", "", ""], True)


@given(data=st.data())
def test_pieces_spell_what_the_tokenizer_decodes(data: st.DataObject, small_store: TokenStore) -> None:
    ids = data.draw(st.lists(st.integers(0, 299), max_size=20))
    pieces = token_pieces(small_store.tokenizer)
    assert b"".join(pieces[i] for i in ids).decode(errors="replace") == small_store.tokenizer.decode(ids)
    assert [len(piece) for piece in pieces] == small_store.token_bytes.tolist()


# ---- with a model ----------------------------------------------------------------------------------------------------

PROMPTS = ["The wave", "", "A ship and the plane and the deck and " * 4, "é🙂"]
SAMPLING = Sampling(max_new_tokens=40, seed=2)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Random weights: all kinds of bytes come, and end of text now and then."""
    torch.manual_seed(0)
    overrides = {"data.tokenizer": "bpe:300", "model.max_seq_len": 32, "model.engram.window": 8}
    return build_model(experiment("full_hrs", "micro", overrides=overrides).model).double().eval()


def without_end(completion: Completion) -> list[int]:
    ids = [token.id for token in completion.tokens]
    return ids[:-1] if completion.finish == "end_of_text" else ids


def test_texts_are_what_the_tokens_say(model: LanguageModel, small_store: TokenStore) -> None:
    tokenizer = small_store.tokenizer
    completions = generate_text(model, tokenizer, PROMPTS * 5, SAMPLING)
    assert {completion.finish for completion in completions} == {"length", "end_of_text"}
    for prompt, completion in zip(PROMPTS * 5, completions, strict=True):
        assert completion.prompt == prompt
        assert completion.text == tokenizer.decode(without_end(completion))
        assert completion.tokens[-1].finish == completion.finish
        assert small_store.eot_id not in without_end(completion)
        assert (len(completion.tokens) == 40) or completion.finish == "end_of_text"


def test_streaming_gives_the_same_texts(model: LanguageModel, small_store: TokenStore) -> None:
    whole = generate_text(model, small_store.tokenizer, PROMPTS, SAMPLING)
    deltas = list(stream_text(model, small_store.tokenizer, PROMPTS, SAMPLING))
    for row, completion in enumerate(whole):
        mine = [delta for delta in deltas if delta.row == row]
        assert (
            "".join(delta.text for delta in mine)
            == completion.text
            == small_store.tokenizer.decode(without_end(completion))
        )
        assert [delta.token for delta in mine] == completion.tokens
        assert [delta.finish for delta in mine] == [None] * (len(mine) - 1) + [completion.finish]


def test_a_stop_string_ends_the_text_even_across_tokens(model: LanguageModel, small_store: TokenStore) -> None:
    """Every string of two or three letters that the text has, many of them in two tokens."""
    tokenizer, sampling = small_store.tokenizer, Sampling(max_new_tokens=20, seed=3)
    (free,) = generate_text(model, tokenizer, ["The"], sampling)
    crossing = 0
    for start in range(len(free.text) - 3):
        stop = free.text[start : start + 3]
        if "\N{REPLACEMENT CHARACTER}" in stop:
            continue
        limited = Sampling(max_new_tokens=20, seed=3, stop=("never in this text", stop))
        (stopped,) = generate_text(model, tokenizer, ["The"], limited)
        assert stopped.finish == "stop"
        assert stopped.text == free.text[: free.text.index(stop)]
        assert stopped.tokens == free.tokens[: len(stopped.tokens)]
        ids = [token.id for token in stopped.tokens]
        assert stop in tokenizer.decode(ids)
        assert stop not in tokenizer.decode(ids[:-1])
        crossing += stop not in tokenizer.decode(ids[-1:])
    assert crossing > 3


def test_a_stopped_row_leaves_the_others_alone(model: LanguageModel, small_store: TokenStore) -> None:
    free = generate_text(model, small_store.tokenizer, PROMPTS, SAMPLING)
    stop = free[0].text[5:7]
    limited = Sampling(max_new_tokens=40, seed=2, stop=(stop,))
    for before, after in zip(free, generate_text(model, small_store.tokenizer, PROMPTS, limited), strict=True):
        assert after.text == until_stop(before.text, [stop])[0]
        assert (after.finish == "stop") == (stop in before.text)


def test_an_empty_prompt_starts_a_document(model: LanguageModel, small_store: TokenStore) -> None:
    (completion,) = generate_text(model, small_store.tokenizer, [""], Sampling(max_new_tokens=5))
    steps = list(generate(model, [[small_store.eot_id]], Sampling(max_new_tokens=5), end_id=small_store.eot_id))
    assert completion.tokens == [token for step in steps for token in step]


def test_of_a_long_prompt_the_end_is_read_and_the_rest_is_counted(
    model: LanguageModel, small_store: TokenStore
) -> None:
    tokenizer, sampling = small_store.tokenizer, Sampling(max_new_tokens=3)
    short, long = generate_text(model, tokenizer, ["The", PROMPTS[2]], sampling)
    assert (short.n_prompt_tokens, short.n_unread_tokens) == (len(tokenizer.encode("The").ids), 0)
    ids = tokenizer.encode(PROMPTS[2]).ids
    read = ids[long.n_unread_tokens :]
    assert long.n_prompt_tokens == len(ids) > 32 >= len(read) >= 16
    logits = model(torch.tensor([read])).logits[0, -1].detach().log_softmax(-1)
    assert long.tokens[0].log_prob == pytest.approx(float(logits[long.tokens[0].id]), rel=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_no_text(batch_size: int, model: LanguageModel, small_store: TokenStore) -> None:
    sampling = Sampling(max_new_tokens=12)

    def texts(n: int) -> list[str]:
        return [c.text for c in generate_text(model, small_store.tokenizer, PROMPTS * 2, sampling, batch_size=n)]

    assert texts(batch_size) == texts(16)
    assert len(set(texts(16))) == len(PROMPTS) * 2  # equal prompts draw differently


def test_mistakes_are_said(model: LanguageModel, small_store: TokenStore) -> None:
    tokenizer = small_store.tokenizer
    with pytest.raises(HRSError, match="prompt 1 is not valid UTF-8 at character 2"):
        generate_text(model, tokenizer, ["a", "ab\udcff"], SAMPLING)
    with pytest.raises(HRSError, match="batch_size must be at least 1"):
        generate_text(model, tokenizer, ["a"], SAMPLING, batch_size=0)
    other = build_model(experiment("dense_baseline", "micro").model).eval()
    with pytest.raises(HRSError, match="the tokenizer has 300 ids and the model 512"):
        stream_text(other, tokenizer, ["a"], SAMPLING)
