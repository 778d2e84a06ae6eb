"""What clients send in many ways, and what they are told of it: nulls, HEAD, other sites, bodies that are not JSON."""

import contextlib
import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from pydantic import ValidationError

from hrs.retrieval.topics import TopicContexts
from serve.offsets import Offsets
from serve.settings import Settings

BASE = {"model": "tiny", "prompt": "The", "max_tokens": 2}
PAGE = "http://localhost:3000"


# ---- offsets ---------------------------------------------------------------------------------------------------------


def characters_of(data: bytes) -> list[int]:
    """Return the index of the character that each byte belongs to, by Python's own decoding of the rest at each one."""
    found: list[int] = []
    n_characters = 0
    while len(found) < len(data):
        rest = data[len(found) :]
        length = next(
            (n for n in range(1, 5) if len(rest[:n].decode(errors="ignore")) == 1 and _is_valid(rest[:n])), None
        )
        if length is None:
            with pytest.raises(UnicodeDecodeError) as failed:
                rest.decode()
            length = failed.value.end - failed.value.start
        found += [n_characters] * length
        n_characters += 1
    assert n_characters == len(data.decode(errors="replace"))
    return found


def _is_valid(data: bytes) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        return bool(data.decode())
    return False


TEXT = st.lists(st.text(alphabet="aé✗𝄞\ufffd", max_size=4).map(str.encode) | st.binary(max_size=3), max_size=6).map(
    b"".join
)


@examples(200)
@given(text=TEXT, cuts=st.lists(st.integers(0, 30)))
def test_an_offset_is_the_index_of_the_character_that_a_token_begins_in(text: bytes, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    offsets, expected = Offsets(), characters_of(text)
    told = [offsets.push(piece) for piece in pieces]
    for piece, start, offset in zip(pieces, bounds, told, strict=False):
        if piece:
            assert offset == expected[start]
    offsets.end()
    assert offsets.push(b"x") == len(text.decode(errors="replace"))


def test_offsets_count_in_the_text_where_a_character_takes_several_tokens(endpoint) -> None:
    body = {"model": "tiny", "prompt": "é✗a", "max_tokens": 0, "echo": True, "logprobs": 1}
    (choice,) = httpx.post(f"{endpoint.url}/v1/completions", json=body).json()["choices"]
    assert choice["text"] == "é✗a"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 2]
    more = body | {"max_tokens": 8, "seed": 3}
    (whole,) = httpx.post(f"{endpoint.url}/v1/completions", json=more).json()["choices"]
    assert whole["logprobs"]["text_offset"][6] == 3
    lines = httpx.post(f"{endpoint.url}/v1/completions", json=more | {"stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and not line.endswith("[DONE]")]
    streamed = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert streamed == whole["logprobs"]["text_offset"]


# ---- null ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", BASE | {"hrs": dict.fromkeys(("top_k", "min_p", "repetition_penalty", "details", "topics"))}),
        ("completions", BASE | {"stream": True, "stream_options": {"include_usage": None}}),
        (
            "completions",
            BASE | {"hrs": {"retrieval": {"mode": None, "k": None, "exclude_sources": None, "threshold_bits": 1}}},
        ),
        (
            "completions",
            BASE | dict.fromkeys(("n", "temperature", "top_p", "seed", "stop", "echo", "logprobs", "user", "best_of")),
        ),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x", "name": None}],
                              "max_tokens": 2, "logprobs": None, "top_logprobs": None, "store": None}),
        ("embeddings", {"model": "tiny", "input": "x", "encoding_format": None, "dimensions": None, "user": None}),
        ("memories", {"input": "The moon", "source": None, "topic": None}),
        ("memories/search", {"query": "x", "k": None, "min_similarity": None, "topics": None, "sources": None}),
    ],
)  # fmt: skip
def test_null_is_the_default(endpoint, path: str, body: dict) -> None:
    response = httpx.post(f"{endpoint.url}/v1/{path}", json=body)
    assert response.status_code == 200, response.text


# ---- lists -----------------------------------------------------------------------------------------------------------


