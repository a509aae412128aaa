"""A request as the routes have it."""

from starlette.types import ASGIApp, Receive, Scope, Send


class Spelled:
    """ASGI middleware: HEAD is a GET whose answer's body the server leaves out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)
