"""What only PostgreSQL does: it tells routers of changes, and may be down while they run."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from datetime import timedelta

import httpx
import pytest

from r3mes_vllm import wire
from r3mes_vllm.backend import database as databases
from r3mes_vllm.backend import following
from r3mes_vllm.backend.database import database_url
from r3mes_vllm.backend.outages import Outages
from r3mes_vllm.backend.refusals import DatabaseDown
from r3mes_vllm.backend.registry import Registry
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.signing import until
from tests.backend.stand_ins import LEGAL_CID, Clock, Network, StandIn, unused_port, wallet
from tests.backend.test_routers import SOON_S, ask, sees
from tests.backend.test_server import program
from tests.peers.postgres import Postgres

BOTH = pytest.mark.parametrize("protected", [True, False])
NEVER_S = 3600.0
CUT = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '{}'"
BODIES = {
    "/api/serving-node/register": {
        "wallet_address": wallet(1),
        "endpoint_url": "http://127.0.0.1:9",
        "available_lora_list": [],
    },
    "/api/lora/register": {"name": "legal", "ipfs_hash": LEGAL_CID},
}


@pytest.fixture
def database_kind() -> str:
    return "postgresql"


@pytest.fixture
def cluster(postgres: Postgres) -> Iterator[Postgres]:
    """The database's own, which runs again after the test."""
    yield postgres
    postgres.start()


