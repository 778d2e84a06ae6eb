"""Which pages of other sites a browser may let ask the endpoint (CORS)."""

import re

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.errors import ApiError

_ORIGIN = re.compile(r"https?://[a-z0-9.\-_]+(:\d{1,5})?|https?://\[[0-9a-f:.]+\](:\d{1,5})?|null|\*")


def require_origins(origins: list[str]) -> list[str]:
    """Return origins as browsers send them, in lower case.

    Raises:
        ValueError: if one is none.
    """
    for origin in origins:
        if not _ORIGIN.fullmatch(origin.lower()):
            raise ValueError(f"'{origin}' is no origin: give http://HOST, https://HOST:PORT without a path, or *")
    return [origin.lower() for origin in origins]


class Origins(CORSMiddleware):
    """Answers the question that browsers ask before a page of another site sends a request, which carries no key, and
    marks replies for the pages that may read them.

    Args:
        origins: of the pages; ``*`` for all.
    """

    def __init__(self, app: ASGIApp, origins: list[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("DELETE", "GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After", "WWW-Authenticate"),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the answer to a browser's question: yes, or 403 with the reason."""
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        origin, method = (request_headers[name][:100] for name in ("origin", "access-control-request-method"))
        if self.is_allowed_origin(request_headers["origin"]):
            sentence = (
                f"pages of '{origin}' may send GET, HEAD, POST and DELETE here, not {method} or from another network"
            )
        else:
            sentence = f"pages of '{origin}' may not ask this endpoint: start it with --allow-origin {origin}"
        return ApiError(403, sentence, code="origin_not_allowed").response()

    async def simple_response(self, scope: Scope, receive: Receive, send: Send, request_headers: Headers) -> None:
        """Answer a request; without any origin to allow nothing of the reply changes."""
        if self.allow_origins:
            await super().simple_response(scope, receive, send, request_headers)
        else:
            await self.app(scope, receive, send)
