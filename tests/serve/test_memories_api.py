"""Embeddings, memories, topics and retrieval through HTTP: what is written is found, by other replicas too."""

import base64
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch

from hrs.data import open_tokens
from hrs.export.opening import OpenedModel, open_model
from hrs.presets import experiment
from hrs.retrieval.bank import open_bank, weights_fingerprint
from hrs.retrieval.bank.slots import slot_maker
from hrs.retrieval.engrams import engrams
from hrs.retrieval.store import Hit, Memory
from hrs.storage import Storage
from hrs.training import Runtime, load_model, train
from serve.opening import open_backend, slots_of
from serve.settings import Settings

TEXTS = ["The wave and the tide", "The cloud and the star", "The wheat and the barn"]

ROUNDING = 1e-5
"""Nats and bits: logits below 16 in float32 are 1e-6 apart, and what decodes beside a text decides how it is summed.
What a model reads moves them by more."""


@pytest.fixture
def http(another: Callable) -> Iterator[httpx.Client]:
    """An endpoint with memories of its own."""
    with another() as endpoint, httpx.Client(base_url=f"{endpoint.url}/v1") as client:
        yield client


def remember(http: httpx.Client, *texts: str, **more: str) -> list[dict]:
    response = http.post("/memories", json={"input": list(texts), **more})
    assert response.status_code == 200, response.text
    return response.json()["data"]


def log_probs(told: dict) -> list[float]:
    """Return the log-probabilities of a reply's tokens."""
    return [token["log_prob"] for token in told["tokens"]]


# ---- embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings_are_engrams_of_length_one(client: openai.OpenAI, opened: OpenedModel) -> None:
    ids = [opened.tokenizer.encode(text).ids for text in TEXTS]
    expected = engrams(opened.model, ids)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    made = client.embeddings.create(model="tiny", input=TEXTS)  # the client asks for base64 by itself
    assert [row.index for row in made.data] == [0, 1, 2]
    np.testing.assert_allclose([row.embedding for row in made.data], expected, atol=1e-6)
    assert made.usage.prompt_tokens == made.usage.total_tokens == sum(map(len, ids))
    as_floats = client.embeddings.create(model="tiny", input=ids, encoding_format="float")
    np.testing.assert_allclose([row.embedding for row in as_floats.data], expected, atol=1e-6)
    one = client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=opened.model.d_model)
    np.testing.assert_allclose(one.data[0].embedding, expected[0], atol=1e-6)


