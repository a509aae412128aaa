"""Real servers on loopback ports: the backend under test, and nodes that behave as told."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from r3mes_vllm.backend.server import listen

PATIENCE_S = 10.0
"""How long a test waits for a condition before it fails."""

STOPS_S = 1.0
"""How long a stopped server lets its answers finish."""

LEGAL_CID = "bafybeie5nqv6kd3qnfjupgvz34woh3oksc3iau6abmyajn7qvtf47mlsz4"
LEGAL_CID_V0 = "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWKPBdG"
OTHER_CID = "bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi"


class _Quiet(uvicorn.Server):
    """Leaves the process's signals alone, and stops at once instead of at the next tick."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stop = asyncio.Event()

    async def main_loop(self) -> None:
        await self.stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        deadline = time.monotonic() + STOPS_S
        while self.server_state.tasks and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        for task in self.server_state.tasks:
            task.cancel()
        await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, port: int = 0) -> AsyncIterator[str]:
    """Serve `app` with uvicorn; gives its URL."""
    (listening,) = listen("127.0.0.1", port)
    config = uvicorn.Config(app, log_level="critical", access_log=False)
    server = _Quiet(config)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise RuntimeError("the server did not start")
            await asyncio.sleep(0.001)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.stop.set()
        await task
        listening.close()


@dataclass
class Clock:
    """Stands still until it is moved."""

    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@dataclass
class Seen:
    """A request as a node got it."""

    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: str) -> list[str]:
        return [value.decode() for key, value in self.headers if key == name.encode()]


Behaviour = Callable[[Request], Awaitable[Response]]


async def says_hello(request: Request) -> Response:
    return Response("hello", media_type="text/plain; charset=utf-8")


@dataclass
class StandIn:
    """A node: notes every request, then does what `behaviour` says."""

    behaviour: Behaviour = says_hello
    seen: list[Seen] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive, send)
        body = await request.body()
        self.seen.append(Seen(scope["path"], list(scope["headers"]), body))
        response = await self.behaviour(request)
        await response(scope, receive, send)


class DiesAfter(Response):
    """Sends `pieces`, then ends the connection with the body unfinished."""

    def __init__(self, *pieces: bytes, headers: dict[str, str] | None = None) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers.update(headers or {"content-type": "text/plain; charset=utf-8"})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})


def answers(status: int, body: dict[str, object], **headers: str) -> Behaviour:
    async def behaviour(request: Request) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return JSONResponse(body, status, named)

    return behaviour


def streams(*pieces: bytes, media_type: str = "text/plain; charset=utf-8") -> Behaviour:
    async def behaviour(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

        return StreamingResponse(body(), media_type=media_type)

    return behaviour


def wallet(number: int) -> str:
    return f"remes1{number:038d}"


@dataclass
class Network:
    """The backend under test, with an HTTP client for it and the clock it goes by."""

    url: str
    http: httpx.AsyncClient
    clock: Clock
    app: FastAPI | None = None

    async def register(
        self, endpoint: str, *names: str, number: int = 1, **additive: Any
    ) -> dict[str, Any]:
        """Register node `number` at `endpoint`, holding the adapters `names`."""
        answer = await self.http.post(
            "/api/serving-node/register",
            json={
                "wallet_address": wallet(number),
                "endpoint_url": endpoint,
                "available_lora_list": list(names),
                **additive,
            },
        )
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def register_lora(self, name: str, cid: str = LEGAL_CID, **more: Any) -> dict[str, Any]:
        answer = await self.http.post(
            "/api/lora/register", json={"name": name, "ipfs_hash": cid, **more}
        )
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def beat(self, number: int = 1, **changed: Any) -> httpx.Response:
        beat = {"wallet_address": wallet(number), "status": "active", "current_load": 0}
        return await self.http.post("/api/serving-node/heartbeat", json=beat | changed)

    async def wallets(self, **query: Any) -> list[str]:
        """The wallets that the node list gives."""
        body = (await self.http.get("/api/serving-node/list", params=query)).json()
        assert body["count"] == len(body["nodes"])
        return [node["wallet_address"] for node in body["nodes"]]


@contextlib.contextmanager
def untouched() -> Iterator[int]:
    """A port on loopback; raises AssertionError at its end if anybody connected, said he something
    or not."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]
        listening.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            _, where = listening.accept()
            raise AssertionError(f"{where} connected")


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port
