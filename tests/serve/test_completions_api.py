"""Completions through OpenAI's own client and real HTTP: the texts are those of the library."""

import json

import httpx
import openai
import pytest
import torch
from torch import Tensor

from hrs.export.opening import OpenedModel
from hrs.generation import Completion, SampledToken, Sampling, generate_text
from hrs.generation.text import token_pieces
from serve.backend import Piece, Scores
from serve.formats import ChatFormat, Choice, CompletionFormat, token_text

PROMPT = "The ship and the tide"


@pytest.fixture(scope="module")
def expected(opened: OpenedModel) -> Completion:
    (completion,) = generate_text(opened.model, opened.tokenizer, [PROMPT], Sampling(seed=7, max_new_tokens=20))
    return completion


def test_a_completion_is_the_librarys(client: openai.OpenAI, expected: Completion) -> None:
    made = client.completions.create(model="tiny", prompt=PROMPT, seed=7, max_tokens=20)
    assert made.object == "text_completion"
    assert [(c.index, c.text, c.finish_reason) for c in made.choices] == [(0, expected.text, "length")]
    assert made.usage.prompt_tokens == expected.n_prompt_tokens
    assert made.usage.completion_tokens == 20
    assert made.usage.total_tokens == expected.n_prompt_tokens + 20
    assert made.hrs == {"seed": 7, "causal": True}


def test_a_stream_adds_up_to_the_completion(client: openai.OpenAI, expected: Completion) -> None:
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, seed=7, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert len(chunks) > 10
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk.id for chunk in (*chunks, last)} == {last.id}
    assert last.choices == []
    assert last.usage.completion_tokens == 20
    assert all(chunk.usage is None for chunk in chunks)


