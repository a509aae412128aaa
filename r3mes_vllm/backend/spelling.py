"""A request as the routes have it."""

from starlette.types import ASGIApp, Receive, Scope, Send


class Spelled:
    """ASGI middleware: HEAD is a GET whose answer's body the server leaves out, and `//chat` is
    what a base URL with a trailing slash makes of `/chat`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            path = "/" + scope["path"].lstrip("/")
            scope = {**scope, "method": method, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)
