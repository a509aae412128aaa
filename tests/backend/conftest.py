import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
from starlette.types import ASGIApp

from r3mes_vllm.backend.app import create_app
from r3mes_vllm.backend.dashboard import view
from r3mes_vllm.backend.dial import Timeouts
from r3mes_vllm.backend.endpoints import Resolve
from r3mes_vllm.settings import load
from tests.backend.browsing import Pair, Speaker
from tests.backend.stand_ins import LEGAL_CID, PATIENCE_S, Clock, Network, StandIn, serving
from tests.peers.chromium import Page, opened
from tests.peers.postgres import Postgres


class StartBackend(Protocol):
    async def __call__(
        self,
        *,
        timeouts: Timeouts | None = None,
        resolve: Resolve | None = None,
        **settings: Any,
    ) -> Network: ...


MakeDatabase = Callable[[], str]
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The tests of a module that says `ON_BOTH` run on each kind of database."""
    if "database_kind" in metafunc.fixturenames and getattr(metafunc.module, "ON_BOTH", False):
        metafunc.parametrize("database_kind", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def database_kind(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "sqlite"))


@pytest.fixture
def make_database(
    request: pytest.FixtureRequest, tmp_path: Path, database_kind: str
) -> Iterator[MakeDatabase]:
    """Makes a real database, empty; gives its URL."""
    numbers = itertools.count()
    with ExitStack() as used:

        def make() -> str:
            if database_kind == "sqlite":
                return f"sqlite:///{tmp_path}/backend{next(numbers) or ''}.sqlite3"
            postgres: Postgres = request.getfixturevalue("postgres")
            return postgres.url(used.enter_context(postgres.database()))

        yield make


@pytest.fixture
def database(make_database: MakeDatabase) -> str:
    return make_database()


@pytest.fixture
def start_backend(database: str, open_until_end: AsyncExitStack) -> StartBackend:
    """Start the backend on a real database; its nodes may live on loopback unless told."""

    async def start(
        *, timeouts: Timeouts | None = None, resolve: Resolve | None = None, **settings: Any
    ) -> Network:
        given = {
            "allow_private_nodes": True,
            "database_url": database,
        }
        clock = Clock()
        app = create_app(load(given | settings), clock=clock, resolve=resolve, timeouts=timeouts)
        url = await open_until_end.enter_async_context(serving(app))
        http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S, verify=False)
        await open_until_end.enter_async_context(http)
        return Network(url, http, clock, app)

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


@pytest.fixture
async def page(chromium: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Page]:
    """A page of the browser, for which the dashboard is always of now."""
    monkeypatch.setattr(view, "_FRESH_S", 0)
    monkeypatch.setattr(view, "_SHARE", 0)
    async with opened(chromium) as page:
        await page.like()
        yield page


@pytest.fixture
async def pair(network: Network, start_node: StartNode) -> Pair:
    speakers = Speaker(("Ba", "se.")), Speaker(("Le", "gal ", "advice."))
    await network.register_lora("legal", LEGAL_CID, description="On contracts", category="law")
    base, legal = [await start_node(StandIn(it)) for it in speakers]
    await network.register(base, base_model="tiny-base", version="0.1.0")
    held = {"adapters": {"legal": LEGAL_CID}, "base_model": "other-base"}
    await network.register(legal, "legal", number=2, version="0.1.0", **held)
    return Pair(network, *speakers)