def test_base64_is_little_endian_float32(http: httpx.Client) -> None:
    body = {"model": "tiny", "input": TEXTS[0]}
    as_text = http.post("/embeddings", json=body | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
    as_floats = http.post("/embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(as_text), "<f4"), np.array(as_floats, np.float32))


@pytest.mark.parametrize(
    ("changes", "status"),
    [({"dimensions": 3}, 400), ({"input": []}, 400), ({"input": "wave " * 100}, 422),
     ({"model": "other"}, 404), ({"encoding_format": "int8"}, 400), ({"input": [400]}, 400)],
)  # fmt: skip
def test_embeddings_that_are_refused(http: httpx.Client, changes: dict, status: int) -> None:
    assert http.post("/embeddings", json={"model": "tiny", "input": "x"} | changes).status_code == status


# ---- memories --------------------------------------------------------------------------------------------------------


def test_memories_are_added_listed_found_and_deleted(http: httpx.Client) -> None:
    added = remember(http, *TEXTS, source="book", topic="a")
    other = remember(http, "The moon", source="letter")
    assert [memory["text"] for memory in added] == TEXTS
    assert all(0 < memory["entropy"] < 9 and memory["source"] == "book" and memory["topic"] == "a" for memory in added)
    assert http.get("/memories").json()["data"] == added + other
    assert http.get("/memories", params={"source": "book", "limit": 2}).json()["data"] == added[:2]
    assert http.get("/memories", params={"topic": "a", "limit": 2, "offset": 2}).json()["data"] == added[2:]
    assert http.get(f"/memories/{added[1]['id']}").json() == added[1]

    found = http.post("/memories/search", json={"query": TEXTS[1], "k": 2}).json()["data"]
    assert found[0]["text"] == TEXTS[1]
    assert found[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert found[1]["similarity"] < found[0]["similarity"]
    elsewhere = http.post("/memories/search", json={"query": TEXTS[1], "sources": ["letter"]}).json()["data"]
    assert [memory["text"] for memory in elsewhere] == ["The moon"]

    assert http.delete(f"/memories/{added[1]['id']}").json()["deleted"] is True
    for response in (http.delete(f"/memories/{added[1]['id']}"), http.get(f"/memories/{added[1]['id']}")):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "memory_not_found"
    assert http.get("/memories").json()["total"] == 3


@pytest.mark.parametrize(
    ("body", "status"),
    [({"input": ""}, 400), ({"input": ["x", " \n"]}, 400), ({"input": "wave " * 100}, 422), ({"input": 5}, 400),
     ({"input": ["x"] * 65}, 422), ({"input": "x", "source": ""}, 400), ({"input": "x", "where": "y"}, 400)],
)  # fmt: skip
def test_memories_that_are_refused_leave_nothing(http: httpx.Client, body: dict, status: int) -> None:
    assert http.post("/memories", json=body).status_code == status
    assert http.get("/memories").json()["total"] == 0


def test_replicas_see_each_others_memories_and_topics_and_a_restart_keeps_them(another: Callable) -> None:
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(another()) for _ in range(2)]
        one, two = (stack.enter_context(httpx.Client(base_url=f"{end.url}/v1")) for end in ends)
        (first,) = remember(one, TEXTS[0], topic="auto")
        assert two.get("/memories").json()["data"] == [first]
        (second,) = remember(two, TEXTS[1], topic="auto")
        assert [m["id"] for m in one.get("/memories").json()["data"]] == [first["id"], second["id"]]
        name = {"name": "waters"}
        assert two.post(f"/topics/{first['topic']}", json=name).json()["name"] == "waters"
        assert "waters" in [topic["name"] for topic in one.get("/topics").json()["data"]]
        one.delete(f"/memories/{first['id']}")
        assert two.get(f"/memories/{first['id']}").status_code == 404
    with another() as end:
        kept = httpx.get(f"{end.url}/v1/memories").json()["data"]
        assert kept == [second]
        assert "waters" in [topic["name"] for topic in httpx.get(f"{end.url}/v1/topics").json()["data"]]


# ---- topics ----------------------------------------------------------------------------------------------------------


def test_topics_are_made_listed_renamed_and_switched_off(http: httpx.Client) -> None:
    assert http.get("/topics").json()["data"] == []
    (memory,) = remember(http, TEXTS[0], topic="auto")
    (topic,) = http.get("/topics").json()["data"]
    assert topic["id"] == memory["topic"]
    assert topic["enabled"]
    changed = http.post(f"/topics/{topic['id']}", json={"enabled": False, "name": "sea"}).json()
    assert (changed["name"], changed["enabled"]) == ("sea", False)
    assert http.get("/topics").json()["data"] == [changed]
    assert http.post("/memories/search", json={"query": TEXTS[0]}).json()["data"] == []
    http.post(f"/topics/{topic['id']}", json={"enabled": True})
    assert http.post("/memories/search", json={"query": TEXTS[0]}).json()["data"]
    assert http.post("/topics/topic-99", json={"name": "x"}).status_code == 404
    assert http.post(f"/topics/{topic['id']}", json={}).status_code == 400
    assert http.post(f"/topics/{topic['id']}", json={"name": "  "}).status_code == 400


def test_a_prompt_is_read_after_its_topics_earlier_prompts(http: httpx.Client) -> None:
    def ask(prompt: str, **hrs: object) -> dict:
        body = {"model": "tiny", "prompt": prompt, "seed": 3, "max_tokens": 12, "hrs": hrs}
        return http.post("/completions", json=body).json()["choices"][0]

    alone = ask(TEXTS[0])
    first = ask(TEXTS[0], topics=True)
    assert first["text"] == alone["text"]
    assert first["hrs"]["topic"]["created"]
    assert first["hrs"]["topic"]["context_tokens"] == 0
    second = ask(TEXTS[0], topics=True)
    assert second["hrs"]["topic"]["id"] == first["hrs"]["topic"]["id"]
    assert second["hrs"]["topic"]["similarity"] == pytest.approx(1, abs=1e-5)
    assert second["hrs"]["topic"]["context_tokens"] > 0
    assert second["text"] != alone["text"]
    http.post(f"/topics/{first['hrs']['topic']['id']}", json={"enabled": False})
    assert ask(TEXTS[0], topics=True)["text"] == alone["text"]


# ---- retrieval -------------------------------------------------------------------------------------------------------


def test_a_reply_tells_what_was_looked_up(http: httpx.Client) -> None:
    remember(http, *TEXTS, topic="a")
    body = {"model": "tiny", "prompt": "The", "seed": 1, "max_tokens": 30}

    def ask(**retrieval: object) -> dict:
        options = {"threshold_bits": 0, "min_similarity": -1, "k": 2, **retrieval}
        hrs = {"retrieval": options, "details": True}
        return http.post("/completions", json=body | {"hrs": hrs}).json()["choices"][0]

    plain = http.post("/completions", json=body | {"hrs": {"details": True}}).json()["choices"][0]
    assert "retrieval" not in plain["hrs"]
    made = ask()
    event = made["hrs"]["retrieval"][0]
    assert event["step"] == 9  # the window of ten tokens is full
    assert 0 < event["entropy"] < 9
    assert [hit["text"] in TEXTS for hit in event["hits"]] == [True, True]
    assert event["n_tokens"] > 0
    assert [t["id"] for t in made["hrs"]["tokens"][:10]] == [t["id"] for t in plain["hrs"]["tokens"][:10]]
    assert log_probs(made["hrs"])[:10] == pytest.approx(log_probs(plain["hrs"])[:10], abs=ROUNDING)
    assert log_probs(made["hrs"])[10] != pytest.approx(log_probs(plain["hrs"])[10], abs=ROUNDING)
    observed = ask(mode="observe")
    assert observed["hrs"]["retrieval"][0]["hits"]
    assert observed["text"] == plain["text"]
    assert ask(topics=["b"])["hrs"]["retrieval"][0]["hits"] == []
    assert ask(threshold_bits=60)["text"] == plain["text"]


def test_a_model_of_unknown_entropy_needs_a_threshold(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "The", "hrs": {"retrieval": True}}
    refused = http.post("/completions", json=body)
    assert refused.status_code == 400
    assert "hrs.retrieval.threshold_bits" in refused.json()["error"]["message"]


def test_a_stream_tells_it_where_it_happens(http: httpx.Client, tmp_path: Path) -> None:
    remember(http, *TEXTS)
    client = openai.OpenAI(base_url=str(http.base_url), api_key="any")
    hrs = {"details": True, "retrieval": {"threshold_bits": 0, "min_similarity": -1}}
    chunks = list(
        client.completions.create(
            model="tiny", prompt="The", seed=1, max_tokens=30, stream=True, extra_body={"hrs": hrs}
        )
    )
    where = [number for number, chunk in enumerate(chunks) if "retrieval" in chunk.choices[0].hrs]
    assert where[0] == 9
    assert [chunks[n].choices[0].hrs["retrieval"][0]["step"] for n in where] == where
    assert all(0 <= chunk.choices[0].hrs["tokens"][0]["entropy"] < 9 for chunk in chunks)
    page = http.get(str(http.base_url).replace("/v1/", "/metrics")).text
    assert f'hrs_retrieval_events_total{{replica="0"}} {len(where):.1f}' in page


def test_retrieval_by_default_uses_the_gate_of_the_settings(another: Callable) -> None:
    settings = {"retrieval_threshold_bits": 0.0, "retrieval_min_similarity": -1.0, "retrieval_k": 3}
    with another(**settings) as endpoint, httpx.Client(base_url=f"{endpoint.url}/v1") as http:
        remember(http, *TEXTS)
        body = {"model": "tiny", "prompt": "The", "seed": 1, "max_tokens": 30, "hrs": {"retrieval": True}}
        events = http.post("/completions", json=body).json()["choices"][0]["hrs"]["retrieval"]
    assert len(events[0]["hits"]) == 3


# ---- slots -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage with a base, and a model that has learned for two steps to read the slots it makes."""
    storage = Storage(tmp_path_factory.mktemp("storage"))
    small = {
        "data.tokenizer": "bpe:300", "data.corpus": f"jsonl:{small_corpus}", "model.max_seq_len": 64,
        "training.steps": 2, "training.validations": 0, "training.schedule.warmup_frac": 0.0,
    }  # fmt: skip
    config, runtime = experiment("dense_baseline", "micro", overrides=small), Runtime(device="cpu")
    store = open_tokens(config.data, storage.tokens)
    list(train(config, store, storage.run("base"), runtime))
    named = {"base": "base", "fingerprint": weights_fingerprint(load_model(storage.run("base"))[0])}
    named |= {"chunk_tokens": 8, "neighbours": 2}
    changes = {f"training.retrieval.{name}": value for name, value in named.items()} | {"model.engram.slots": 16}
    config = experiment("dense_retrieved", "micro", overrides=small | changes)
    bank = open_bank(config, store, storage.run("base"), storage.root / "memories")
    list(train(config, store, storage.run("reader"), runtime, memories=bank))
    return storage


def test_a_model_with_retrieved_engrams_attends_to_what_its_base_makes_of_what_was_found(
    learned: Storage, serving: Callable
) -> None:
    settings = Settings(model=str(learned.run("reader")), name="tiny", storage=str(learned.root), device="cpu")
    long = "The wave and the tide and the ship and the storm and the harbour and the sail"
    with (
        serving(open_backend(settings)) as endpoint,
        httpx.Client(base_url=f"{endpoint.url}/v1") as http,
    ):
        remember(http, long, *TEXTS)

        def ask(mode: str) -> dict:
            retrieval = {"mode": mode, "k": 3, "threshold_bits": 0, "min_similarity": -1}
            hrs = {"retrieval": retrieval, "details": True}
            body = {"model": "tiny", "prompt": "The", "seed": 1, "max_tokens": 14, "hrs": hrs}
            return http.post("/completions", json=body).json()["choices"][0]["hrs"]

        observed, attended = ask("observe"), ask("slots")
    event = attended["retrieval"][0]
    opened = open_model(learned.run("reader"), learned.tokens)
    texts = [hit["text"] for hit in event["hits"]]
    assert len(texts) == 3
    made = slot_maker(opened.model, opened.config, opened.tokenizer, learned.run("base"))
    assert event["n_slots"] == len(made([as_hit(text) for text in texts[:2]]))  # as many as in training  # type: ignore
    assert event["n_slots"] > 3 and event["n_tokens"] == 0
    assert log_probs(attended)[:10] == pytest.approx(log_probs(observed)[:10], abs=ROUNDING)
    assert attended["tokens"][10]["entropy"] != pytest.approx(observed["tokens"][10]["entropy"], abs=ROUNDING)


def test_without_its_base_the_model_itself_reads_what_was_found_and_a_line_says_so(
    learned: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_model(learned.run("reader"), learned.tokens)
    hits = [as_hit(TEXTS[0])]
    by_base, by_itself = (
        slot_maker(opened.model, opened.config, opened.tokenizer, where) for where in (learned.run("base"), None)
    )
    with_base = slots_of(opened, learned)
    assert not caplog.records
    without = slots_of(opened, Storage(tmp_path))
    (record,) = caplog.records
    assert "does not exist" in record.getMessage() and "\n" not in record.getMessage()
    assert torch.equal(with_base(hits), by_base(hits)) and torch.equal(without(hits), by_itself(hits))  # type: ignore
    assert not torch.equal(with_base(hits), without(hits))  # type: ignore


def as_hit(text: str) -> Hit:
    memory = Memory(id="m-0", text=text, entropy=None, source="api", topic=None, created=0.0)
    return Hit(memory=memory, similarity=1.0, key=np.zeros(1, dtype=np.float32))
