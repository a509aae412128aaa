"""How many requests are in flight, counted where they pass."""

from starlette.types import ASGIApp, Receive, Scope, Send

INFERENCE = ("/chat", "/v1/")
"""What the paths of requests to a model begin with."""


class InFlight:
    """ASGI middleware; `app.state.in_flight` is the count of running chat and `/v1` requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(INFERENCE):
            await self._app(scope, receive, send)
            return
        state = scope["app"].state
        state.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            state.in_flight -= 1
