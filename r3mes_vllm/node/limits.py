"""How much a request may send, how long it may take to, and how many are at work at a time."""

import asyncio
from contextlib import nullcontext

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from r3mes_vllm import content_encoding
from r3mes_vllm.bounded_http import swallow
from r3mes_vllm.node import bodies
from r3mes_vllm.node.load import INFERENCE, Load
from r3mes_vllm.node.refusals import refusal
from r3mes_vllm.settings import Settings


class Limits:
    """ASGI middleware: 413 for a body that is too large, 408 for one that takes too long to come,
    415 for one that is packed, 503 when as many requests are at work as may be, or the node is
    ending."""

    def __init__(self, app: ASGIApp, settings: Settings, load: Load) -> None:
        self._app = app
        self._bytes = settings.body_bytes
        self._seconds = settings.body_timeout
        self._load = load

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        counted = scope["path"].startswith(INFERENCE)
        if counted and (refused := self._refused(scope["path"])):
            await refused(scope, receive, send)
            return
        with self._load.counted() if counted else nullcontext():
            await self._limited(scope, receive, send)

    def _refused(self, path: str) -> Response | None:
        load = self._load
        if load.draining:
            code, message = "draining", "this node is ending; ask another"
        elif load.running >= load.most:
            code, message = "busy", f"{load.running} requests are at work; try again soon"
        else:
            return None
        response = refusal(path, 503, code, message)
        response.headers["retry-after"] = "1"
        response.headers["connection"] = "close"  # its body was not read
        return response

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        try:
            if int(headers.get("content-length") or 0) > self._bytes:
                raise OverflowError
            async with asyncio.timeout(self._seconds):
                body = await bodies.read(receive, self._bytes)
        except OverflowError:
            if "expect" not in headers:  # such a client waits to be told whether to send
                await swallow(receive)
            response = refusal(
                path, 413, "content_too_large", f"the body is over {self._bytes} bytes"
            )
        except TimeoutError:
            response = refusal(
                path, 408, "too_slow", f"the body took over {self._seconds:g} s to come"
            )
        else:
            if body is None:
                return
            app: ASGIApp = self._app
            if problem := content_encoding.objection(headers):
                app = refusal(path, 415, content_encoding.CODE, problem)
                app.headers.update(content_encoding.ACCEPTED)
            await app(scope, bodies.Replay(body, receive), send)
            return
        response.headers["connection"] = "close"
        await response(scope, receive, send)
