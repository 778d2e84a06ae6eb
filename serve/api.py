"""The HTTP application over a backend."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Security
from fastapi import Path as InPath
from fastapi.security import HTTPBearer
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from serve.access import Keys
from serve.backend import Backend
from serve.checks import require_model
from serve.completions import completion_routes
from serve.docs_page import docs_routes
from serve.errors import ApiError, install_handlers
from serve.memory_routes import memory_routes
from serve.middleware import Gatekeeper
from serve.origins import Origins
from serve.settings import read_api_keys

PLAYGROUND = Path(__file__).with_name("playground.html")

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": what, "content": {"application/json": {"schema": _ERROR}}}
    for status, what in {
        400: "The request is malformed, or asks for what this server does not have",
        401: "The API key is missing or wrong",
        403: "This endpoint is not asked under the name in Host",
        404: "There is no such model, memory or topic",
        408: "The body did not come in time",
        413: "The body is too large",
        415: "The body is not declared as JSON, or is compressed",
        422: "A limit of this endpoint is exceeded",
        429: "The queue is full; see Retry-After",
        500: "The server failed, or the process of the model ended before it answered",
        503: "The endpoint is starting or stopping, or its model cannot be run",
    }.items()
}


def make_api(backend: Backend) -> FastAPI:
    """The application: OpenAI's routes, ours, health and metrics.

    Raises:
        HRSError: if the settings' key file cannot be read.
    """
    keys = read_api_keys(backend.settings)
    # Only described here, so that the page at /docs asks for the key; what checks it is the middleware.
    key = [Security(HTTPBearer(auto_error=False))] if keys else []
    api = FastAPI(title="hrs", version="1", responses=_REFUSALS, docs_url=None, redoc_url=None, dependencies=key)
    api.add_middleware(Gatekeeper, backend=backend, keys=Keys(keys))
    api.add_middleware(Origins, origins=backend.settings.allowed_origins)  # outside: its question comes without a key
    install_handlers(api)
    api.include_router(completion_routes(backend))
    api.include_router(memory_routes(backend))
    api.include_router(docs_routes())

    @api.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        """The one model that is served here."""
        return {"object": "list", "data": [_model(backend)]}

    @api.get("/v1/models/{name:path}", tags=["models"])
    async def model(name: str = InPath(max_length=256)) -> dict[str, Any]:
        """The same by its name."""
        require_model(backend, name)
        return _model(backend)

    @api.get("/healthz", tags=["operation"])
    async def healthz() -> JSONResponse:
        """Runs the model on a token."""
        return JSONResponse({"status": "ok", **await backend.check()})

    @api.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
    def metrics() -> Response:
        """Prometheus' text format."""
        return Response(backend.prometheus(), media_type="text/plain; version=0.0.4")

    @api.get("/", include_in_schema=False)
    def playground() -> HTMLResponse:
        if not PLAYGROUND.is_file():
            raise ApiError(404, "there is no page here: the API's description is at /docs")
        return HTMLResponse(PLAYGROUND.read_text(encoding="utf-8"))

    return api


def _model(backend: Backend) -> dict[str, Any]:
    card = backend.card
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "hrs",
        "hrs": {
            "preset": card.preset,
            "fingerprint": card.fingerprint,
            "causal": card.causal,
            "parameters": card.n_parameters,
            "context": card.context,
            "width": card.width,
            "vocabulary": card.vocab_size,
            "threshold_bits": card.threshold_bits,
            "entropy_quantiles": list(card.entropy_quantiles) or None,
        },
    }
