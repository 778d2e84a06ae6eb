"""Keys, health, draining and figures of an endpoint."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Receive, Scope, Send
from waiting import wait_until

from serve.metrics import Metrics
from serve.proxy import middlewares

BASE = {"model": "tiny", "prompt": "The", "max_tokens": 2}
LONG = BASE | {"max_tokens": 2000, "temperature": 0}


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_if_there_is_one(another, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n\nsecond-key\n")
    with another(api_key_file=str(tmp_path / "keys")) as endpoint:
        for key in ("first-key", "second-key"):
            assert endpoint.client(key).completions.create(**BASE).choices
        for key in ("first-ke", "First-key", "first-key2", "x"):
            with pytest.raises(openai.AuthenticationError, match="needs an API key"):
                endpoint.client(key).models.list()
        response = httpx.get(f"{endpoint.url}/v1/models")
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "authentication_error"
        for header in ("Basic first-key", "first-key", "Bearer"):
            assert httpx.get(f"{endpoint.url}/metrics", headers={"Authorization": header}).status_code == 401
        assert httpx.get(f"{endpoint.url}/healthz").status_code == 200


def test_a_key_may_come_from_the_environment(another, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HRS_API_KEY", "from-outside")
    with another() as endpoint:
        assert endpoint.client("from-outside").models.list().data
        with pytest.raises(openai.AuthenticationError):
            endpoint.client("other").models.list()


def test_the_page_of_the_api_works_offline_and_with_a_key(another, endpoint, tmp_path: Path) -> None:
    (tmp_path / "key-file").write_text("a-key")
    with another(api_key_file=str(tmp_path / "key-file")) as guarded:
        page = httpx.get(f"{guarded.url}/docs")
        assert page.status_code == 200
        loaded = re.findall(r'(?:src|href)="([^"]+)"|url: \'([^\']+)\'', page.text)
        names = {name for pair in loaded for name in pair if name and name != "data:,"}
        assert names == {"docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "openapi.json"}, "nothing of other sites"
        for name in names:
            assert httpx.get(f"{guarded.url}/{name}").status_code == 200
        document = httpx.get(f"{guarded.url}/openapi.json").json()
        assert document["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
        assert document["paths"]["/v1/models"]["get"]["security"] == [{"HTTPBearer": []}]
        assert httpx.get(f"{guarded.url}/docs/x").status_code == 401
    assert httpx.get(f"{endpoint.url}/docs/x").status_code == 404
    assert "securitySchemes" not in httpx.get(f"{endpoint.url}/openapi.json").json()["components"]


# ---- operation -------------------------------------------------------------------------------------------------------


def test_health_runs_the_model(another, opened) -> None:
    with another() as endpoint:
        assert httpx.get(f"{endpoint.url}/healthz").json()["status"] == "ok"
        weight = opened.model.input_embedding.weight
        kept = weight.detach().clone()
        try:
            weight.data.fill_(float("nan"))
            response = httpx.get(f"{endpoint.url}/healthz")
        finally:
            weight.data.copy_(kept)
        assert response.status_code == 503
        assert "not finite" in response.json()["error"]["message"]
        assert httpx.get(f"{endpoint.url}/healthz").status_code == 200


def test_while_it_stops_new_requests_are_refused_and_running_ones_finish(another) -> None:
    with another() as endpoint:
        client = endpoint.client()
        stream = client.completions.create(**LONG | {"max_tokens": 500}, stream=True)
        next(stream)
        endpoint.signal()
        wait_until(lambda: httpx.get(f"{endpoint.url}/healthz").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="stopping") as refused:
            client.completions.create(**BASE)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"]
        assert httpx.get(f"{endpoint.url}/healthz").json()["status"] == "stopping"
        assert list(stream)[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("how", ["a second signal", "the grace"])
def test_what_is_cut_off_is_told_so(another, how: str) -> None:
    with another(grace_seconds=0.2 if how == "the grace" else 3600, max_new_tokens=50_000) as endpoint:
        body = LONG | {"max_tokens": 50_000}
        stream = endpoint.client().completions.create(**body, stream=True)
        next(stream)
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{endpoint.url}/v1/completions", json=body, timeout=None))
        )
        thread.start()
        wait_until(lambda: endpoint.backend.n_running == 2, thread.is_alive)
        endpoint.signal()
        if how == "a second signal":
            endpoint.signal()
        with pytest.raises(openai.APIError, match="stopped before this reply was finished"):
            list(stream)
        thread.join()
        assert answers[0].status_code == 503
        assert "stopped before this reply was finished" in answers[0].json()["error"]["message"]
        endpoint.wait_until_idle()  # nobody goes on writing for clients that are gone


# ---- what Serve's proxy says of its own accord -----------------------------------------------------------------------


async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
    """What Serve's proxy does without a replica, or when one dies."""
    kind, status = {
        "/none": (b"text/plain", 404),
        "/unavailable": (b"text/plain", 503),
        "/refused": (b"application/json", 422),
        "/stream": (b"text/event-stream", 200),
        "/text": (b"text/plain", 200),
        "/-/healthz": (b"text/plain", 503),
    }.get(scope["path"], (b"", 0))
    if not status:
        return  # as Serve does when a replica dies before it answered
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": kind == b"text/event-stream"})


