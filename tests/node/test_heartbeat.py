"""The node's client against a backend that knows only the existing network's fields."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from r3mes_vllm import __version__
from r3mes_vllm.backend.app import create_app
from r3mes_vllm.errors import BackendRefused
from r3mes_vllm.node import heartbeat
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.node.heartbeat import Registration
from r3mes_vllm.settings import load
from r3mes_vllm.wire import RegisterLora, RegisterNode
from tests.backend.stand_ins import LEGAL_CID, serving
from tests.programs import free_port

WALLET = "remes1" + "a" * 38
NODE = RegisterNode(
    wallet_address=WALLET,
    endpoint_url="http://127.0.0.1:9",
    available_lora_list=["legal"],
    adapters={"legal": "bafy"},
)
INTERVAL_S, SOON_S = 0.2, 2.0


@dataclass
class OldBackend:
    """Its answers, and what it heard. Unknown routes are 404, as there."""

    heard: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    known: bool = False
    refuse: tuple[int, dict[str, str]] | None = None

    async def answer(self, request: Request) -> JSONResponse:
        body = await request.json()
        command = request.url.path.rpartition("/")[2]
        self.heard.append((command, body))
        if self.refuse:
            return JSONResponse({"error": "no"}, self.refuse[0], self.refuse[1])
        if command == "register":
            self.known = True
            return JSONResponse({"success": True, "action": "created", "node_id": 1})
        if not self.known:
            return JSONResponse({"error": "Node not found"}, 404)
        return JSONResponse({"success": True})

    def count(self, command: str) -> int:
        return sum(heard == command for heard, _ in self.heard)


@contextlib.asynccontextmanager
async def listening(backend: OldBackend, port: int) -> AsyncIterator[str]:
    routes = [
        Route(f"/api/serving-node/{command}", backend.answer, methods=["POST"])
        for command in ("register", "heartbeat")
    ]
    config = uvicorn.Config(Starlette(routes=routes), port=port, log_level="error")
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def registered(url: str, interval_s: float = INTERVAL_S) -> AsyncIterator[Registration]:
    async with BackendClient(url) as client:
        registration = Registration(client, lambda: NODE, lambda: 3, interval_s)
        task = asyncio.create_task(registration.run())
        yield registration
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_it_registers_and_beats_as_the_existing_network_expects() -> None:
    backend = OldBackend()
    async with listening(backend, free_port()) as url, registered(url):
        await until(lambda: backend.count("heartbeat") >= 2)
    assert backend.heard[0][0] == "register"
    assert {
        "wallet_address": WALLET,
        "endpoint_url": "http://127.0.0.1:9",
        "available_lora_list": ["legal"],
    }.items() <= backend.heard[0][1].items()
    beat = backend.heard[1][1]
    assert (beat["wallet_address"], beat["status"], beat["current_load"]) == (WALLET, "active", 3)


async def test_beats_are_counted_by_what_came_of_them() -> None:
    backend, port = OldBackend(), free_port()
    async with registered(f"http://127.0.0.1:{port}") as registration:
        await until(lambda: registration.beats["unreachable"] > 0)
        assert registration.accepted_at is None
        async with listening(backend, port):
            await until(lambda: registration.beats["accepted"] >= 2)
            assert registration.accepted_at is not None
            backend.known = False
            await until(lambda: registration.beats["refused"] > 0)


async def test_a_backend_that_forgot_it_gets_a_registration() -> None:
    backend = OldBackend()
    async with listening(backend, free_port()) as url, registered(url):
        await until(lambda: backend.count("heartbeat") >= 1)
        backend.known = False
        await until(lambda: backend.count("register") == 2)


@pytest.mark.parametrize(
    "refuse",
    [None, (500, {}), (503, {"Retry-After": "300"}), (429, {"Retry-After": "3600"}), (403, {})],
)
async def test_a_partition_of_minutes_is_over_within_two_beats(
    monkeypatch: pytest.MonkeyPatch, refuse: tuple[int, dict[str, str]] | None
) -> None:
    """No pause between its tries is longer than a beat, whoever asks for one."""
    pauses = []

    async def rests(self: Registration, seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0.001)

    monkeypatch.setattr(Registration, "_rest", rests)
    backend, port = OldBackend(refuse=refuse), free_port()
    async with contextlib.AsyncExitStack() as until_end:
        if refuse:
            await until_end.enter_async_context(listening(backend, port))
        await until_end.enter_async_context(registered(f"http://127.0.0.1:{port}", interval_s=30))
        await until(lambda: len(pauses) >= 12)
        assert max(pauses) <= 30
        if refuse:
            backend.refuse = None
        else:
            await until_end.enter_async_context(listening(backend, port))
        await until(lambda: backend.known)


async def test_an_absent_backend_is_tried_again() -> None:
    backend, port = OldBackend(), free_port()
    async with registered(f"http://127.0.0.1:{port}"):
        await asyncio.sleep(0)
        async with listening(backend, port):
            await until(lambda: backend.known)


@pytest.mark.parametrize("how", ["a 500", "no answer"])
async def test_a_lost_beat_is_made_up_for_soon(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The network forgets a node after two intervals."""
    monkeypatch.setattr(heartbeat, "_FIRST_RETRY_S", 0.05)
    backend, port = OldBackend(), free_port()
    async with contextlib.AsyncExitStack() as until_end:
        async with listening(backend, port) as url:
            registration = await until_end.enter_async_context(registered(url, interval_s=3))
            await until(lambda: backend.known)
            if how == "a 500":
                backend.refuse = (500, {})
                await until(lambda: registration.beats["refused"] > 0)
                backend.refuse = None
        if how == "no answer":
            await until(lambda: registration.beats["unreachable"] > 0)
        began = time.monotonic()
        async with listening(backend, port):
            await until(lambda: registration.beats["accepted"] >= 2)
        assert time.monotonic() - began < 1.5


