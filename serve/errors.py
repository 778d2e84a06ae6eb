"""Refusals in the shape of OpenAI's API, so that its clients raise the exceptions their users catch."""

import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hrs.errors import HRSError

log = logging.getLogger("serve")


class ApiError(Exception):
    """A request that is refused, or a reply that cannot go on."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = (
            status,
            _printable(message),
            code,
            param and _printable(param),
        )
        self.retry_after = retry_after

    def body(self) -> dict[str, object]:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(max(math.ceil(self.retry_after), 1))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers=headers)


def _printable(text: str) -> str:
    """On one line, and valid UTF-8 also where it quotes what is not."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


_KINDS = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about any failure. Of one that nobody foresaw: nothing but that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HRSError):
        return bad_request(str(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer this request", code="internal_error")


def install_handlers(api: FastAPI) -> None:
    """Make every refusal of ``api``, also those of the framework, take this shape."""

    @api.exception_handler(ApiError)
    @api.exception_handler(HRSError)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return bad_request(
                f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
            ).response()
        # An alternative's name says nothing to a client, and neither does where it was looked for.
        where = ".".join(str(part) for part in first["loc"][1:] if not str(part).startswith(("function-", "tagged-")))
        message = str(first["msg"]).removeprefix("Value error, ")
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else None
        if code:
            message = f"unknown parameter '{where}'"
        return bad_request(f"{where}: {message}" if where and not code else message, where or None, code).response()

    @api.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> JSONResponse:
        sentence = {
            404: f"there is no {request.method} {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }.get(error.status_code, str(error.detail))
        response = ApiError(error.status_code, sentence).response()
        response.headers.update(error.headers or {})
        return response

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()
