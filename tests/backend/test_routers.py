"""Several routers on one database, and what they do without it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from r3mes_vllm import wire
from r3mes_vllm.backend import following
from r3mes_vllm.backend.database import database_url, open_engine
from r3mes_vllm.backend.known import known
from r3mes_vllm.backend.registry import Registry
from r3mes_vllm.identity import Identity
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.node.heartbeat import Registration
from r3mes_vllm.node.signer import Signer
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.signing import SigningNode, proves, until
from tests.backend.stand_ins import LEGAL_CID, Clock, Network, StandIn, unused_port, wallet
from tests.backend.test_server import program

ON_BOTH = True
SOON_S = 1.0
"""Not so soon that a test fails which has to wait for it."""


async def sees(network: Network, number: int = 1) -> None:
    async def listed() -> bool:
        return wallet(number) in await network.wallets()

    await until(listed)


async def ask(network: Network) -> str:
    answer = await network.http.post("/chat", json={"message": "hi", "lora_name": "legal"})
    return answer.text


async def test_what_one_router_is_told_the_other_routes_by(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    one, two = await start_backend(), await start_backend()
    await one.register(await start_node(StandIn()), "legal")
    began = time.monotonic()
    await sees(two)
    took = time.monotonic() - began
    assert await ask(two) == "hello"
    assert took < 2 * following._LOOK_S + SOON_S
    await one.beat(status="draining")
    await until(lambda: is_gone(two))
    # And the other way round.
    await two.register_lora("legal", LEGAL_CID)

    async def lists_it() -> bool:
        return [it["name"] for it in (await one.http.get("/api/lora/list")).json()] == ["legal"]

    await until(lists_it)


async def is_gone(network: Network) -> bool:
    return not await network.wallets()


async def test_a_node_that_signs_may_change_its_router(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    """Neither what it proved nor what it sent is unknown to the other."""
    one, two = await start_backend(), await start_backend()
    node = SigningNode(one)
    place = StandIn(proves(node.identity))
    await node.register(await start_node(place), "legal")
    assert (await node.settled())["signature"] == "signed"
    sent = node.request("heartbeat")
    for router, status in ((one, 200), (two, 403)):
        answer = await router.http.post(sent.path, content=sent.body, headers=sent.headers)
        assert answer.status_code == status
    node.network = two
    await until(lambda: is_signed(node))
    assert await ask(two) == "hello"
    assert [seen.path for seen in place.seen].count("/identity") == 1


async def is_signed(node: SigningNode) -> bool:
    nodes = (await node.network.http.get("/api/serving-node/list")).json()["nodes"]
    return [it["signature"] for it in nodes] == ["signed"]


async def test_only_what_changed_is_read(
    start_backend: StartBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await start_backend(), await start_backend()
    for number in range(20):
        await one.register("http://127.0.0.1:9", "legal", number=number)
    await sees(two, 19)
    read: list[str] = []

    def counting(row: Any) -> Any:
        read.append(row["wallet_address"])
        return known(row)

    async def have_caught_up() -> bool:
        """Both with what was registered: each reads its own writes too."""
        read.clear()
        await asyncio.sleep(2 * (following._LOOK_S + following._PAUSE_S))
        return not read

    monkeypatch.setattr(following, "known", counting)
    await until(have_caught_up)
    await one.beat(7, status="draining")

    async def noticed() -> bool:
        return wallet(7) not in await two.wallets()

    await until(noticed)
    assert set(read) == {wallet(7)}


async def test_a_database_from_a_backup_is_read_anew(database: str) -> None:
    clock = Clock()
    async with Registry.open(database, clock) as registry:
        for number in range(3):
            node = wire.RegisterNode(
                wallet_address=wallet(number), endpoint_url="http://x", available_lora_list=[]
            )
            await registry.register_node(node, clock())

        async def has_looked() -> bool:
            return registry._view.revision == 3

        await until(has_looked)
        engine = open_engine(database_url(database))
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE registry_revision SET value = 1"))
            await connection.execute(text("DELETE FROM nodes WHERE revision > 1"))
        await engine.dispose()

        async def only_the_first_is_there() -> bool:
            return [it.wallet_address for it in await registry.all_nodes()] == [wallet(0)]

        await until(only_the_first_is_there)


NODES = 50
BEAT_S = 2.0


@pytest.fixture
async def registrations(tmp_path: Path) -> AsyncIterator[tuple[str, int]]:
    """Nodes that beat at a port where there may be a backend; its URL, and the port."""
    port = unused_port()
    url = f"http://127.0.0.1:{port}"
    async with AsyncExitStack() as running:
        tasks = []
        for number in range(NODES):
            identity = Identity.load(tmp_path / str(number))
            client = BackendClient(url, signer=Signer(identity))
            await running.enter_async_context(client)
            node = wire.RegisterNode(
                wallet_address=identity.wallet_address,
                endpoint_url="http://127.0.0.1:9",
                available_lora_list=["legal"],
                adapters={"legal": LEGAL_CID},
            )
            beating = Registration(client, partial(copy, node), lambda: 0, BEAT_S)
            tasks.append(asyncio.create_task(beating.run()))
        yield url, port
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_after_a_restart_all_nodes_are_back_within_two_beats(
    database: str, registrations: tuple[str, int]
) -> None:
    url, port = registrations
    settings = {"backend_port": port, "database_url": database, "allow_private_nodes": True}
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:

        async def beaten_since(since: str) -> bool:
            nodes = (await http.get("/api/serving-node/list")).json()["nodes"]
            return [node["last_heartbeat"] > since for node in nodes] == [True] * NODES

        since = "2026"
        for _ in range(2):
            with program(**settings) as process:
                assert process.stdout
                assert "listens" in process.stdout.readline()
                began = time.monotonic()
                await until(partial(beaten_since, since))
                assert time.monotonic() - began < 2 * 1.1 * BEAT_S + SOON_S
                nodes = (await http.get("/api/serving-node/list")).json()["nodes"]
                since = max(node["last_heartbeat"] for node in nodes)
