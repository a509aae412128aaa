"""Who may call what: every route is closed unless it stands in the table below.

vLLM's `--api-key` guards some prefixes and leaves `/invocations`, `POST /adapters`, `/tokenize`,
`/metrics` and `/docs` open; whatever it mounts tomorrow is closed here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from r3mes_vllm.cross_site import Pages, names
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.keys import Keys, presented
from r3mes_vllm.node.refusals import refusal
from r3mes_vllm.settings import Settings

CALLER = "r3mes.caller"
"""Where the guard leaves a `Caller` in a request's scope."""

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@dataclass(frozen=True)
class Caller:
    key: str | None
    """A digest of it; None without one."""
    trusted: bool = False
    """The admin, or the backend, which has limits for clients of its own."""


class Access(Enum):
    ANYONE = "anyone"
    CLIENT = "client"
    ADMIN = "admin"


_ADAPTER = re.compile(r"^/adapters/.+$")  # ipfs://CID is a name
_MODEL = re.compile(r"^/v1/models/.+$")  # hub names have a slash

ROUTES: Mapping[tuple[str, str], Access] = {
    ("GET", "/health"): Access.ANYONE,
    ("GET", "/ready"): Access.ANYONE,
    ("POST", "/identity"): Access.ANYONE,
    ("POST", "/chat"): Access.CLIENT,
    ("GET", "/v1/models"): Access.CLIENT,
    ("GET", "/v1/models/{name}"): Access.CLIENT,
    ("POST", "/v1/chat/completions"): Access.CLIENT,
    ("POST", "/v1/completions"): Access.CLIENT,
    ("POST", "/v1/responses"): Access.CLIENT,
    ("POST", "/v1/embeddings"): Access.CLIENT,
    ("GET", "/adapters"): Access.ADMIN,
    ("POST", "/adapters"): Access.ADMIN,
    ("DELETE", "/adapters/{name}"): Access.ADMIN,
    ("POST", "/drain"): Access.ADMIN,
    ("GET", "/metrics"): Access.ADMIN,
    ("GET", "/status"): Access.ADMIN,
}


class Doors:
    """The keys that were configured. With none at all, every listed route is open.

    `backend_key` and `operator_key` are those that this node made: for its backend, which opens a
    client's routes, and for who may read its files.
    """

    def __init__(self, settings: Settings, backend_key: str = "", operator_key: str = "") -> None:
        self.client = Keys(settings.api_keys, settings.api_keys_file)
        self._backend = Keys([backend_key])
        self._admin = Keys([settings.admin_key or ""])
        self._operator = Keys([operator_key])

    def let_in(self, access: Access, given: bytes) -> Caller | None:
        """Who asks, by the key that was given; None if it does not open what needs `access`."""
        admin, operator = self._admin.accept(given), self._operator.accept(given)
        backend, client = self._backend.accept(given), self.client.accept(given)
        admin = admin or operator
        known = admin or backend or client
        is_open = access is Access.ANYONE or not (self.client.needed or self._admin.needed)
        if not (is_open or admin or (access is Access.CLIENT and known)):
            return None
        return Caller(sha256(given).hexdigest()[:16] if known else None, admin or backend)


def needs_key(settings: Settings) -> bool:
    """Whether `/chat` is closed to who gives none, as the existing backend."""
    keys = settings.api_keys or settings.api_keys_file or settings.admin_key
    return bool(keys) and not settings.open_chat


def refuse_open_door(settings: Settings) -> None:
    """Raise ConfigError if the node would listen beyond loopback with nothing asked of callers."""
    if settings.serving_node_host in LOOPBACK or settings.insecure or Doors(settings).client:
        return
    raise ConfigError(
        f"listening on {settings.serving_node_host} without an API key: anyone who reaches the "
        "port could use this node",
        hint="set R3MES_API_KEYS, or --host 127.0.0.1, or --insecure if that is what you want",
    )


def asked_of(scope: Scope) -> tuple[str, str, str]:
    """The method and the route, as they may stand in the table, and the path. HEAD is a GET whose
    answer's body the server leaves out."""
    # The existing backend calls an endpoint that has a trailing slash as `//chat`.
    path = "/" + scope["path"].lstrip("/")
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    route = _MODEL.sub("/v1/models/{name}", _ADAPTER.sub("/adapters/{name}", path))
    return method, route, path


class Guard:
    """ASGI middleware: 404 for what is not listed, 401 without the key it needs, 403 for what a web
    page sends where none is needed."""

    def __init__(
        self, app: ASGIApp, settings: Settings, backend_key: str = "", operator_key: str = ""
    ) -> None:
        self._app = app
        self._doors = Doors(settings, backend_key, operator_key)
        tls = settings.ssl_certfile is not None
        self._pages = Pages(known=names(settings, settings.serving_node_host, tls=tls))
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
        method, route, path = asked_of(scope)
        scope = {**scope, "method": method, "path": path, "raw_path": path.encode()}
        access = self._routes.get((method, route))
        if access is None:
            await self._refuse_route(method, route)(scope, receive, send)
            return
        caller = self._doors.let_in(access, presented(Headers(scope=scope)))
        if caller is None:
            await refusal(
                path, 401, "unauthorized", "a valid API key is needed: Authorization: Bearer KEY"
            )(scope, receive, send)
        elif caller.key is None and (error := self._pages.objection(scope)):
            refused = refusal(path, error.status, error.code, error.message, error.hint)
            await refused(scope, receive, send)
        else:
            await self._app({**scope, CALLER: caller}, receive, send)

    def _refuse_route(self, method: str, path: str) -> Response:
        allowed = sorted(verb for verb, listed in self._routes if listed == path)
        if not allowed:
            return refusal(path, 404, "not_found", f"there is no {path[:200]}")
        response = refusal(path, 405, "method_not_allowed", f"{path} takes {', '.join(allowed)}")
        response.headers["allow"] = ", ".join(allowed)
        return response
