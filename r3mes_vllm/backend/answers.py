"""How an error leaves the backend: OpenAI's shape under `/v1`, the project's everywhere else."""

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from r3mes_vllm import content_encoding
from r3mes_vllm.backend.refusals import (
    BadInput,
    DatabaseDown,
    Encoded,
    NoRoom,
    TooLarge,
    TooSlow,
    Unauthorized,
)
from r3mes_vllm.errors import R3mesError, UnknownAdapter
from r3mes_vllm.validation import words

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left before its answer; nobody reads it but the metrics."""


def install(app: FastAPI) -> None:
    """Make `app` answer every error in the contract's shape."""
    app.add_exception_handler(R3mesError, _refused)
    app.add_exception_handler(RequestValidationError, _bad_parameter)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(SQLAlchemyError, _database_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _unexpected)


def answer(request: Request, error: R3mesError) -> JSONResponse:
    status, headers = error.status, _headers(error)
    if not is_openai(request):
        body: dict[str, dict[str, object]] = {"error": dict(error.body()["error"])}
        if isinstance(error, BadInput) and error.field:
            body["error"]["field"] = error.field
        return JSONResponse(body, status, headers)
    if isinstance(error, BadInput) and status == HTTPStatus.UNPROCESSABLE_ENTITY:
        status = HTTPStatus.BAD_REQUEST  # what api.openai.com answers to a bad parameter
    code, param = error.code, error.field if isinstance(error, BadInput) else None
    if isinstance(error, UnknownAdapter):
        code, param = "model_not_found", "model"
    message = f"{error.message}. {error.hint}" if error.hint else error.message
    shape = {"message": message, "type": _openai_type(status), "param": param, "code": code}
    return JSONResponse({"error": shape}, status, headers)


def is_openai(request: Request) -> bool:
    path: str = request.scope["path"]
    return path == "/v1" or path.startswith("/v1/")


def _openai_type(status: int) -> str:
    if status == HTTPStatus.UNAUTHORIZED:
        return "authentication_error"
    return "invalid_request_error" if status < 500 else "server_error"


def _headers(error: R3mesError) -> dict[str, str]:
    retry_after = getattr(error, "retry_after", None)
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    if isinstance(error, Encoded):
        headers |= content_encoding.ACCEPTED
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = error.scheme
    if isinstance(error, TooLarge | TooSlow | NoRoom):
        headers["Connection"] = "close"  # the rest of the body is not read
    return headers


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, R3mesError)  # noqa: S101
    return answer(request, error)


async def _bad_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    first = error.errors()[0]
    field = str(first["loc"][-1])
    return answer(request, BadInput(f"{field}: {words(first)}", field=field))


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the routing itself."""
    assert isinstance(error, HTTPException)  # noqa: S101
    path = request.scope["path"][:200]
    phrase = HTTPStatus(error.status_code).phrase
    headers: Mapping[str, str] = error.headers or {}
    code = phrase.lower().replace(" ", "_")
    message = f"{request.method[:20]} {path}: {phrase}"
    if is_openai(request):
        kind = _openai_type(error.status_code)
        shape: dict[str, object] = {"message": message, "type": kind, "param": None, "code": code}
    else:
        shape = {"code": code, "message": message, "hint": ""}
    return JSONResponse({"error": shape}, error.status_code, dict(headers))


async def _database_error(request: Request, error: Exception) -> Response:
    down = DatabaseDown(
        f"the registry's database failed: {type(error).__name__}", hint="try again shortly"
    )
    return answer(request, down)


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _unexpected(request: Request, error: Exception) -> Response:
    return answer(request, R3mesError("internal error", hint="the backend's log says more"))
