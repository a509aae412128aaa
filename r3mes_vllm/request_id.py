"""One id for a request, from the client through the backend and the node to vLLM and back."""

import re
import uuid
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from r3mes_vllm.answer_headers import adding

HEADER = "x-request-id"

_TAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""It stands in logs, and in the names that vLLM gives to requests."""


class RequestIds:
    """ASGI middleware: the application finds a tame id in the request's `X-Request-Id`, the
    client's own if it sent one, and every answer carries it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(scope=(scope := dict(scope)))  # which gets a list of its own
        id_ = headers[HEADER] = tame(headers.getlist(HEADER))
        await self._app(scope, receive, adding({HEADER: id_}, send))


def tame(given: Sequence[str]) -> str:
    """The id that a client gave, if that is one that may be passed on; else a new one."""
    return given[0] if len(given) == 1 and _TAME.fullmatch(given[0]) else uuid.uuid4().hex


def surround(app: Starlette, layer: Callable[[ASGIApp], ASGIApp]) -> None:
    """Put `layer` around all of `app`, also around what answers when everything else failed."""
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: layer(build())  # type: ignore[method-assign]