def test_lists_count_what_was_asked_for_and_say_whether_there_is_more(another: Callable) -> None:
    with another() as endpoint, httpx.Client(base_url=f"{endpoint.url}/v1") as http:
        http.post("/memories", json={"input": ["one", "two", "three", "four"], "source": "book"})
        http.post("/memories", json={"input": ["five"], "source": "letter", "topic": "a"})

        def page(**asked: object) -> tuple[int, int, bool]:
            answer = http.get("/memories", params=asked).json()
            return len(answer["data"]), answer["total"], answer["has_more"]

        assert page() == (5, 5, False)
        assert page(limit=5) == (5, 5, False)
        assert page(limit=4) == (4, 5, True)
        assert page(source="book", limit=4) == (4, 4, False)
        assert page(source="book", limit=2, offset=1) == (2, 4, True)
        assert page(topic="a") == (1, 1, False)
        assert page(topic="b") == (0, 0, False)
        assert page(offset=9) == (0, 5, False)


def test_many_texts_are_embedded_at_once(endpoint, another: Callable) -> None:
    body = {"model": "tiny", "input": [f"wave {number}" for number in range(70)]}
    data = httpx.post(f"{endpoint.url}/v1/embeddings", json=body).json()["data"]
    assert [row["index"] for row in data] == list(range(70))
    alone = httpx.post(f"{endpoint.url}/v1/embeddings", json=body | {"input": "wave 69"}).json()["data"]
    assert data[69]["embedding"] == pytest.approx(alone[0]["embedding"], abs=1e-5)
    with another(max_embedding_texts=3) as small:
        refused = httpx.post(f"{small.url}/v1/embeddings", json=body | {"input": ["x"] * 4})
        assert refused.status_code == 422 and "4 texts at once are more than 3" in refused.text
        assert httpx.post(f"{small.url}/v1/embeddings", json=body | {"input": [1, 2, 3, 4]}).status_code == 200


# ---- HEAD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/metrics", "/v1/models", "/v1/topics", "/v1/nothing"])
def test_head_is_get_without_the_body(endpoint, path: str) -> None:
    told, whole = httpx.head(endpoint.url + path), httpx.get(endpoint.url + path)
    assert (told.status_code, told.content) == (whole.status_code, b"")
    assert told.headers["content-type"] == whole.headers["content-type"]
    assert whole.content


# ---- pages of other sites --------------------------------------------------------------------------------------------


def preflight(url: str, origin: str, method: str = "POST") -> httpx.Response:
    """Ask what a browser asks before a page's request."""
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    return httpx.options(
        f"{url}/v1/completions", headers=headers | {"Access-Control-Request-Headers": "authorization,content-type"}
    )


