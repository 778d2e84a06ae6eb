"""What an endpoint refuses, and how: one sentence in OpenAI's shape, by the status its clients know."""

import asyncio
import json
import threading

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from waiting import wait_until

BASE = {"model": "tiny", "prompt": "The", "max_tokens": 2}
LONG = BASE | {"max_tokens": 2000, "temperature": 0}
"""The likeliest tokens never end this text; see the first test."""
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def refusal(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


def test_a_long_text_is_long(client: openai.OpenAI) -> None:
    assert client.completions.create(**LONG).usage.completion_tokens == 2000


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"presence_penalty": 0.5}, "does not support 'presence_penalty'"),
        ({"frequency_penalty": -1}, "does not support 'frequency_penalty'"),
        ({"logit_bias": {"5": 1}}, "does not support 'logit_bias'"),
        ({"best_of": 3}, "does not support 'best_of'"),
        ({"suffix": "end"}, "does not support 'suffix'"),
        ({"suffix": "end", "best_of": 3, "logit_bias": None}, "does not support 'best_of', 'suffix': leave"),
        ({"frobnicate": 1}, "unknown parameter 'frobnicate'"),
        ({"hrs": {"topk": 1}}, "unknown parameter 'hrs.topk'"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"temperature": "1"}, "temperature: Input should be a valid number"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n: "),
        ({"max_tokens": 0}, "max_tokens of 0 needs echo"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [300]}, "300 is not a token id"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options is for stream=true only"),
        ({"logprobs": 6}, "logprobs"),
        ({"hrs": {"retrieval": {"mode": "slots", "threshold_bits": 1}}}, "needs a model that reads memories"),
    ],
)
def test_what_is_not_supported_or_wrong_is_named(endpoint, changes: dict, part: str) -> None:
    response = httpx.post(f"{endpoint.url}/v1/completions", json=BASE | changes)
    assert response.status_code == 400, response.text
    error = refusal(response)
    assert part in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "sentences", "param"),
    [
        (
            {"n": 0, "temperature": 3, "frobnicate": 1, "stop": [""]},
            ["n: Input should be greater than or equal to 1", "temperature: Input should be less than or equal to 2",
             "stop.0: Value should have at least 1 item", "unknown parameter 'frobnicate'"],
            "n",
        ),
        # A field of several types fails by each of them; told is the one that was meant.
        ({"prompt": [1, -1]}, ["prompt.1: Input should be greater than or equal to 0"], "prompt.1"),
        ({"prompt": ["a", "b", 3]}, ["prompt.2: Input should be a valid string"], "prompt.2"),
        ({"prompt": {"a": 1}}, ["prompt: Input should be a valid string"], "prompt"),
        (
            {"hrs": {"retrieval": {"mode": "x", "k": 99, "zz": 1}, "topk": 3}},
            ["hrs.retrieval.mode: Input should be 'text', 'slots', 'both' or 'observe'", "hrs.retrieval.k: ",
             "unknown parameter 'hrs.retrieval.zz'", "unknown parameter 'hrs.topk'"],
            "hrs.retrieval.mode",
        ),
    ],
)  # fmt: skip
def test_all_that_is_wrong_is_named_at_once(endpoint, changes: dict, sentences: list[str], param: str) -> None:
    error = refusal(httpx.post(f"{endpoint.url}/v1/completions", json=BASE | changes))
    said = error["message"].split("; ")
    assert len(said) == len(sentences)
    assert all(each.startswith(sentence) for each, sentence in zip(sorted(said), sorted(sentences), strict=True))
    assert error["param"] == param


def test_a_thousand_mistakes_are_not_all_named(endpoint) -> None:
    body = BASE | {f"x{number}": 1 for number in range(1000)}
    error = refusal(httpx.post(f"{endpoint.url}/v1/completions", json=body))
    assert error["message"].endswith("unknown parameter 'x9'; and 990 more")
    assert error["code"] == "unknown_parameter"


def test_what_is_missing_is_named(endpoint) -> None:
    assert refusal(httpx.post(f"{endpoint.url}/v1/completions", json={}))["message"] == (
        "model: Field required; prompt: Field required"
    )
    listed = httpx.get(f"{endpoint.url}/v1/memories", params={"limit": 0, "offset": -1})
    assert refusal(listed)["message"].startswith("limit: ")
    assert "; offset: " in listed.json()["error"]["message"]


