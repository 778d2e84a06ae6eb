"""What belongs to one API key is neither read nor changed by another, and a server's troubles stay its own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from hrs.retrieval.store import EngramStore
from serve.access import Keys
from serve.reading import read
from serve.schemas import MemoryRequest
from serve.settings import Settings
from serve.spaces import Spaces

TEXTS = ["The wave and the tide", "The cloud and the star", "The wheat and the barn"]
ASKED = {"model": "tiny", "prompt": "The ship", "max_tokens": 30, "temperature": 0}
LOOKS_UP = {"retrieval": {"mode": "observe", "threshold_bits": 0, "min_similarity": -1, "k": 5}}


class User:
    """A client with a key of its own."""

    def __init__(self, url: str, key: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/v1", headers={"Authorization": f"Bearer {key}"})

    def remember(self, *texts: str, **more: str) -> list[str]:
        response = self.http.post("/memories", json={"input": list(texts), **more})
        assert response.status_code == 200, response.text
        return [memory["id"] for memory in response.json()["data"]]

    def listed(self, **page: int) -> tuple[list[str], int]:
        answer = self.http.get("/memories", params=page).json()
        return [memory["text"] for memory in answer["data"]], answer["total"]

    def found(self) -> set[str]:
        answer = self.http.post("/memories/search", json={"query": TEXTS[0], "k": 50}).json()
        return {memory["text"] for memory in answer["data"]}

    def looked_up(self) -> set[str]:
        """Texts that a generation finds."""
        (choice,) = self.http.post("/completions", json=ASKED | {"hrs": LOOKS_UP}).json()["choices"]
        return {hit["text"] for event in choice["hrs"]["retrieval"] for hit in event["hits"]}

    def context_tokens(self) -> int:
        (choice,) = self.http.post("/completions", json=ASKED | {"hrs": {"topics": True}}).json()["choices"]
        return choice["hrs"]["topic"]["context_tokens"]


@pytest.fixture
def keys(tmp_path: Path) -> str:
    (tmp_path / "key-file").write_text("one-key\ntwo-key\n")
    return str(tmp_path / "key-file")


@pytest.fixture
def users(another: Callable, keys: str) -> Iterator[tuple[User, User]]:
    with another(api_key_file=keys) as endpoint:
        yield User(endpoint.url, "one-key"), User(endpoint.url, "two-key")


def test_memories_belong_to_a_key(users: tuple[User, User]) -> None:
    one, two = users
    ids = one.remember(*TEXTS)
    assert one.listed() == (TEXTS, 3)
    assert two.listed() == ([], 0)
    assert (one.found(), two.found()) == (set(TEXTS), set())
    assert (one.looked_up(), two.looked_up()) == (set(TEXTS), set())
    for id in ids:
        assert two.http.get(f"/memories/{id}").status_code == 404
        assert two.http.delete(f"/memories/{id}").status_code == 404
    assert one.http.delete(f"/memories/{ids[0]}").status_code == 200
    assert one.listed() == (TEXTS[1:], 2)


def test_topics_belong_to_a_key(users: tuple[User, User]) -> None:
    one, two = users
    assert one.context_tokens() == 0
    assert one.context_tokens() > 0, "its earlier prompt"
    assert two.http.get("/topics").json()["data"] == []
    (topic,) = one.http.get("/topics").json()["data"]
    assert two.http.post(f"/topics/{topic['id']}", json={"name": "mine"}).status_code == 404
    assert two.context_tokens() == 0


def test_memories_of_the_endpoint_are_read_by_all_keys_and_changed_by_none(
    another: Callable, keys: str, opened, tmp_path: Path
) -> None:
    folder = tmp_path / "common"
    settings = Settings(model="m", memories=str(folder))
    filled = Spaces(opened.model, opened.tokenizer, tmp_path / "unused", settings).of("")
    ids = [opened.tokenizer.encode(text).ids for text in TEXTS]
    common = filled.write(TEXTS, read(opened.model, ids, None), MemoryRequest(input=TEXTS))
    with another(api_key_file=keys, memories=str(folder)) as endpoint:
        one, two = User(endpoint.url, "one-key"), User(endpoint.url, "two-key")
        (own,) = one.remember("The sea")
        assert one.listed() == ([*TEXTS, "The sea"], 4)
        assert [one.listed(limit=2, offset=offset)[0] for offset in (0, 2, 3, 4)] == [
            TEXTS[:2], [TEXTS[2], "The sea"], ["The sea"], []
        ]  # fmt: skip
        assert (one.found(), two.found()) == ({*TEXTS, "The sea"}, set(TEXTS))
        assert (one.looked_up(), two.looked_up()) == ({*TEXTS, "The sea"}, set(TEXTS))
        nearest = one.http.post("/memories/search", json={"query": "The sea", "k": 1}).json()["data"]
        assert [memory["id"] for memory in nearest] == [own]
        for user in (one, two):
            assert user.http.get(f"/memories/{common[0]['id']}").json()["text"] == TEXTS[0]
            refused = user.http.delete(f"/memories/{common[0]['id']}")
            assert (refused.status_code, "belongs to all users" in refused.text) == (403, True)
        assert one.http.delete(f"/memories/{own}").status_code == 200
        assert one.listed() == two.listed() == (TEXTS, 3)


def test_names_of_spaces_tell_nothing_of_keys_and_stay_the_same() -> None:
    names = Keys(["one-key", "two-key"]).spaces()
    assert len(set(names)) == 2 and names == Keys(["one-key", "two-key"]).spaces()
    assert not any("key" in name for name in names)
    assert Keys([]).spaces() == [""]


# ---- a server's own troubles -----------------------------------------------------------------------------------------


def test_refusals_name_no_path_of_the_server(another: Callable, tmp_path: Path) -> None:
    with another() as endpoint:
        user = User(endpoint.url, "any")
        (id,) = user.remember(TEXTS[0], topic="auto")
        for damaged in (*(tmp_path / "store").glob("*.*"), tmp_path / "topics.json"):
            damaged.write_bytes(b"{")
        answers = [
            user.http.get("/memories"),
            user.http.get(f"/memories/{id}"),
            user.http.delete(f"/memories/{id}"),
            user.http.post("/memories", json={"input": "The sea"}),
            user.http.post("/memories/search", json={"query": "The sea"}),
            user.http.get("/topics"),
            user.http.post(f"/topics/{id}", json={"name": "x"}),
            user.http.post("/completions", json=ASKED | {"hrs": LOOKS_UP}),
            user.http.post("/completions", json=ASKED | {"hrs": {"topics": True}}),
        ]
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable"), answer.text
            assert answer.headers["retry-after"]
            assert not any(part in answer.text for part in (str(tmp_path), "manifest", ".json", "store"))
        assert user.http.post("/completions", json=ASKED).status_code == 200, "what needs no memories goes on"


def test_a_store_of_another_model_is_told_before_it_is_used(opened, tmp_path: Path) -> None:
    EngramStore.open(tmp_path / "store", fingerprint="another", width=opened.model.d_model)
    spaces = Spaces(opened.model, opened.tokenizer, tmp_path, Settings(model="m"))
    with pytest.raises(Exception, match=f"engram store {tmp_path / 'store'} holds keys of fingerprint another"):
        spaces.of("")
