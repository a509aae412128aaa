"""The node's client against a backend that knows only the existing network's fields."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from r3mes_vllm.errors import BackendRefused
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.node.heartbeat import Registration
from r3mes_vllm.wire import RegisterNode
from tests.programs import free_port

WALLET = "remes1" + "a" * 38
NODE = RegisterNode(
    wallet_address=WALLET,
    endpoint_url="http://127.0.0.1:9",
    available_lora_list=["legal"],
    adapters={"legal": "bafy"},
)
INTERVAL_S = 0.2


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
async def registered(url: str) -> AsyncIterator[Registration]:
    async with BackendClient(url) as client:
        registration = Registration(client, lambda: NODE, lambda: 3, INTERVAL_S)
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


async def test_a_backend_that_forgot_it_gets_a_registration() -> None:
    backend = OldBackend()
    async with listening(backend, free_port()) as url, registered(url):
        await until(lambda: backend.count("heartbeat") >= 1)
        backend.known = False
        await until(lambda: backend.count("register") == 2)


async def test_an_absent_backend_is_tried_again() -> None:
    backend, port = OldBackend(), free_port()
    async with registered(f"http://127.0.0.1:{port}"):
        await asyncio.sleep(0)
        async with listening(backend, port):
            await until(lambda: backend.known)


async def test_a_refusal_is_not_repeated_before_the_time_it_names() -> None:
    backend = OldBackend(refuse=(429, {"Retry-After": "3600"}))
    async with listening(backend, free_port()) as url, registered(url):
        await until(lambda: backend.count("register") == 1)
        await asyncio.sleep(4 * INTERVAL_S)
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
