"""A client that reads nothing is let go of; with real connections and uvicorn."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from r3mes_vllm import unread
from r3mes_vllm.backend.server import listen
from r3mes_vllm.node.early import Early
from tests.programs import free_port, wait_until_async


def node_door() -> socket.socket:
    early = Early("127.0.0.1", free_port())
    early.end()
    door = early.socket_for(early.address)
    assert door
    return door


def backend_door() -> socket.socket:
    [door] = listen("127.0.0.1", free_port())
    return door


@asynccontextmanager
async def endless(door: socket.socket) -> AsyncIterator[dict[str, int]]:
    """Serves answers without an end; how many are at work."""
    seen = {"running": 0, "begun": 0}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen["running"] += 1
        seen["begun"] += 1

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        leaves = asyncio.create_task(left())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not leaves.done():
                part = {"type": "http.response.body", "body": b"x" * 9999, "more_body": True}
                await send(part)
                await asyncio.sleep(0)
        finally:
            leaves.cancel()
            seen["running"] -= 1

    config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[door]))
    yield seen
    server.should_exit = True
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("door", [node_door, backend_door])
async def test_a_client_that_reads_nothing_is_let_go_of(
    door: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unread, "LIMIT_MS", 1000)
    listening = door()
    async with endless(listening) as seen:
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, listening.getsockname())
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await wait_until_async(lambda: seen["begun"] == 1, 5, "the answer to begin")
            await wait_until_async(lambda: seen["running"] == 0, 10, "the answer to end")


async def test_one_that_reads_slowly_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "LIMIT_MS", 1000)
    listening = backend_door()
    async with endless(listening) as seen:
        reader, writer = await asyncio.open_connection(*listening.getsockname(), limit=4096)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        for _ in range(30):
            assert await reader.read(1 << 20)
            await asyncio.sleep(0.1)
        assert seen == {"running": 1, "begun": 1}
        writer.close()