@pytest.mark.parametrize(
    "changes",
    [
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1, "suffix": None},
        {"user": "me", "temperature": None, "n": None, "stop": None, "seed": None, "hrs": None, "stream": None},
        {"stop": "x", "hrs": {"retrieval": False}, "seed": -5},
    ],
)
def test_what_asks_for_nothing_is_accepted(endpoint, changes: dict) -> None:
    assert httpx.post(f"{endpoint.url}/v1/completions", json=BASE | changes).status_code == 200


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"tools": [{"type": "function"}]}, "does not support 'tools'"),
        ({"response_format": {"type": "json_object"}}, "does not support 'response_format'"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=true"),
    ],
)
def test_chats_too(endpoint, changes: dict, part: str) -> None:
    response = httpx.post(f"{endpoint.url}/v1/chat/completions", json=CHAT | changes)
    assert response.status_code == 400
    assert part in refusal(response)["message"]
    neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False}
    assert httpx.post(f"{endpoint.url}/v1/chat/completions", json=CHAT | neutral).status_code == 200


def test_openais_client_raises_what_its_users_catch(endpoint, another) -> None:
    client = endpoint.client()
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        client.completions.create(**BASE, presence_penalty=1)
    with pytest.raises(openai.NotFoundError, match="is not served here: it is 'tiny'"):
        client.completions.create(**BASE | {"model": "gpt-5"})
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.UnprocessableEntityError, match="is more than the 2048"):
        client.completions.create(**BASE | {"max_tokens": 5000})
    with pytest.raises(openai.UnprocessableEntityError, match="is longer than the 8192"):
        client.completions.create(**BASE | {"prompt": "x " * 10000})
    with pytest.raises(openai.UnprocessableEntityError, match="is more than 16"):
        client.completions.create(**BASE | {"n": 17})
    with pytest.raises(openai.UnprocessableEntityError, match="context of 64 tokens only"):
        client.completions.create(**BASE | {"prompt": "wave " * 100, "logprobs": 1, "echo": True})


def test_a_failure_before_the_first_token_of_a_stream_is_a_status(endpoint) -> None:
    body = BASE | {"stream": True, "hrs": {"retrieval": {"mode": "both"}}}
    assert httpx.post(f"{endpoint.url}/v1/completions", json=body).status_code == 400
    assert endpoint.backend.n_running == 0


def test_models(endpoint) -> None:
    client = endpoint.client()
    (model,) = client.models.list().data
    assert client.models.retrieve("tiny") == model
    assert model.id == "tiny"
    assert model.hrs["causal"] is True
    assert (model.hrs["threshold_bits"], model.hrs["entropy_quantiles"]) == (None, None)
    assert model.hrs["context"] == 64


def test_unknown_paths_and_methods(endpoint) -> None:
    assert refusal(httpx.get(f"{endpoint.url}/v2")).keys()
    assert httpx.get(f"{endpoint.url}/v2").status_code == 404
    response = httpx.get(f"{endpoint.url}/v1/completions")
    assert response.status_code == 405
    assert refusal(response)["message"] == "/v1/completions does not take GET"


def test_the_page_or_a_plain_404(endpoint) -> None:
    from serve.api import PLAYGROUND

    response = httpx.get(f"{endpoint.url}/")
    if PLAYGROUND.is_file():
        assert response.headers["content-type"].startswith("text/html")
    else:
        assert response.status_code == 404
        assert refusal(response)


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_not_read(another) -> None:
    with another(max_body_bytes=1000) as endpoint:
        url = f"{endpoint.url}/v1/completions"
        assert httpx.post(url, json=BASE).status_code == 200
        response = httpx.post(url, json=BASE | {"prompt": "x" * 1000})
        assert response.status_code == 413
        assert refusal(response)["code"] == "body_too_large"
        streamed = httpx.post(url, content=(b"x" * 400 for _ in range(4)))  # chunked: no length is declared
        assert streamed.status_code == 413


