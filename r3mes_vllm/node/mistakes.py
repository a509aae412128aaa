"""vLLM's errors as OpenAI tells them: a client's mistake is a 4xx that names the field.

By itself vLLM answers 500 where its checks stumble over a value of another type, 501 for what it
does not have, and 200 to a stream of which the first event says that it was a 400.
"""

import json
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from r3mes_vllm.engine.culprit import READ_BY, Told, culprit, named, told
from r3mes_vllm.node import bodies
from r3mes_vllm.node.endings import ERROR
from r3mes_vllm.node.refusals import openai_refusal

_EMBEDDINGS = "/v1/embeddings"
_ROUTES = {*READ_BY, _EMBEDDINGS}
_PREAMBLE = (b"event: response.created", b"event: response.in_progress")
"""What `/v1/responses` sends before the engine has seen the request."""
_FORMS = ("structured_outputs", "response_format", "text", "tools")
"""What becomes one and the same to the engine."""
_ALIASES = {"response_id": "previous_response_id"}
_LONGEST_EXPLAINED = 256 << 10
"""Bytes of a body that is looked at field by field."""


class Mistakes:
    """ASGI middleware. Other answers pass as they come, streams from their first token on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in _ROUTES:
            await self._app(scope, receive, send)
            return
        body = await bodies.read(receive)
        if body is None:
            return  # the client is gone
        answer = _Answer(send)
        try:
            await self._app(scope, bodies.Replay(body, receive), answer)
        except Exception as error:
            answer.failed = None if answer.begun else told(error)
            if answer.failed is None:
                raise
        if answer.failed:
            await _refusal(scope["path"], body, *answer.failed)(scope, receive, send)
        else:
            await answer.begin()


class _Answer:
    """`send` for vLLM: holds back what may be an error until that is known."""

    def __init__(self, send: Send) -> None:
        self.begun = False
        self.failed: Told | None = None
        self._send = send
        self._waiting: list[Message] = []
        self._status = 0
        self._events = False

    async def __call__(self, message: Message) -> None:
        if self.begun:
            await self._send(message)
        elif not self.failed:  # what comes after the error is of no interest
            self._waiting.append(message)
            if self._is_decided(message) and not self.failed:
                await self.begin()

    async def begin(self) -> None:
        self.begun = True
        while self._waiting:
            await self._send(self._waiting.pop(0))

    def _is_decided(self, message: Message) -> bool:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self._events = kind.startswith("text/event-stream")
            return self._status < 400 and not self._events
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._status >= 400:
            if not more:
                whole = b"".join(it.get("body", b"") for it in self._waiting[1:])
                self.failed = _parsed(whole, self._status)
            return not more
        if body.startswith(ERROR):
            self.failed = _parsed(body.removeprefix(b"data: ").partition(b"\n")[0], 500)
        return not (more and body.startswith(_PREAMBLE))


def _parsed(body: bytes, status: int) -> Told:
    try:
        error = json.loads(body)["error"]
        param = str(error.get("param") or "").removeprefix("body").removeprefix(".")
        return int(error["code"]), {"message": error["message"], "param": param or None}
    except (ValueError, LookupError, TypeError):  # of the framework
        return status, {"message": HTTPStatus(status).phrase}


def _refusal(path: str, body: bytes, status: int, error: dict[str, Any]) -> Response:
    message, field = str(error.get("message") or "the engine failed"), error.get("param")
    if status == HTTPStatus.NOT_IMPLEMENTED:
        status = HTTPStatus.BAD_REQUEST
    if status == HTTPStatus.NOT_FOUND and path == _EMBEDDINGS:
        message = "the model served here makes no embeddings"
    if status == HTTPStatus.BAD_REQUEST and path in READ_BY:
        fields = json.loads(body)
        if len(body) <= _LONGEST_EXPLAINED and (found := culprit(path, fields)):
            field, message = found
        field = field or named(path, message)
        if field in _FORMS:
            field = next((it for it in _FORMS if it in fields), None)
    code = HTTPStatus(status).name.lower()
    return openai_refusal(status, code, message, field=_ALIASES.get(field or "", field))
