"""The backend as a program: a socket, a start-up line, an orderly end."""

import errno
import math
import resource
import socket
import sys
from contextlib import suppress

import httpx
import uvicorn
import uvloop

from r3mes_vllm import bounded_http, discretion
from r3mes_vllm.backend.app import create_app
from r3mes_vllm.backend.keys import client_keys
from r3mes_vllm.backend.registry import Registry
from r3mes_vllm.cross_site import is_loopback
from r3mes_vllm.errors import ConfigError, PortTaken, R3mesError
from r3mes_vllm.settings import Settings
from r3mes_vllm.unread import bounded

_BACKLOG = 2048
_KEEPALIVE_S = 75
"""Longer than clients keep an idle connection (httpx 5 s): who closes last breaks no request."""


def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM, which is raised again once all is closed: running answers have
    the drain's time to finish, or until a second SIGINT.

    Raises PortTaken or ConfigError before anything is served: no database, bad settings.
    """
    uvloop.run(serve(settings))


async def serve(settings: Settings) -> None:
    """As `run`, inside a running loop."""
    discretion.keep()
    take_descriptors()
    app = create_app(settings)
    # Opened once here, so that a database that can't be had is a sentence and not a traceback.
    async with Registry.open(settings.database_url) as registry:
        database = registry.where
    sockets = listen(settings.backend_host, settings.backend_port)
    try:
        for warning in warnings(settings):
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        config = uvicorn.Config(
            app,
            http=bounded_http.bounded(settings.header_bytes, settings.header_timeout),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEPALIVE_S,
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout),
        )
        line = f"backend listens on {_url(sockets[0])}, database {database}"
        await _Announced(config, line).serve(sockets=sockets)
    finally:
        for each in sockets:
            each.close()


def take_descriptors() -> None:
    """As many as the system lets this process have: each answer takes two, one to its client and
    one to its node."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says that there is no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of `host`. Raises PortTaken or ConfigError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"can't listen on {host!r}: {error}", hint="check --host") from error
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        # asyncio sets TCP_NODELAY only where the protocol is named, and without it each small
        # piece of a stream waits 40 ms for an acknowledgement.
        each = bounded(socket.socket(family, kind, protocol))
        try:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            each.bind(address)
            each.listen(_BACKLOG)
        except OSError as error:
            each.close()
            failure = failure if failure and failure.errno == errno.EADDRINUSE else error
        else:
            sockets.append(each)
    if failure and (failure.errno == errno.EADDRINUSE or not sockets):
        for each in sockets:
            each.close()
        raise _cannot_listen(host, port, failure) from failure
    return sockets


def warnings(settings: Settings) -> list[str]:
    """What the owner should know at start, a sentence each."""
    found = []
    beyond = not is_loopback(settings.backend_host)
    if beyond and not client_keys(settings) and not settings.insecure:
        found.append(
            f"anyone who reaches {settings.backend_host}:{settings.backend_port} may use /chat "
            "and /v1: set R3MES_API_KEYS, or R3MES_INSECURE=true if that is meant"
        )
    if beyond and not settings.admin_key and not settings.insecure:
        found.append("anyone may register adapters: set R3MES_ADMIN_KEY")
    if settings.rates.tokens or settings.rates.address_tokens:
        found.append("[rates] tokens: a backend counts requests only; nodes count tokens")
    return found + _fallback_warnings(settings)


def _fallback_warnings(settings: Settings) -> list[str]:
    url, found = settings.fallback_url, []
    for name, kind in (("fallback_url", "url"), ("with_local_model", "local")):
        if getattr(settings, name) and kind not in settings.fallback:
            found.append(f"{name} does nothing: fallback leaves {kind!r} out")
    if url is None and (settings.fallback_key or settings.fallback_model):
        found.append("fallback_key and fallback_model do nothing without fallback_url")
    if url and url.startswith("http://") and not is_loopback(httpx.URL(url).host):
        found.append("fallback_url is not https: chats, and its key, can be read on the way")
    return found


class _Announced(uvicorn.Server):
    """Prints `line` once it listens."""

    def __init__(self, config: uvicorn.Config, line: str) -> None:
        super().__init__(config)
        self._line = line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            print(self._line, flush=True)


def _cannot_listen(host: str, port: int, error: OSError) -> R3mesError:
    if error.errno == errno.EADDRINUSE:
        return PortTaken(
            f"port {port} is in use", hint=f"stop what uses it, or pass --port {port + 1}"
        )
    return ConfigError(
        f"can't listen on {host}:{port}: {error.strerror}", hint="check --host and --port"
    )


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
