"""Which web pages may call the backend from a browser: none, unless their origins are named."""

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

_MAY_SEND = ("Authorization", "Content-Type", "X-API-Key", "X-Adapter", "X-Wallet-Address")
_MAY_READ = (
    *("X-R3MES-Adapter", "X-R3MES-CID", "X-R3MES-Node"),
    *("X-R3MES-Fallback", "X-R3MES-Fallback-Model", "X-Request-Id", "Retry-After"),
)


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Cookies are not sent along: a key comes in a header, which the page has to know."""
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=_MAY_SEND,
            expose_headers=_MAY_READ,
        )
