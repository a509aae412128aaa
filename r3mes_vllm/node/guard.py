"""Who may call what: every route is closed unless it stands in the table below.

vLLM's `--api-key` guards some prefixes and leaves `/invocations`, `POST /adapters`, `/tokenize`,
`/metrics` and `/docs` open; whatever it mounts tomorrow is closed here.
"""

import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.settings import Settings

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class Access(Enum):
    ANYONE = "anyone"
    CLIENT = "client"
    ADMIN = "admin"


_ADAPTER = re.compile(r"^/adapters/[^/]+$")

ROUTES: Mapping[tuple[str, str], Access] = {
    ("GET", "/health"): Access.ANYONE,
    ("GET", "/ready"): Access.ANYONE,
    ("POST", "/chat"): Access.CLIENT,
    ("GET", "/v1/models"): Access.CLIENT,
    ("POST", "/v1/chat/completions"): Access.CLIENT,
    ("POST", "/v1/completions"): Access.CLIENT,
    ("POST", "/v1/responses"): Access.CLIENT,
    ("POST", "/v1/embeddings"): Access.CLIENT,
    ("GET", "/adapters"): Access.ADMIN,
    ("POST", "/adapters"): Access.ADMIN,
    ("DELETE", "/adapters/{name}"): Access.ADMIN,
    ("GET", "/metrics"): Access.ADMIN,
}


@dataclass(frozen=True)
class Keys:
    """The keys that were configured. With none at all, every listed route is open."""

    client: frozenset[str]
    admin: frozenset[str]

    @classmethod
    def of(cls, settings: Settings) -> "Keys":
        client = set(settings.api_keys)
        if settings.api_keys_file:
            try:
                lines = settings.api_keys_file.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"can't read the keys in {settings.api_keys_file}: {error}"
                ) from error
            client |= {line.strip() for line in lines if line.strip() and line[0] != "#"}
        admin = {settings.admin_key} if settings.admin_key else set()
        return cls(frozenset(client), frozenset(admin))

    def allow(self, access: Access, given: str | None) -> bool:
        if access is Access.ANYONE or not (self.client or self.admin):
            return True
        accepted = self.admin if access is Access.ADMIN else self.client | self.admin
        return given is not None and _among(given, accepted)


def refuse_open_door(settings: Settings) -> None:
    """Raise ConfigError if the node would listen beyond loopback with nothing asked of callers."""
    keys = Keys.of(settings)
    if settings.serving_node_host in LOOPBACK or keys.client or settings.insecure:
        return
    raise ConfigError(
        f"listening on {settings.serving_node_host} without an API key: anyone who reaches the "
        "port could use this node",
        hint="set R3MES_API_KEYS, or --host 127.0.0.1, or --insecure if that is what you want",
    )


class Guard:
    """ASGI middleware: 404 for what is not listed, 401 without the key it needs."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = Keys.of(settings)
        self._routes = dict(ROUTES)
        if settings.open_chat:
            self._routes["POST", "/chat"] = Access.ANYONE
        if settings.public_metrics:
            self._routes["GET", "/metrics"] = Access.ANYONE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        # The existing backend calls an endpoint that has a trailing slash as `//chat`.
        path = "/" + scope["path"].lstrip("/")
        scope = {**scope, "path": path, "raw_path": path.encode()}
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        route = _ADAPTER.sub("/adapters/{name}", path)
        access = self._routes.get((method, route))
        if access is None:
            await self._refuse_route(method, route)(scope, receive, send)
        elif not self._keys.allow(access, _given_key(Headers(scope=scope))):
            await _refusal(
                path, 401, "unauthorized", "a valid API key is needed: Authorization: Bearer KEY"
            )(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refuse_route(self, method: str, path: str) -> Response:
        allowed = sorted(verb for verb, listed in self._routes if listed == path)
        if not allowed:
            return _refusal(path, 404, "not_found", f"there is no {path[:200]}")
        response = _refusal(path, 405, "method_not_allowed", f"{path} takes {', '.join(allowed)}")
        response.headers["allow"] = ", ".join(allowed)
        return response


def _given_key(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    return headers.get("x-api-key")


def _among(given: str, accepted: Iterable[str]) -> bool:
    # Every key is compared, each in constant time: the answer's delay tells nothing.
    matches = [hmac.compare_digest(given.encode(), key.encode()) for key in accepted]
    return any(matches)


def _refusal(path: str, status: int, code: str, message: str) -> Response:
    if path.startswith("/v1/"):
        kind = "authentication_error" if status == 401 else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": code}
        return JSONResponse({"error": error}, status)
    return JSONResponse({"error": {"code": code, "message": message, "hint": ""}}, status)
