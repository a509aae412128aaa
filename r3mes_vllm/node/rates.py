"""How many requests and tokens a minute each key and each address may have."""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from r3mes_vllm.engine.watching import Generation, Watch
from r3mes_vllm.node.guard import CALLER, Caller
from r3mes_vllm.node.load import INFERENCE
from r3mes_vllm.node.refusals import refusal
from r3mes_vllm.rates import REQUESTS, TOKENS, Allowance, Meter, allowances
from r3mes_vllm.tables import RateSettings

_AT_ONCE = 16
"""Tokens that are charged together."""

spend: ContextVar[Callable[[int], None] | None] = ContextVar("spend", default=None)
"""Charges tokens to who asked the request at hand, if anybody counts them."""


class Rates:
    """ASGI middleware: 429 with `Retry-After` for who has used up what a minute allows."""

    def __init__(self, app: ASGIApp, settings: RateSettings) -> None:
        self._app = app
        self._settings = settings
        self._meter = Meter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = scope.get(CALLER) or Caller(None)
        asks = scope["type"] == "http" and scope["path"].startswith(INFERENCE)
        if not asks or scope["method"] != "POST" or caller.trusted:
            await self._app(scope, receive, send)
            return
        address = scope["client"][0] if scope.get("client") else ""
        most = self._settings
        requests = allowances(REQUESTS, caller.key, most.requests, address, most.address_requests)
        tokens = allowances(TOKENS, caller.key, most.tokens, address, most.address_tokens)
        if over := self._meter.over([*requests, *tokens]):
            await self._refusal(over, scope["path"])(scope, receive, send)
            return
        self._meter.take(requests, 1)
        spend.set(partial(self._meter.take, tokens) if tokens else None)
        try:
            await self._app(scope, receive, send)
        finally:
            spend.set(None)

    def _refusal(self, over: Allowance, path: str) -> Response:
        response = refusal(path, 429, "rate_limit_exceeded", f"over {over}")
        response.headers["retry-after"] = str(self._meter.retry_after(over))
        response.headers["connection"] = "close"  # its body was not read
        return response


def charge(generation: Generation) -> Watch:
    """An observer of the engine: the caller pays for the prompt and each token, also those that
    it did not wait for."""
    return _Bill(generation, spend.get())


class _Bill:
    def __init__(self, generation: Generation, take: Callable[[int], None] | None) -> None:
        self._generation = generation
        self._take = take
        self._paid = 0

    def generated(self, tokens: int) -> None:
        if self._due >= _AT_ONCE:
            self._pay()

    def ended(self) -> None:
        self._pay()

    @property
    def _due(self) -> int:
        return self._generation.prompt_tokens + self._generation.tokens - self._paid

    def _pay(self) -> None:
        if self._take and (due := self._due) > 0:
            self._paid += due
            self._take(due)
