"""What `/metrics` shows. Labels are route templates, methods and status classes: few, whoever
sends what."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Metrics:
    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "r3mes_backend_requests",
            "Requests answered",
            ["method", "route", "status"],
            registry=registry,
        )
        self.first_byte = Histogram(
            "r3mes_backend_first_byte_seconds",
            "Seconds until the status was sent",
            ["route"],
            registry=registry,
            buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
        )
        self.in_flight = Gauge(
            "r3mes_backend_in_flight_requests", "Requests being answered", registry=registry
        )
        self.broken_streams = Counter(
            "r3mes_backend_broken_streams", "Answers a node broke off", registry=registry
        )
        self.moved_streams = Counter(
            "r3mes_backend_moved_streams",
            "Answers that another node went on with",
            registry=registry,
        )
        self.fallback_answers = Counter(
            "r3mes_backend_fallback_answers",
            "Answers begun in place of holders",
            ["kind"],
            registry=registry,
        )
        self.fallback_failures = Counter(
            "r3mes_backend_fallback_failures",
            "Answers that could not be had in place of holders, or broke off",
            ["kind"],
            registry=registry,
        )
        self.dial_failures = Counter(
            "r3mes_backend_dial_failures", "Nodes that could not be dialled", registry=registry
        )
        self.nodes = Gauge("r3mes_backend_live_nodes", "Nodes alive", registry=registry)
        self.adapters = Gauge(
            "r3mes_backend_live_adapters", "Adapters with a live holder", registry=registry
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)


class Measured:
    """ASGI middleware that counts each request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = "none"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = f"{message['status'] // 100}xx"
                seconds = time.perf_counter() - began
                self._metrics.first_byte.labels(_route(scope)).observe(seconds)
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, noting)
        finally:
            self._metrics.in_flight.dec()
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(method, _route(scope), status).inc()


def _route(scope: Scope) -> str:
    path: str = getattr(scope.get("route"), "path", "unmatched")
    return path
