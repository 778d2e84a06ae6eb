"""A tiny model behind real HTTP: uvicorn in a thread, no Ray."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import torch
import uvicorn
from waiting import wait_until

from hrs.data import TokenStore
from hrs.export.opening import OpenedModel
from hrs.models import build_model
from hrs.presets import experiment
from serve.api import make_api
from serve.local import LocalBackend
from serve.settings import Settings

CONTEXT = 64


@pytest.fixture(scope="session")
def opened(small_corpus: Path, small_store: TokenStore) -> OpenedModel:
    """Random weights, a context of 64 tokens."""
    changes = {"data.tokenizer": "bpe:300", "data.corpus": f"jsonl:{small_corpus}", "model.max_seq_len": str(CONTEXT)}
    config = experiment("dense_baseline", "micro", overrides=changes)
    torch.manual_seed(0)
    return OpenedModel(build_model(config.model).eval(), config, small_store.tokenizer, True, small_store.fingerprint)


class Endpoint:
    """A backend and the address it is reached at."""

    def __init__(self, backend: LocalBackend, port: int) -> None:
        self.backend, self.url = backend, f"http://127.0.0.1:{port}"

    def client(self, key: str = "any", **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=None, **options)

    def wait_until_idle(self) -> None:
        """Return when nothing runs any more."""
        wait_until(lambda: not self.backend.n_running)


@contextlib.contextmanager
def serving(backend: LocalBackend) -> Iterator[Endpoint]:
    """A backend behind HTTP for as long as the block lasts, and closed after it."""
    server = uvicorn.Server(uvicorn.Config(make_api(backend), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, thread.is_alive)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Endpoint(backend, port)
    finally:
        server.should_exit = True
        backend.close()
        thread.join(timeout=10)


def running(opened: OpenedModel, folder: Path, **changes: object) -> contextlib.AbstractContextManager[Endpoint]:
    """An endpoint of a model."""
    settings = Settings(**{"model": "in memory", "name": "tiny", **changes})
    return serving(LocalBackend(opened, settings, folder))


@pytest.fixture(name="serving", scope="session")
def serving_fixture() -> Callable[[LocalBackend], contextlib.AbstractContextManager[Endpoint]]:
    """``with serving(backend) as endpoint:`` for a backend of one's own."""
    return serving


@pytest.fixture(name="running", scope="session")
def running_fixture() -> Callable[..., contextlib.AbstractContextManager[Endpoint]]:
    """``with running(opened, folder) as endpoint:`` for another model."""
    return running


@pytest.fixture(scope="session")
def endpoint(opened: OpenedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One that every test may share; it must leave nothing running."""
    with running(opened, tmp_path_factory.mktemp("memories")) as made:
        yield made


@pytest.fixture
def client(endpoint: Endpoint) -> openai.OpenAI:
    """OpenAI's own client, unmodified."""
    return endpoint.client()


@pytest.fixture
def another(opened: OpenedModel, tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[Endpoint]]:
    """``with another(max_queue=1) as endpoint:`` for other settings."""

    def start(**changes: object) -> contextlib.AbstractContextManager[Endpoint]:
        return running(opened, tmp_path, **changes)

    return start


@pytest.fixture(scope="session")
def small_endpoint(opened: OpenedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One with limits so low that no request takes long."""
    limits = {"max_new_tokens": 8, "default_chat_tokens": 4, "max_prompt_tokens": 256, "max_choices": 4}
    with running(opened, tmp_path_factory.mktemp("limited"), **limits) as made:
        yield made