@pytest.fixture(scope="module")
def proxied() -> Iterator[str]:
    (around,) = middlewares()
    server = uvicorn.Server(uvicorn.Config(around.cls(proxy), port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, thread.is_alive)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)


@pytest.mark.parametrize(
    ("path", "status", "kind", "part"),
    [
        ("/none", 503, "service_unavailable_error", "starting or stopping"),
        ("/unavailable", 503, "service_unavailable_error", "starting or stopping"),
        ("/died", 500, "server_error", "ended before it had answered"),
    ],
)
def test_what_the_proxy_refuses_has_openais_shape(proxied: str, path: str, status: int, kind: str, part: str) -> None:
    response = httpx.get(proxied + path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == kind
    assert part in error["message"]
    assert ("retry-after" in response.headers) == (status == 503)


def test_a_stream_that_the_proxy_breaks_off_ends_with_an_error(proxied: str) -> None:
    first, last = httpx.get(f"{proxied}/stream").text.strip().split("\n\n")
    assert first == "data: 1"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_died"
    client = openai.OpenAI(base_url=proxied, api_key="any", max_retries=0)
    with pytest.raises(openai.APIError, match="ended before it had answered"):
        list(client.get("/stream", cast_to=object, stream=True, stream_cls=openai.Stream[object]))


@pytest.mark.parametrize(("path", "status"), [("/refused", 422), ("/text", 200), ("/-/healthz", 503)])
def test_what_is_not_the_proxys_refusal_passes_as_it_is(proxied: str, path: str, status: int) -> None:
    response = httpx.get(proxied + path)
    assert (response.status_code, response.content) == (status, b"data: 1\n\n")


# ---- figures ---------------------------------------------------------------------------------------------------------


def figures(url: str) -> dict[str, float]:
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
        for sample in family.samples
    }


def test_metrics_count_what_happened(another) -> None:
    with another() as endpoint:
        client = endpoint.client()
        made = client.completions.create(**BASE | {"max_tokens": 5}, n=2)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**BASE | {"model": "x"})
        seen = figures(endpoint.url)
        replica = ("replica", "0")
        assert seen[f"hrs_tokens_total{[('kind', 'completion'), replica]}"] == made.usage.completion_tokens
        assert seen[f"hrs_tokens_total{[('kind', 'prompt'), replica]}"] == 2 * made.usage.prompt_tokens
        assert seen[f"hrs_time_to_first_token_seconds_count{[replica]}"] == 2
        for status in ("200", "404"):
            assert seen[f"hrs_requests_total{[replica, ('route', '/v1/completions'), ('status', status)]}"] == 1
        assert seen[f"hrs_errors_total{[replica, ('status', '404')]}"] == 1
        assert seen[f"hrs_slots{[replica]}"] == 8
        assert seen[f"hrs_active_slots{[replica]}"] == seen[f"hrs_queue_length{[replica]}"] == 0


def test_one_replica_tells_the_figures_of_all(tmp_path: Path) -> None:
    one, two = Metrics("one"), Metrics("two")
    one.tokens.labels("prompt").inc(3)
    two.tokens.labels("prompt").inc(4)
    two.publish(tmp_path)
    page = one.page(tmp_path).decode()
    assert page.count("# TYPE hrs_tokens_total counter") == 1
    assert 'hrs_tokens_total{kind="prompt",replica="one"} 3.0' in page
    assert 'hrs_tokens_total{kind="prompt",replica="two"} 4.0' in page
    (tmp_path / "broken.json").write_text("{")
    assert one.page(tmp_path).decode() == page
