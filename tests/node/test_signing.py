"""What a node says to a real backend is signed, process after process."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from r3mes_vllm.backend.app import create_app
from r3mes_vllm.errors import BackendRefused
from r3mes_vllm.identity import Identity, access_key
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.node.heartbeat import Registration
from r3mes_vllm.node.signer import Signer
from r3mes_vllm.settings import load
from r3mes_vllm.signatures import from_headers
from r3mes_vllm.wire import Heartbeat, RegisterNode
from tests.backend.signing import proves, until
from tests.backend.stand_ins import StandIn, serving


@contextlib.asynccontextmanager
async def backend(folder: Path, **settings: Any) -> AsyncIterator[str]:
    given = {"database_url": f"sqlite:///{folder}/b.sqlite3", "allow_private_nodes": True}
    async with serving(create_app(load(given | settings))) as url:
        yield url


def test_a_process_begins_anew_where_its_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another boot for each request, until it has one later than all before."""
    now = 1_800_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    signer, boots = Signer(Identity(Ed25519PrivateKey.generate())), []
    for step in (0, 1, -30, -4000, 2000, 3000, 10):
        now += step
        found = from_headers(signer.headers("POST", "/api/x", b""))
        assert found
        boots.append((found[0].boot_time, found[0].sequence))
    start = 1_800_000_000
    assert boots == [
        *((start, 1), (start, 2), (start, 3)),
        *((start - 4029, 1), (start - 2029, 1), (start + 971, 1), (start + 971, 2)),
    ]


def described(identity: Identity, url: str, key: str) -> RegisterNode:
    return RegisterNode(
        wallet_address=identity.wallet_address,
        endpoint_url=url,
        available_lora_list=["legal"],
        access_key=key,
    )


@contextlib.asynccontextmanager
async def in_network(url: str, node: RegisterNode, identity: Identity) -> AsyncIterator[None]:
    async with BackendClient(url, signer=Signer(identity)) as client:
        registration = Registration(client, lambda: node, lambda: 0, 0.1)
        task = asyncio.create_task(registration.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await registration.goodbye()


async def nodes(url: str) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(trust_env=False) as http:
        found = (await http.get(f"{url}/api/serving-node/list")).json()["nodes"]
    return [dict(node) for node in found]


async def test_a_node_and_its_next_process_are_known_by_their_key(tmp_path: Path) -> None:
    identity, key = Identity.load(tmp_path), access_key(tmp_path)
    place = StandIn(proves(identity))
    async with backend(tmp_path, require_signatures=True) as url, serving(place) as here:
        node = described(identity, here, key)

        async def beats() -> bool:
            return [it["signature"] for it in await nodes(url)] == ["signed"]

        for _ in range(2):
            async with in_network(url, node, Identity.load(tmp_path)):
                await until(beats)
                await asyncio.sleep(0.3)  # some beats
                assert await beats()
            assert await nodes(url) == []  # it said goodbye
        async with (
            in_network(url, node, identity),
            httpx.AsyncClient(base_url=url, trust_env=False) as http,
        ):
            await until(beats)
            answer = await http.post("/chat", json={"message": "hi", "lora_name": "legal"})
            assert answer.text == "hello"
    assert place.seen[-1].header("authorization") == [f"Bearer {key}"]


async def test_a_node_that_does_not_sign_is_told_so(tmp_path: Path) -> None:
    """The twin."""
    node = described(Identity.load(tmp_path), "http://127.0.0.1:9", access_key(tmp_path))
    async with (
        backend(tmp_path, require_signatures=True) as url,
        BackendClient(url) as client,
    ):
        with pytest.raises(BackendRefused, match="signed requests only") as caught:
            await client.register(node)
    assert caught.value.answered == 401


async def test_an_existing_backend_sees_the_fields_it_knows(tmp_path: Path) -> None:
    heard = StandIn()
    identity = Identity.load(tmp_path)
    async with serving(heard) as url, BackendClient(url, signer=Signer(identity)) as client:
        await client.register(described(identity, "http://127.0.0.1:9", access_key(tmp_path)))
        wallet = identity.wallet_address
        await client.beat(Heartbeat(wallet_address=wallet, status="active", current_load=2))
        await client.deregister(wallet)
    register, beat, leave = (json.loads(seen.body) for seen in heard.seen)
    old_fields = {name: register[name] for name in ("wallet_address", "endpoint_url")}
    assert old_fields == {"wallet_address": wallet, "endpoint_url": "http://127.0.0.1:9"}
    assert register["available_lora_list"] == ["legal"]
    assert beat == {"wallet_address": wallet, "status": "active", "current_load": 2.0}
    assert leave == {"wallet_address": wallet}
    assert all(seen.header("content-type") == ["application/json"] for seen in heard.seen)


async def test_an_error_that_repeats_the_request_does_not_show_the_access_key(
    tmp_path: Path,
) -> None:
    async def repeats(request: Request) -> Response:
        return PlainTextResponse(await request.body(), 400)

    identity, key = Identity.load(tmp_path), access_key(tmp_path)
    node = described(identity, "http://127.0.0.1:9", key)
    async with serving(StandIn(repeats)) as url, BackendClient(url) as client:
        with pytest.raises(BackendRefused) as caught:
            await client.register(node)
    assert identity.wallet_address in str(caught.value)
    assert key not in str(caught.value)
    assert key not in repr(node)
