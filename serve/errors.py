"""Refusals in the shape of OpenAI's API, so that its clients raise the exceptions their users catch."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


class StorageError(HRSError):
    """What the server keeps cannot be read or written: the sentence is for who runs it, not for clients."""


@contextlib.contextmanager
def storing() -> Iterator[None]:
    """Make an error of a store, whose sentence names paths of the server, a :class:`StorageError`."""
    try:
        yield
    except (HRSError, OSError) as error:
        raise StorageError(str(error)) from error


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about any failure. Of one that nobody foresaw: nothing but that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StorageError):
        log.error("memories or topics cannot be used: %s", error)
        sentence = (
            "memories and topics cannot be read or written at the moment: whoever runs this endpoint can tell why"
        )
        return ApiError(503, sentence, code="storage_unavailable", retry_after=5)
    if isinstance(error, HRSError):
        return bad_request(str(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer this request", code="internal_error")


_NO_OBJECT = ("missing", "model_attributes_type", "model_type", "dict_type")
"""What pydantic calls a body that is empty, or JSON of another kind."""
_MOST_MISTAKES = 10
"""Mistakes of one body that are named: a client may send a thousand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mistake:
    """One thing that is wrong with a request."""

    field: tuple[int | str, ...]
    """Where, as far as the request goes."""
    alternative: tuple[int, str] | None
    """For a field of several types: how many parts lead to it, and which type this is about."""
    kind: str
    message: str

    @classmethod
    def of(cls, error: dict[str, Any], body: Any) -> "_Mistake":
        """Of pydantic's record. Its location mixes fields with names of types, which say nothing to a client."""
        where, alternative, value = error["loc"][1:], None, body
        field: list[int | str] = []
        for place, part in enumerate(where):
            named = place == 0 or isinstance(part, int) or (isinstance(value, dict) and part in value)
            if named or (error["type"] == "missing" and place == len(where) - 1):
                field.append(part)
                value = _inside(value, part)
            else:
                alternative = alternative or (place, part)
        message = str(error["msg"]).removeprefix("Value error, ")
        return cls(field=tuple(field), alternative=alternative, kind=error["type"], message=message)

    def path(self) -> str:
        return ".".join(map(str, self.field))

    def sentence(self) -> str:
        if self.kind == "extra_forbidden":
            return f"unknown parameter '{self.path()}'"
        if not self.field and self.kind in _NO_OBJECT:
            return "the body must be a JSON object: send one with 'Content-Type: application/json'"
        return f"{self.path()}: {self.message}" if self.field else self.message


def _inside(value: Any, part: int | str) -> Any:
    try:
        return value[part]
    except (IndexError, KeyError, TypeError):
        return None


def _likeliest(mistakes: Sequence[_Mistake]) -> list[_Mistake]:
    """The mistakes without those of types that were not meant.

    A field of several types fails by each of them. Meant was the one that was read farthest, then the one with the
    fewest values of another type, then the one with the fewest mistakes, then the first.
    """
    by_field: dict[tuple[int | str, ...], dict[str | None, list[_Mistake]]] = {}
    for mistake in mistakes:
        depth, name = mistake.alternative or (len(mistake.field), None)
        by_field.setdefault(mistake.field[:depth], {}).setdefault(name, []).append(mistake)

    def progress(failed: list[_Mistake]) -> tuple[int, int, int]:
        of_type = sum(mistake.kind.endswith("_type") for mistake in failed)
        return max(len(mistake.field) for mistake in failed), -of_type, -len(failed)

    return [mistake for alternatives in by_field.values() for mistake in max(alternatives.values(), key=progress)]


def _unreadable(cause: BaseException | None) -> ApiError:
    """Return what a client is told whose body the parser of JSON could not read, and did not call malformed."""
    if isinstance(cause, UnicodeDecodeError):
        return bad_request(f"the body is not UTF-8 at byte {cause.start}: encode it so")
    if isinstance(cause, RecursionError):
        return bad_request("the body is nested too deeply: send what the API's description at /docs shows")
    return bad_request("the body is not JSON that can be read: does it have a number of thousands of digits?")


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
        mistakes = _likeliest([_Mistake.of(each, error.body) for each in error.errors()])
        named, more = mistakes[:_MOST_MISTAKES], len(mistakes) - _MOST_MISTAKES
        listed = "; ".join(mistake.sentence() for mistake in named) + (f"; and {more} more" if more > 0 else "")
        code = "unknown_parameter" if named[0].kind == "extra_forbidden" else None
        return bad_request(listed, named[0].path() or None, code).response()

    @api.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:
            return _unreadable(error.__cause__).response()
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