def test_raw_events_end_with_done(endpoint) -> None:
    body = {"model": "tiny", "prompt": "The", "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{endpoint.url}/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_choices_differ_and_repeat(client: openai.OpenAI, expected: Completion) -> None:
    def texts(**more: object) -> list[str]:
        made = client.completions.create(model="tiny", prompt=PROMPT, n=8, max_tokens=20, **more)
        return [choice.text for choice in made.choices]

    first = texts(seed=7)
    assert first[0] == expected.text
    assert len(set(first)) == 8
    assert texts(seed=7) == first
    assert texts() != texts()


def test_several_prompts_of_text_and_of_ids(client: openai.OpenAI, opened: OpenedModel) -> None:
    prompts = ["The ship", "A longer prompt about the barn and the wheat"]
    ids = [opened.tokenizer.encode(prompt).ids for prompt in prompts]
    by_text = client.completions.create(model="tiny", prompt=prompts, n=2, seed=1, max_tokens=8)
    by_ids = client.completions.create(model="tiny", prompt=ids, n=2, seed=1, max_tokens=8)
    one = client.completions.create(model="tiny", prompt=ids[1], seed=1, max_tokens=8)
    assert [c.text for c in by_text.choices] == [c.text for c in by_ids.choices]
    assert [c.index for c in by_text.choices] == [0, 1, 2, 3]
    assert one.choices[0].text == by_text.choices[2].text
    assert by_text.usage.prompt_tokens == sum(map(len, ids))
    assert by_text.usage.completion_tokens == 4 * 8


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_a_text_and_is_not_in_it(client: openai.OpenAI, expected: Completion, stream: bool) -> None:
    stop = expected.text[5:8]
    made = client.completions.create(
        model="tiny", prompt=PROMPT, seed=7, max_tokens=20, stop=[stop, "✗"], stream=stream
    )
    choices = [chunk.choices[0] for chunk in made] if stream else made.choices
    assert "".join(choice.text for choice in choices) == expected.text[: expected.text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_echo_and_log_probabilities(client: openai.OpenAI, expected: Completion, opened: OpenedModel) -> None:
    made = client.completions.create(model="tiny", prompt=PROMPT, seed=7, max_tokens=20, echo=True, logprobs=2)
    (choice,) = made.choices
    assert choice.text == PROMPT + expected.text
    table, n = choice.logprobs, expected.n_prompt_tokens
    assert table.token_logprobs[0] is None
    assert table.token_logprobs[n:] == pytest.approx([token.log_prob for token in expected.tokens], abs=1e-5)
    assert all(value < 0 for value in table.token_logprobs[1:n])
    assert len(table.tokens) == len(table.top_logprobs) == len(table.text_offset) == n + 20
    assert table.tokens[:n] == [opened.tokenizer.decode([i]) for i in opened.tokenizer.encode(PROMPT).ids]
    assert all(2 <= len(best) <= 3 and max(best.values()) >= value
               for best, value in zip(table.top_logprobs[1:n], table.token_logprobs[1:n], strict=True))  # fmt: skip
    for token, offset, after in zip(table.tokens[: n - 1], table.text_offset, table.text_offset[1:], strict=False):
        assert choice.text[offset:after] == token


@torch.no_grad()
def distributions(opened: OpenedModel, prompt: str, tokens: list[SampledToken]) -> tuple[list[int], Tensor]:
    """The ids [n] of a whole text, and log-probabilities [n - 1, V] of what follows each but the last."""
    ids = [*opened.tokenizer.encode(prompt).ids, *(token.id for token in tokens)]
    return ids, opened.model(torch.tensor([ids[:-1]])).logits[0].log_softmax(dim=-1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("echo", "n_best"), [(False, 0), (False, 3), (True, 5)])
def test_a_completion_tells_the_likeliest_tokens(
    client: openai.OpenAI, expected: Completion, opened: OpenedModel, stream: bool, echo: bool, n_best: int
) -> None:
    options = {"seed": 7, "max_tokens": 20, "logprobs": n_best, "echo": echo, "stream": stream}
    made = client.completions.create(model="tiny", prompt=PROMPT, **options)
    tables = [part.choices[0].logprobs for part in (made if stream else [made])]
    tokens = [row for table in tables for row in table.tokens]
    values = [row for table in tables for row in table.token_logprobs]
    best = [row for table in tables for row in table.top_logprobs]
    spelled = [token_text(piece) for piece in token_pieces(opened.tokenizer)]
    ids, log_p = distributions(opened, PROMPT, expected.tokens)
    first = 0 if echo else expected.n_prompt_tokens
    assert tokens == [spelled[id] for id in ids[first:]]
    if echo:
        assert (values.pop(0), best.pop(0)) == (None, None)
    assert len(best) == len(log_p[max(first - 1, 0) :])
    for told, value, row, id in zip(best, values, log_p[max(first - 1, 0) :], ids[max(first, 1) :], strict=True):
        likeliest = {spelled[i]: float(row[i]) for i in row.topk(n_best).indices.tolist()}
        assert told == pytest.approx({**likeliest, spelled[id]: float(row[id])}, abs=1e-5)
        assert told[spelled[id]] == value


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n_best", [0, 4, 20])
def test_a_chat_tells_the_likeliest_tokens(
    client: openai.OpenAI, opened: OpenedModel, stream: bool, n_best: int
) -> None:
    prompt, sampling = "User: Hi\n\nAssistant:", Sampling(seed=5, max_new_tokens=24)
    (expected,) = generate_text(opened.model, opened.tokenizer, [prompt], sampling)
    options = {"messages": [{"role": "user", "content": "Hi"}], "seed": 5, "max_tokens": 24, "stream": stream}
    made = client.chat.completions.create(model="tiny", logprobs=True, top_logprobs=n_best, **options)
    tables = [part.choices[0].logprobs for part in (made if stream else [made])]
    rows = [row for table in tables if table is not None for row in table.content]
    pieces = token_pieces(opened.tokenizer)
    _, log_p = distributions(opened, prompt, expected.tokens)
    for row, token, row_p in zip(rows, expected.tokens, log_p[expected.n_prompt_tokens - 1 :], strict=True):
        likeliest = row_p.topk(n_best)
        assert (row.token, row.bytes) == (token_text(pieces[token.id]), list(pieces[token.id]))
        assert [bytes(other.bytes) for other in row.top_logprobs] == [pieces[i] for i in likeliest.indices.tolist()]
        assert [other.token for other in row.top_logprobs] == [token_text(bytes(o.bytes)) for o in row.top_logprobs]
        told = [row.logprob, *(other.logprob for other in row.top_logprobs)]
        assert told == pytest.approx([float(row_p[token.id]), *likeliest.values.tolist()], abs=1e-5)


def test_the_greedy_token_is_the_likeliest(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    completion = client.completions.create(prompt=PROMPT, logprobs=2, **options)
    chat = client.chat.completions.create(
        messages=[{"role": "user", "content": PROMPT}], logprobs=True, top_logprobs=1, **options
    )
    table = completion.choices[0].logprobs
    assert [next(iter(best)) for best in table.top_logprobs] == table.tokens
    for row in chat.choices[0].logprobs.content:
        assert [(other.token, other.logprob) for other in row.top_logprobs] == [(row.token, row.logprob)]


def test_tokens_that_are_spelled_alike_do_not_hide_the_texts_own() -> None:
    pieces = [b"a", b"\xe2", b"bytes:\\xe2", b"a"]
    scores = Scores([None, -0.5], [None, 1.0], [None, {0: -0.5, 3: -2.0}])
    choice = Choice(0, pieces.__getitem__, log_probs=True, details=False, prompt="aa", prompt_ids=[3, 0], scores=scores)
    best = ((0, -0.5), (1, -1.5), (2, -2.5))
    choice.add(Piece(0, "a", SampledToken(0, 3, -3.0, 1.0, "length", best), "length"))
    table = CompletionFormat().full(choice)["logprobs"]
    assert table["token_logprobs"] == [None, -0.5, -3.0]
    assert table["top_logprobs"] == [None, {"a": -0.5}, {"a": -3.0, "bytes:\\xe2": -1.5}]
    (row,) = ChatFormat().full(choice)["logprobs"]["content"]
    assert [(bytes(other["bytes"]), other["logprob"]) for other in row["top_logprobs"]] == [
        (b"a", -0.5), (b"\xe2", -1.5), (b"bytes:\\xe2", -2.5),
    ]  # fmt: skip


def test_a_prompt_can_be_scored_and_not_continued(client: openai.OpenAI, expected: Completion) -> None:
    full = client.completions.create(model="tiny", prompt=PROMPT, seed=7, max_tokens=20, echo=True, logprobs=1)
    made = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    n = expected.n_prompt_tokens
    assert made.choices[0].text == PROMPT
    assert made.choices[0].logprobs.token_logprobs == full.choices[0].logprobs.token_logprobs[:n]
    assert made.usage.completion_tokens == 0


def test_details_of_every_token(client: openai.OpenAI, expected: Completion) -> None:
    options = {"extra_body": {"hrs": {"details": True}}, "seed": 7, "max_tokens": 20}
    whole = client.completions.create(model="tiny", prompt=PROMPT, **options)
    stream = list(client.completions.create(model="tiny", prompt=PROMPT, stream=True, **options))
    told = whole.choices[0].hrs["tokens"]
    assert [row["id"] for row in told] == [token.id for token in expected.tokens]
    assert [row["entropy"] for row in told] == pytest.approx([token.entropy for token in expected.tokens], abs=1e-5)
    assert [row for chunk in stream for row in chunk.choices[0].hrs["tokens"]] == told
    assert len(stream) == 20


def test_sampling_options_reach_the_model(client: openai.OpenAI, opened: OpenedModel) -> None:
    sampling = Sampling(
        temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.3, seed=2, max_new_tokens=30
    )
    (expected,) = generate_text(opened.model, opened.tokenizer, [PROMPT], sampling)
    extra = {"hrs": {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.3}}
    made = client.completions.create(
        model="tiny", prompt=PROMPT, temperature=0.7, top_p=0.9, seed=2, max_tokens=30, extra_body=extra
    )
    assert made.choices[0].text == expected.text


def test_a_text_outgrows_the_context(client: openai.OpenAI, opened: OpenedModel) -> None:
    sampling = Sampling(seed=2, max_new_tokens=100)
    (expected,) = generate_text(opened.model, opened.tokenizer, [PROMPT * 20], sampling)
    assert expected.n_prompt_tokens > opened.model.max_seq_len
    made = client.completions.create(model="tiny", prompt=PROMPT * 20, seed=2, max_tokens=100)
    assert made.choices[0].text == expected.text


def test_chat(client: openai.OpenAI, opened: OpenedModel) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    spelled = "System: Be brief.\n\nUser: Hi\n\nAssistant:"
    stop = ("\nSystem:", "\nUser:", "\nAssistant:")
    sampling = Sampling(seed=5, max_new_tokens=24, stop=stop)
    (expected,) = generate_text(opened.model, opened.tokenizer, [spelled], sampling)
    options = {"model": "tiny", "messages": messages, "seed": 5, "max_completion_tokens": 24}
    made = client.chat.completions.create(**options, logprobs=True)
    assert made.object == "chat.completion"
    assert made.choices[0].message.role == "assistant"
    assert made.choices[0].message.content == expected.text.lstrip()
    assert made.usage.prompt_tokens == expected.n_prompt_tokens
    rows = made.choices[0].logprobs.content
    assert [row.logprob for row in rows] == pytest.approx([token.log_prob for token in expected.tokens], abs=1e-5)
    assert all(row.top_logprobs == [] for row in rows)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text.lstrip()
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_without_a_length_ends(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], n=2)
    assert len(made.choices) == 2
    assert made.usage.completion_tokens <= 2 * 256


def test_texts_run_side_by_side(another) -> None:
    """The second one's first token comes while the first is far from its end."""
    options = {"model": "tiny", "prompt": "The", "max_tokens": 2000, "temperature": 0, "stream": True}
    with another(slots=2) as endpoint:
        client = endpoint.client()
        streams = [client.completions.create(**options) for _ in range(2)]
        for stream in streams:
            next(stream)
        assert endpoint.backend.n_running == 2
        for stream in streams:
            stream.close()
