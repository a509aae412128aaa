"""The backend as an ASGI application: this file only puts the pieces together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from fastapi import FastAPI

from r3mes_vllm.backend import answers, endpoints, inference, network, pages
from r3mes_vllm.backend.balancer import Balancer
from r3mes_vllm.backend.choice import policy
from r3mes_vllm.backend.dial import Dialler, Timeouts
from r3mes_vllm.backend.keys import client_keys
from r3mes_vllm.backend.metrics import Measured, Metrics
from r3mes_vllm.backend.registry import Registry
from r3mes_vllm.backend.state import Backend, Clock
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.keys import Keys
from r3mes_vllm.settings import Settings
from r3mes_vllm.wire import Node


def now() -> datetime:
    return datetime.now(UTC)


def create_app(
    settings: Settings,
    *,
    clock: Clock = now,
    resolve: endpoints.Resolve = endpoints.resolve,
    timeouts: Timeouts | None = None,
) -> FastAPI:
    """The application for `settings`. The database is opened at its start-up and closed at its
    end. Raises ConfigError for settings that can't work."""
    if settings.require_signatures:
        raise ConfigError(
            "require_signatures is not available yet", hint="leave --require-signatures out"
        )
    patience = timeouts or Timeouts()
    metrics, balancer = Metrics(), Balancer()
    choose, keys = policy(settings.chat), client_keys(settings)

    def dial_failed(node: Node) -> None:
        metrics.dial_failures.inc()
        balancer.dial_failed(node)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        dialler = Dialler(
            patience,
            allow_private=settings.allow_private_nodes,
            resolve=resolve,
            dial_failed=dial_failed,
        )
        try:
            async with Registry.open(settings.database_url) as registry:
                app.state.backend = Backend(
                    registry=registry,
                    balancer=balancer,
                    dialler=dialler,
                    timeouts=patience,
                    metrics=metrics,
                    policy=choose,
                    client_keys=keys,
                    admin_keys=Keys([settings.admin_key or ""]),
                    allow_private_nodes=settings.allow_private_nodes,
                    resolve=resolve,
                    clock=clock,
                )
                yield
        finally:
            await dialler.aclose()

    app = FastAPI(
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    answers.install(app)
    app.add_middleware(Measured, metrics=metrics)
    for router in (network.router, inference.router, pages.router):
        app.include_router(router)
    return app
