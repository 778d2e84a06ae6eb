"""A tiny model behind real HTTP: the front of ``hrs serve`` in a thread, no Ray."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import openai
import pytest
import torch
import uvloop
from waiting import wait_until

from hrs.data import TokenStore
from hrs.export.opening import OpenedModel
from hrs.models import build_model
from hrs.presets import experiment
from hrs.retrieval.engrams import model_fingerprint
from hrs.retrieval.topics.fit import TopicFit
from serve.access import Hosts, Keys
from serve.address import bind
from serve.answering import answer
from serve.api import make_api
from serve.bodies import Bodies
from serve.endpoint import Wishes, run_endpoint
from serve.front import Front
from serve.listener import Limits
from serve.local import LocalBackend
from serve.metrics import Metrics
from serve.settings import Settings, most_texts, read_api_keys
from serve.topic_state import TopicState

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

    def __init__(self, backend: LocalBackend, port: int, wishes: Wishes, loop: asyncio.AbstractEventLoop) -> None:
        self.backend, self.port, self.url = backend, port, f"http://127.0.0.1:{port}"
        self._wishes, self._loop = wishes, loop

    def signal(self) -> None:
        """What SIGTERM does to ``hrs serve``."""
        self._loop.call_soon_threadsafe(self._wishes.add)

    def client(self, key: str = "any", **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=None, **options)

    def wait_until_idle(self) -> None:
        """Return when nothing runs any more."""
        wait_until(lambda: not self.backend.n_running)


@contextlib.contextmanager
def serving(backend: LocalBackend, limits: Limits | None = None) -> Iterator[Endpoint]:
    """A backend behind the front and its server, as ``hrs serve`` runs them, for as long as the block lasts."""
    settings, wishes = backend.settings, Wishes()
    front = Front(
        partial(answer, make_api(backend)),
        keys=Keys(read_api_keys(settings)),
        hosts=Hosts("127.0.0.1", settings.allowed_hosts),
        bodies=Bodies(settings.max_body_bytes, settings.body_seconds),
        metrics=Metrics("front"),
        most_texts=most_texts(settings),
        origins=settings.allowed_origins,
    )
    bound, loop, up = bind("127.0.0.1", 0), uvloop.new_event_loop(), threading.Event()
    run = run_endpoint(
        front,
        bound,
        watch=asyncio.Event().wait,
        wishes=wishes,
        grace_seconds=settings.grace_seconds,
        announce=lambda _: up.set(),
        limits=limits,
    )
    port = bound.getsockname()[1]
    thread = threading.Thread(target=loop.run_until_complete, args=(run,), daemon=True)
    thread.start()
    wait_until(up.is_set, thread.is_alive)
    try:
        yield Endpoint(backend, port, wishes, loop)
    finally:
        for _ in range(3):
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(wishes.add)
        thread.join()
        loop.close()
        backend.close()


def sorting(opened: OpenedModel, settings: Settings) -> TopicState:
    """Topics of raw engrams: of random weights' texts the same ones only are near."""
    mean, fingerprint = (0.0,) * opened.model.d_model, model_fingerprint(opened.model)
    fit = TopicFit(model=fingerprint, block=None, mean=mean, join=0.5, merge=0.8, auc=0.9, low=0.8, high=1.0,
                   together=1.0, apart=1.0, n_fitted_documents=4, n_documents=4, piece_tokens=32)  # fmt: skip
    return TopicState(fit=fit, why_off=fit.why_off(settings.topic_least_auc))


def running(
    opened: OpenedModel, folder: Path, limits: Limits | None = None, **changes: object
) -> contextlib.AbstractContextManager[Endpoint]:
    """An endpoint of a model."""
    settings = Settings(**{"model": "in memory", "name": "tiny", **changes})
    return serving(LocalBackend(opened, settings, folder, topics=sorting(opened, settings)), limits)


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
