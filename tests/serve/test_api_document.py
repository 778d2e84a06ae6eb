"""The OpenAPI document, read by schemathesis: whatever it allows or forbids, no request makes the server fail."""

import inspect
from collections.abc import Callable

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openai.resources import completions, embeddings
from openai.resources.chat import completions as chat
from properties import examples
from schemathesis.checks import not_a_server_error
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from serve.schemas import ChatRequest, CompletionRequest, EmbeddingRequest

OPERATIONS = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/embeddings", "POST"),
    ("/v1/memories", "POST"),
    ("/v1/memories", "GET"),
    ("/v1/memories/search", "POST"),
    ("/v1/memories/{id}", "GET"),
    ("/v1/memories/{id}", "DELETE"),
    ("/v1/topics", "GET"),
    ("/v1/topics/{id}", "POST"),
    ("/v1/topics/{id}", "DELETE"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/healthz", "GET"),
    ("/metrics", "GET"),
]
TAKE_NOTHING = {"/v1/topics", "/v1/models", "/healthz", "/metrics"}
"""Nothing can be wrong about a request for these."""


@pytest.fixture(scope="module")
def document(small_endpoint) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{small_endpoint.url}/openapi.json")


def test_every_operation_is_tried_below(document) -> None:
    found = {
        (operation.path, operation.method.upper())
        for each in document.get_all_operations()
        for operation in [each.ok()]
    }
    assert found == set(OPERATIONS)


@pytest.mark.hypothesis
@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        pytest.param(path, method, mode, id=f"{method} {path} {mode.value}")
        for path, method in OPERATIONS
        for mode in GenerationMode
        if mode.is_positive or path not in TAKE_NOTHING
    ],
)
def test_no_request_makes_the_server_fail(document, path: str, method: str, mode: GenerationMode) -> None:
    operation = document[path][method]
    checks = [not_a_server_error, status_code_conformance, content_type_conformance]

    @settings(examples(8), suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def try_it(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and mode.is_positive and "model" in case.body:
            case.body["model"] = "tiny"  # any other name is not found, and nothing behind that would be tried
        case.call_and_validate(checks=checks, timeout=300)

    try_it()


@pytest.mark.parametrize("model", [CompletionRequest, ChatRequest, EmbeddingRequest])
def test_every_parameter_of_openais_client_is_known(model: type) -> None:
    """What the client can send is either supported or refused by its name, and never as a misspelling."""
    methods: dict[type, Callable] = {
        CompletionRequest: completions.Completions.create,
        ChatRequest: chat.Completions.create,
        EmbeddingRequest: embeddings.Embeddings.create,
    }
    transport = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    sent = set(inspect.signature(methods[model]).parameters) - transport
    assert sent - set(model.model_fields) - set(model.neutral) == set()
