"""How the text of an answer goes over the line."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl

from r3mes_vllm.bounded_http import bounded
from r3mes_vllm.node.chat import HeldAnswer
from r3mes_vllm.node.endings import Endings
from r3mes_vllm.node.limits import Limits
from r3mes_vllm.node.load import Load
from r3mes_vllm.settings import load
from tests.conftest import Network
from tests.programs import free_port, wait_until_async

PART = "é" * 2048
PARTS = 20_000
"""Of 4 KiB: more than the buffers of any socket."""


def chunks(raw: bytes) -> list[bytes]:
    """Of a body with `Transfer-Encoding: chunked`."""
    found = []
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        found.append(raw[:length])
        raw = raw[length + 2 :]
    return found


def test_each_chunk_is_text_by_itself(network: Network) -> None:
    host = httpx.URL(network.node.url)
    several = 0
    for number in range(8):
        asked = {"message": f"say {number}", "lora_name": "legal", "max_tokens": 200}
        body = json.dumps(asked).encode()
        with socket.create_connection((host.host, host.port or 0), timeout=60) as connection:
            connection.sendall(
                b"POST /chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        _, _, raw = answer.partition(b"\r\n\r\n")
        text = "".join(chunk.decode() for chunk in chunks(raw))
        several += len(text) < len(text.encode())
    assert several


class Endless:
    """An application that answers with all its parts, and counts those it made."""

    def __init__(self) -> None:
        self.made = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await HeldAnswer(self.parts, "text/plain; charset=utf-8")(scope, receive, send)

    async def parts(self, headers: MutableHeaders) -> AsyncGenerator[str, None]:
        for _ in range(PARTS):
            self.made += 1
            yield PART
            await asyncio.sleep(0)


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[int]:
    """As the node does, with the middlewares that see an answer."""
    given = load()
    config = uvicorn.Config(
        Limits(Endings(app), given, Load(1)),
        http=bounded(given.header_bytes, given.header_timeout),
        port=(port := free_port()),
        log_level="critical",
        lifespan="off",
        timeout_graceful_shutdown=0,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    await wait_until_async(lambda: server.started, 10, "the server")
    yield port
    server.should_exit = True
    await task


async def made_for_one_who_reads_nothing() -> int:
    """How many parts of an answer there are when no more come."""
    app = Endless()
    async with serving(app) as port:
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", port))
            reader.sendall(b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            await wait_until_async(lambda: app.made > 10, 10, "the answer to begin")
            before = -1
            while before < app.made < PARTS:
                before = app.made
                await asyncio.sleep(0.5)
            left = app.made
        await asyncio.sleep(0.5)
        assert app.made < left + 64  # nothing goes on for one who has gone
    return app.made


async def test_who_reads_nothing_is_waited_for() -> None:
    assert await made_for_one_who_reads_nothing() < PARTS / 4


async def test_without_flow_control_the_whole_answer_would_lie_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def at_once(self: FlowControl) -> None:
        return None

    monkeypatch.setattr(FlowControl, "drain", at_once)
    assert await made_for_one_who_reads_nothing() == PARTS
