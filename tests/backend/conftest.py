from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
from starlette.types import ASGIApp

from r3mes_vllm.backend.app import create_app
from r3mes_vllm.backend.dial import Timeouts
from r3mes_vllm.backend.endpoints import Resolve, resolve
from r3mes_vllm.settings import load
from tests.backend.stand_ins import PATIENCE_S, Clock, Network, serving


class StartBackend(Protocol):
    async def __call__(
        self,
        *,
        timeouts: Timeouts | None = None,
        resolve: Resolve = resolve,
        **settings: Any,
    ) -> Network: ...


StartNode = Callable[[ASGIApp], Awaitable[str]]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of this machine must not be asked, and its settings must not be read."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "BACKEND_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
async def open_until_end() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def start_backend(tmp_path: Path, open_until_end: AsyncExitStack) -> StartBackend:
    """Start the backend on a real SQLite file; its nodes may live on loopback unless told."""

    async def start(
        *, timeouts: Timeouts | None = None, resolve: Resolve = resolve, **settings: Any
    ) -> Network:
        given = {
            "allow_private_nodes": True,
            "database_url": f"sqlite:///{tmp_path}/backend.sqlite3",
        }
        clock = Clock()
        app = create_app(load(given | settings), clock=clock, resolve=resolve, timeouts=timeouts)
        url = await open_until_end.enter_async_context(serving(app))
        http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S, verify=False)
        await open_until_end.enter_async_context(http)
        return Network(url, http, clock)

    return start


@pytest.fixture
def start_node(open_until_end: AsyncExitStack) -> StartNode:
    """Serve an application as a node; gives its URL."""

    async def start(app: ASGIApp) -> str:
        return await open_until_end.enter_async_context(serving(app))

    return start


@pytest.fixture
async def network(start_backend: StartBackend) -> Network:
    return await start_backend()
