"""The backend as an ASGI application: this file only puts the pieces together."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta

from fastapi import FastAPI

from r3mes_vllm.backend import (
    adapters,
    answers,
    dashboard,
    endpoints,
    fallback,
    inference,
    network,
    pages,
    reach,
)
from r3mes_vllm.backend.balancer import Balancer
from r3mes_vllm.backend.bodies import Kept, Room
from r3mes_vllm.backend.choice import policy
from r3mes_vllm.backend.dial import Dialler, Timeouts
from r3mes_vllm.backend.elsewhere import root_of
from r3mes_vllm.backend.forgetting import forgetting
from r3mes_vllm.backend.keys import client_keys
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.backend.metrics import Measured, Metrics
from r3mes_vllm.backend.origins import KeepOut, allow_origins
from r3mes_vllm.backend.prover import Prover
from r3mes_vllm.backend.rates import Rates
from r3mes_vllm.backend.registry import Registry
from r3mes_vllm.backend.spelling import Spelled
from r3mes_vllm.backend.state import Backend, Clock
from r3mes_vllm.keys import Keys
from r3mes_vllm.request_id import RequestIds, surround
from r3mes_vllm.settings import Settings
from r3mes_vllm.wire import Told

_LOOKUPS = 32
"""Of nodes' addresses, at once."""


def now() -> datetime:
    return datetime.now(UTC)


def create_app(
    settings: Settings,
    *,
    clock: Clock = now,
    resolve: endpoints.Resolve | None = None,
    timeouts: Timeouts | None = None,
) -> FastAPI:
    """The application for `settings`. The database is opened at its start-up and closed at its
    end. Raises ConfigError for settings that can't work."""
    patience = timeouts or Timeouts(
        first_byte=settings.first_byte_timeout, answer=settings.answer_timeout
    )
    metrics, balancer = Metrics(), Balancer(required_version=settings.required_node_version)
    if settings.fallback_url:
        root_of(settings.fallback_url)
    choose, keys = policy(settings.chat), client_keys(settings)
    admin_keys = Keys([settings.admin_key or ""])

    def dial_failed(node: KnownNode) -> None:
        metrics.dial_failures.inc()
        balancer.dial_failed(node)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        dialler = Dialler(
            patience,
            allow_private=settings.allow_private_nodes,
            resolve=resolve or endpoints.Resolver(_LOOKUPS),
            strangers=resolve or endpoints.resolve,
            dial_failed=dial_failed,
            flight=balancer.flight,
        )
        try:
            async with (
                Registry.open(settings.database_url, clock) as registry,
                fallback.servers(settings, patience) as servers,
                aclosing(Prover(registry, dialler, clock)) as prover,
                forgetting(registry, clock, timedelta(days=settings.forget_nodes_after)),
            ):
                app.state.backend = Backend(
                    registry=registry,
                    balancer=balancer,
                    dialler=dialler,
                    prover=prover,
                    timeouts=patience,
                    metrics=metrics,
                    policy=choose,
                    client_keys=keys,
                    admin_keys=admin_keys,
                    allow_private_nodes=settings.allow_private_nodes,
                    require_signatures=settings.require_signatures,
                    told=Told(
                        required_version=settings.required_node_version,
                        latest_version=settings.latest_node_version,
                    ),
                    resolve=resolve or endpoints.resolve,
                    clock=clock,
                    servers=servers,
                    fallback=settings.fallback,
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
    app.state.room = Room(settings.body_timeout)
    answers.install(app)
    app.add_middleware(Kept)
    app.add_middleware(Rates, settings=settings.rates, keys=keys)
    app.add_middleware(KeepOut, settings=settings, keys=(keys, admin_keys))
    app.add_middleware(Measured, metrics=metrics)
    allow_origins(app, settings.cors_origins)
    surround(app, lambda whole: RequestIds(Spelled(whole)))
    for router in (
        adapters.router,
        network.router,
        reach.router,
        inference.router,
        pages.router,
    ):
        app.include_router(router)
    dashboard.install(app)
    return app
