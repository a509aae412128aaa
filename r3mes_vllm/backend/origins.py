"""Which web pages may call the backend from a browser: its own, and those of named origins."""

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from r3mes_vllm.backend.answers import answer
from r3mes_vllm.cross_site import Pages, names
from r3mes_vllm.keys import Keys, presented
from r3mes_vllm.settings import Settings

_MAY_READ = (
    *("X-R3MES-Adapter", "X-R3MES-CID", "X-R3MES-Node"),
    *("X-R3MES-Fallback", "X-R3MES-Fallback-Model", "X-Request-Id", "Retry-After"),
)


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """With whatever headers a page sends, of which OpenAI's client has many. Cookies are not sent
    along: a key comes in a header, which the page has to know."""
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=_MAY_READ,
        )


class KeepOut:
    """ASGI middleware: 403 for what another site's page sends without one of the `keys`."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Sequence[Keys]) -> None:
        self._app = app
        self._keys = keys
        self._pages = Pages(settings.cors_origins, names(settings, settings.backend_host))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._pages.objection(scope) if scope["type"] == "http" else None
        if error is None or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        response = answer(Request(scope), error)
        response.headers["connection"] = "close"  # the request's body was not read
        await response(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        given = presented(Headers(scope=scope))
        return any(it.accept(given) for it in self._keys)