def test_pages_that_are_allowed_may_ask_and_read(another: Callable, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a-key\n")
    with another(allowed_origins=[PAGE], api_key_file=str(tmp_path / "keys")) as endpoint:
        asked = preflight(endpoint.url, PAGE)  # browsers send no key with it
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in asked.headers["access-control-allow-headers"]
        headers = {"Origin": PAGE, "Authorization": "Bearer a-key"}
        answer = httpx.post(f"{endpoint.url}/v1/completions", json=BASE, headers=headers)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
        refused = httpx.post(f"{endpoint.url}/v1/completions", json=BASE, headers={"Origin": PAGE})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == PAGE
        for other in (preflight(endpoint.url, "http://evil.example"), preflight(endpoint.url, PAGE, "PATCH")):
            assert (other.status_code, other.json()["error"]["code"]) == (403, "origin_not_allowed")
        read = httpx.get(f"{endpoint.url}/v1/models", headers=headers | {"Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in read.headers


def test_without_an_origin_no_page_may_ask(endpoint) -> None:
    refused = preflight(endpoint.url, PAGE)
    assert refused.status_code == 403
    assert f"start it with --allow-origin {PAGE}" in refused.json()["error"]["message"]
    answer = httpx.get(f"{endpoint.url}/v1/models", headers={"Origin": PAGE})
    assert not {"access-control-allow-origin", "vary"} & set(answer.headers)


def test_what_is_no_origin_is_refused_before_the_start() -> None:
    assert Settings(model="m", allowed_origins=["HTTP://Localhost:3000", "*"]).allowed_origins[0] == PAGE
    for wrong in ("localhost:3000", "http://x/", "https://x/path", "ftp://x"):
        with pytest.raises(ValidationError, match="is no origin"):
            Settings(model="m", allowed_origins=[wrong])


# ---- bodies ----------------------------------------------------------------------------------------------------------

AS_JSON = {"Content-Type": "application/json"}
COMPRESSED = {**AS_JSON, "Content-Encoding": "gzip"}


@pytest.mark.parametrize(
    ("content", "headers", "status", "part"),
    [
        (json.dumps(BASE).encode(), {}, 415, "does not say what its body is: send 'Content-Type: application/json'"),
        (b"model=tiny", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "x-www-form-urlencoded' is not"),
        (gzip.compress(json.dumps(BASE).encode(), mtime=0), COMPRESSED, 415, "is compressed ('gzip')"),
        (b"{}", {"Content-Type": "application/json; charset=latin-1"}, 415, "in 'latin-1' is not read here"),
        (b'{"model": "caf\xe9"}', AS_JSON, 400, "the body is not UTF-8 at byte 14"),
        (b"", AS_JSON, 400, "the body must be a JSON object"),
        (b"[]", AS_JSON, 400, "the body must be a JSON object"),
        (b"null", AS_JSON, 400, "the body must be a JSON object"),
        (b"[" * 100_000, AS_JSON, 400, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", AS_JSON, 400, "thousands of digits"),
    ],
    ids=["untyped", "form", "gzip", "charset", "latin-1", "empty", "list", "null", "nested", "digits"],
)
def test_what_is_wrong_with_a_body_is_said(endpoint, content: bytes, headers: dict, status: int, part: str) -> None:
    response = httpx.post(f"{endpoint.url}/v1/completions", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert part in response.json()["error"]["message"]


def test_json_may_be_called_so_in_several_ways(endpoint) -> None:
    for kind in ("application/json; charset=UTF-8", "Application/JSON", "application/vnd.x+json"):
        response = httpx.post(f"{endpoint.url}/v1/completions", json=BASE, headers={"Content-Type": kind})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "prompt: List should have at least 1 item"),
        ([-1], "prompt.0: Input should be greater than or equal to 0"),
        ([[]], "prompt.0: List should have at least 1 item"),
        ([[5, -1]], "prompt.0.1: Input should be greater than or equal to 0"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_said(endpoint, prompt: list, sentence: str) -> None:
    said = httpx.post(f"{endpoint.url}/v1/completions", json=BASE | {"prompt": prompt}).json()["error"]["message"]
    assert said.startswith(sentence) and ";" not in said


# ---- what a server keeps ---------------------------------------------------------------------------------------------


def test_a_topic_context_is_what_the_model_reads(another: Callable) -> None:
    with another() as endpoint, httpx.Client(base_url=f"{endpoint.url}/v1") as http:
        for _ in range(6):
            body = BASE | {"prompt": "The wave and the tide and the ship", "hrs": {"topics": True}}
            (choice,) = http.post("/completions", json=body).json()["choices"]
        assert choice["hrs"]["topic"]["context_tokens"] == 32, "half of the context of 64"


def no_lock(folder: Path) -> None:
    (folder / "topics.lock").mkdir()


def full_disk(folder: Path) -> None:
    (folder / "topics.part").symlink_to("/dev/full")


def wrong_width(folder: Path) -> None:
    (folder / "topics.json").write_text(TopicContexts(3).to_json())


@pytest.mark.parametrize("damage", [no_lock, full_disk, wrong_width])
def test_topics_that_cannot_be_kept_are_the_servers_trouble(
    another: Callable, tmp_path: Path, damage: Callable
) -> None:
    damage(tmp_path)
    with another() as endpoint:
        body = BASE | {"hrs": {"topics": True}}
        response = httpx.post(f"{endpoint.url}/v1/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "storage_unavailable"), response.text
        assert httpx.post(f"{endpoint.url}/v1/completions", json=BASE).status_code == 200
