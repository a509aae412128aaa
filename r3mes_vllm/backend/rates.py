"""How many requests a minute each client key and each address may send to a model."""

from hashlib import sha256

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from r3mes_vllm.backend.answers import answer
from r3mes_vllm.backend.refusals import RateLimited
from r3mes_vllm.keys import Keys, presented
from r3mes_vllm.rates import REQUESTS, Meter, allowances
from r3mes_vllm.tables import RateSettings

_INFERENCE = ("/chat", "/v1/")


class Rates:
    """ASGI middleware: 429 with `Retry-After` for who has used up what a minute allows. Each
    router counts for itself."""

    def __init__(self, app: ASGIApp, settings: RateSettings, keys: Keys) -> None:
        self._app = app
        self._most = settings
        self._keys = keys
        self._meter = Meter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] == "http" and scope["path"].startswith(_INFERENCE)
        if not asks or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        given = presented(Headers(scope=scope))
        key = sha256(given).hexdigest()[:16] if self._keys.accept(given) else None
        address = scope["client"][0] if scope.get("client") else ""
        most = self._most
        of = allowances(REQUESTS, key, most.requests, address, most.address_requests)
        if over := self._meter.over(of):
            refusal = RateLimited(f"over {over}", retry_after=self._meter.retry_after(over))
            response = answer(Request(scope), refusal)
            response.headers["connection"] = "close"  # the request's body was not read
            await response(scope, receive, send)
            return
        self._meter.take(of, 1)
        await self._app(scope, receive, send)