def without(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    async def idle(self: object) -> None:
        await asyncio.Event().wait()

    if what == "looking":
        monkeypatch.setattr(following, "_LOOK_S", NEVER_S)
    if what == "listening":
        monkeypatch.setattr(following.Follower, "_listen", idle)


async def is_ready(network: Network, ready: bool) -> bool:
    return (await network.http.get("/ready")).status_code == (200 if ready else 503)


@pytest.mark.parametrize("missing", ["looking", "listening"])
async def test_either_way_to_hear_of_a_change_is_enough(
    start_backend: StartBackend, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    without(monkeypatch, missing)
    one, two = await start_backend(), await start_backend()
    await one.register("http://127.0.0.1:9", "legal")
    await sees(two)


async def test_without_both_nothing_is_heard(
    start_backend: StartBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin."""
    without(monkeypatch, "looking")
    without(monkeypatch, "listening")
    one, two = await start_backend(), await start_backend()
    await asyncio.sleep(0.2)
    await one.register("http://127.0.0.1:9", "legal")
    await asyncio.sleep(SOON_S)
    assert await two.wallets() == []


async def test_it_listens_again_when_its_connection_was_cut(
    start_backend: StartBackend,
    monkeypatch: pytest.MonkeyPatch,
    postgres: Postgres,
    database: str,
) -> None:
    without(monkeypatch, "looking")
    one, two = await start_backend(), await start_backend()
    name = str(database_url(database).database)
    for number in range(3):
        (count,) = postgres.sql(CUT.format(name), "postgres")
        assert int(count) >= 2  # which each have to listen
        # At once, so that it was not told of this.
        await one.register("http://127.0.0.1:9", "legal", number=number)
        await sees(two, number)


@BOTH
async def test_a_router_that_stands_still_holds_up_nobody(
    database: str, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    monkeypatch.setattr(databases, "_FROZEN_TIMEOUT_S", 1 if protected else 0)
    monkeypatch.setattr(databases, "_COMMAND_TIMEOUT_S", 5)
    clock = Clock()
    node = wire.RegisterNode(
        wallet_address=wallet(1), endpoint_url="http://x", available_lora_list=[]
    )
    async with Registry.open(database, clock) as frozen, Registry.open(database) as well:
        change = frozen._changing()
        await change.__aenter__()
        if protected:
            await well.register_node(node, clock())
        else:
            with pytest.raises(DatabaseDown):
                await well.register_node(node, clock())
        with pytest.raises(DatabaseDown) if protected else ExitStack():
            await change.__aexit__(None, None, None)


@BOTH
async def test_without_the_database_it_routes_on_and_nobody_is_penalised(
    start_backend: StartBackend,
    start_node: StartNode,
    cluster: Postgres,
    monkeypatch: pytest.MonkeyPatch,
    protected: bool,
) -> None:
    """The twin takes the time of the outage for silence of the nodes."""
    if not protected:
        monkeypatch.setattr(Outages, "oldest", lambda self, now, age_s: now - timedelta(0, age_s))
    network = await start_backend()
    await network.register(await start_node(StandIn()), "legal")
    assert (await network.http.get("/ready")).status_code == 200

    cluster.stop()
    beat = await network.beat()
    assert (beat.status_code, beat.json()["error"]["code"]) == (503, "database_down")
    assert "retry-after" in beat.headers
    await until(lambda: is_ready(network, False))
    network.clock.forward(240)
    assert (await ask(network) == "hello") == protected
    assert (await network.http.get("/health")).json()["nodes"] == (1 if protected else 0)
    for path in ("/api/serving-node/register", "/api/lora/register"):
        assert (await network.http.post(path, json=BODIES[path])).status_code == 503

    cluster.start()
    await until(lambda: is_ready(network, True))
    network.clock.forward(59)
    assert (await ask(network) == "hello") == protected
    network.clock.forward(1)
    assert await network.wallets() == []
    assert (await network.beat()).status_code == 200
    assert await ask(network) == "hello"


async def test_a_database_that_hangs_is_one_that_does_not_answer(
    start_backend: StartBackend,
    start_node: StartNode,
    cluster: Postgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "_LOOK_TIMEOUT_S", 0.5)
    monkeypatch.setattr(databases, "_COMMAND_TIMEOUT_S", 1)
    monkeypatch.setattr(databases, "_CONNECT_TIMEOUT_S", 1)
    network = await start_backend()
    await network.register(await start_node(StandIn()), "legal")
    with cluster.hanging():
        await until(lambda: is_ready(network, False))
        assert await ask(network) == "hello"
        assert (await network.beat()).status_code == 503
    await until(lambda: is_ready(network, True))
    assert (await network.beat()).status_code == 200


async def test_in_the_end_nodes_that_can_not_beat_are_taken_for_dead(
    start_backend: StartBackend, start_node: StartNode, cluster: Postgres
) -> None:
    network = await start_backend()
    await network.register(await start_node(StandIn()), "legal")
    cluster.stop()
    await until(lambda: is_ready(network, False))
    network.clock.forward(359)
    assert await network.wallets() == [wallet(1)]
    network.clock.forward(1)
    assert await network.wallets() == []


async def test_a_restart_of_the_database_under_load_loses_no_answer(
    start_backend: StartBackend, start_node: StartNode, cluster: Postgres
) -> None:
    one, two = await start_backend(), await start_backend()
    nodes = [await start_node(StandIn()) for _ in range(5)]
    for number, url in enumerate(nodes):
        await one.register(url, "legal", number=number)
    await sees(two, 4)
    over = asyncio.Event()
    answers: list[str] = []

    async def asks(network: Network) -> None:
        while not over.is_set():
            answers.append(await ask(network))

    async def beats(network: Network, number: int) -> None:
        accepted = 0
        while not over.is_set() or accepted == 0:
            status = (await network.beat(number)).status_code
            assert status in (200, 503)
            accepted = accepted + 1 if status == 200 and over.is_set() else 0
            await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as tasks:
        for network in (one, two):
            tasks.create_task(asks(network))
            for number in range(5):
                tasks.create_task(beats(network, number))
        for _ in range(2):
            await asyncio.sleep(0.3)
            await asyncio.to_thread(cluster.stop)
            await until(lambda: is_ready(one, False))
            cluster.start()
            await until(lambda: is_ready(one, True))
            await until(lambda: is_ready(two, True))
        over.set()
    assert set(answers) == {"hello"}
    await one.register("http://127.0.0.1:9", "legal", number=9)
    await sees(two, 9)


async def test_of_three_programs_any_may_die(
    database: str, start_node: StartNode, open_until_end: AsyncExitStack
) -> None:
    ports = [unused_port() for _ in range(3)]
    with ExitStack() as running:
        processes = [
            running.enter_context(
                program(backend_port=port, database_url=database, allow_private_nodes=True)
            )
            for port in ports
        ]
        routers = []
        for process, port in zip(processes, ports, strict=True):
            assert process.stdout
            assert "listens" in process.stdout.readline()
            http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False)
            await open_until_end.enter_async_context(http)
            routers.append(Network(str(http.base_url), http, Clock()))
        await routers[0].register(await start_node(StandIn()), "legal")
        for router in routers:
            await sees(router)
        processes[0].kill()
        assert [await ask(router) for router in routers[1:]] == ["hello"] * 2
        assert (await routers[1].beat()).status_code == 200
        await routers[1].register(await start_node(StandIn()), "medical", number=2)
        await sees(routers[2], 2)
        processes[1].kill()
        assert await ask(routers[2]) == "hello"
        assert (await routers[2].beat(2)).status_code == 200