def test_a_full_queue_is_said_at_once_and_drains(another) -> None:
    with another(slots=1, max_queue=1) as endpoint:
        client = endpoint.client()
        first = client.completions.create(**LONG, stream=True)
        next(first)
        waiting: list[openai.types.Completion] = []
        thread = threading.Thread(target=lambda: waiting.append(client.completions.create(**BASE, temperature=0)))
        thread.start()
        wait_until(lambda: endpoint.backend.n_running == 2, thread.is_alive)
        response = httpx.post(f"{endpoint.url}/v1/completions", json=BASE)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert refusal(response)["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**BASE)
        assert client.models.list().data  # what needs no slot is answered
        first.close()
        thread.join()
        assert waiting[0].usage.completion_tokens == 2


def test_more_choices_than_the_queue_has_room_for_begin_not_one(another) -> None:
    with another(slots=1, max_queue=2) as endpoint:
        client = endpoint.client()
        for n in (4, 128):
            with pytest.raises(openai.UnprocessableEntityError, match=f"n of {n} is more than 3: ask for fewer"):
                client.completions.create(**BASE, n=n)
            with pytest.raises(openai.UnprocessableEntityError, match="is more than 3"):
                client.chat.completions.create(**CHAT, n=n)
        running = client.completions.create(**LONG, stream=True)
        next(running)
        with pytest.raises(openai.RateLimitError, match="try again shortly"):  # later there is room
            client.completions.create(**BASE, n=3)
        assert endpoint.backend.n_running == 1
        running.close()
        endpoint.wait_until_idle()
        assert len(client.completions.create(**BASE, n=3).choices) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(another, stream: bool) -> None:
    with another(slots=1, max_queue=0) as endpoint:
        body = LONG | {"stream": stream}
        with httpx.Client() as client:
            if stream:
                with client.stream("POST", f"{endpoint.url}/v1/completions", json=body) as response:
                    lines = response.iter_lines()  # kept: with its iterator httpx gives up the connection
                    next(lines)
                    assert endpoint.backend.n_running == 1
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{endpoint.url}/v1/completions", json=body, timeout=httpx.Timeout(None, read=0.2))
        endpoint.wait_until_idle()
        assert endpoint.client().completions.create(**BASE, temperature=0).usage.completion_tokens == 2
        page = httpx.get(f"{endpoint.url}/metrics").text
        assert 'hrs_cancelled_total{replica="0"} 1.0' in page


def test_many_connections_at_once_are_all_answered(another) -> None:
    async def ask(client: httpx.AsyncClient, url: str) -> int:
        return (await client.post(url, json=BASE | {"max_tokens": 20})).status_code

    async def flood(url: str) -> list[int]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(limits=limits) as client:
            return await asyncio.gather(*(ask(client, url) for _ in range(200)))

    with another(slots=4, max_queue=8) as endpoint:
        statuses = asyncio.run(flood(f"{endpoint.url}/v1/completions"))
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 12
        endpoint.wait_until_idle()
        assert endpoint.client().completions.create(**BASE).choices


# ---- malformed bodies ------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ROUTES = ("completions", "chat/completions", "embeddings", "memories", "memories/search", "topics/topic-1")


@examples(40)
@given(route=st.sampled_from(ROUTES), value=JSON)
def test_a_body_of_any_other_shape_is_refused(endpoint, route: str, value: object) -> None:
    response = httpx.post(f"{endpoint.url}/v1/{route}", content=json.dumps(value))
    assert 400 <= response.status_code < 500
    assert refusal(response)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"model": "tiny", "prompt": "\\ud800"}', b"[" * 100_000,
        b'{"model": "tiny", "prompt": "The", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "The", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "The", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "The", "max_tokens": 1.5}',
        b'{"model": "tiny", "prompt": {"a": 1}}',
        b'{"model": "tiny", "prompt": ["The", 1]}',
        b'{"model": "tiny", "prompt": [[]]}', b'{"model": "\\ud800", "prompt": "The"}', b'{"\\ud800": 1}',
    ],
)  # fmt: skip
def test_malformed_bodies(endpoint, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{endpoint.url}/v1/completions", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert refusal(response)


def test_what_is_not_json_is_called_so(endpoint) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{endpoint.url}/v1/completions", content=b'{"model": "tiny", }', headers=headers)
    error = refusal(response)
    assert error["message"].startswith("the body is not JSON: ")
    assert error["message"].endswith(" at character 18")
    assert error["param"] is None