async def test_a_refusal_is_not_repeated_before_the_time_it_names() -> None:
    backend = OldBackend(refuse=(503, {"Retry-After": "3600"}))
    async with listening(backend, free_port()) as url, registered(url, interval_s=60):
        await until(lambda: backend.count("register") == 1)
        await asyncio.sleep(heartbeat._FIRST_RETRY_S + 0.5)
        assert backend.count("register") == 1


async def test_the_last_beat_says_offline_where_there_is_no_other_route() -> None:
    backend = OldBackend()
    async with listening(backend, free_port()) as url, registered(url) as registration:
        await until(lambda: backend.known)
        await registration.goodbye()
    assert backend.heard[-1][1]["status"] == "offline"


async def test_a_backend_without_a_list_is_an_error_with_its_address() -> None:
    async with listening(OldBackend(), free_port()) as url, BackendClient(url) as client:
        with pytest.raises(BackendRefused, match=url):
            await client.loras()


async def test_a_list_that_is_as_it_was_is_not_sent_again(tmp_path: Path) -> None:
    given = load({"database_url": f"sqlite:///{tmp_path}/b.sqlite3"})
    adapter = RegisterLora(name="legal", ipfs_hash=LEGAL_CID)
    async with serving(create_app(given)) as url, BackendClient(url) as client:
        empty = await client.listing()
        assert await client.listing(empty) is empty
        await client.register_lora(adapter)
        one = await client.listing(empty)
        assert [it.name for it in one.loras] == ["legal"]
        assert await client.listing(one) is one


@pytest.mark.parametrize(
    ("setting", "said"),
    [("required_node_version", "no requests"), ("latest_node_version", "is out")],
)
async def test_a_node_is_told_of_another_version(
    tmp_path: Path, setting: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    given = load({"database_url": f"sqlite:///{tmp_path}/b.sqlite3", "allow_private_nodes": True})
    newer = given.model_copy(update={setting: "99.1"})
    async with serving(create_app(newer)) as url, registered(url) as registration:
        await until(lambda: registration.beats["accepted"] >= 3)
        assert said in registration.upgrade
        assert "99.1" in registration.upgrade
        assert registration.outdated == (setting == "required_node_version")
    assert capfd.readouterr().err.count("make setup") == 1
    same = given.model_copy(update={setting: __version__})
    async with serving(create_app(same)) as url, registered(url) as registration:
        await until(lambda: registration.beats["accepted"] >= 2)
        assert registration.upgrade == ""
