"""What a node does first when it is told to end, and when it ends whatever runs."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import uvicorn
from httpx import AsyncClient, RemoteProtocolError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from r3mes_vllm.backend.app import create_app
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.node.drain import Drain
from r3mes_vllm.node.endings import Endings
from r3mes_vllm.node.heartbeat import Registration
from r3mes_vllm.node.load import Load
from r3mes_vllm.node.restart import LINGER_S, Restart, end
from r3mes_vllm.settings import load as load_settings
from r3mes_vllm.wire import DRAINING, RegisterNode
from tests.backend.stand_ins import StandIn, answers, serving, wallet
from tests.programs import free_port, wait_until_async

NODE = RegisterNode(
    wallet_address=wallet(1), endpoint_url="http://127.0.0.1:9", available_lora_list=["legal"]
)
PROMISED_S = 1.0
"""From the signal until no request comes any more."""
LIMIT_S = 0.5


@dataclass
class Node:
    """Registered at the backend at `url`, with one request that runs."""

    url: str
    load: Load
    server: uvicorn.Server
    draining: asyncio.Task[None]


@asynccontextmanager
async def registered(backend: ASGIApp, limit_s: float) -> AsyncIterator[Node]:
    async with serving(backend) as url, BackendClient(url) as client:
        load, server = Load(10), uvicorn.Server(uvicorn.Config(Starlette()))
        registration = Registration(client, lambda: NODE, lambda: load.running, 30)
        network = asyncio.create_task(registration.run())
        drain = Drain(load, limit_s)
        drain.catch_signals()
        draining = asyncio.create_task(drain.run(server, registration, network))
        await wait_until_async(lambda: bool(registration.accepted_at), 10, "the registration")
        with load.counted():
            yield Node(url, load, server, draining)
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)


@pytest.fixture(autouse=True)
def _no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Restart, "ended", False)


def sigterm() -> float:
    os.kill(os.getpid(), signal.SIGTERM)
    return time.monotonic()


async def test_the_first_thing_is_to_tell_the_backend() -> None:
    backend = StandIn(answers(200, {"success": True}))
    async with registered(backend, 60) as node:
        told = len(backend.seen)
        sigterm()
        await wait_until_async(lambda: len(backend.seen) > told, 10, "the backend to hear of it")
        assert backend.seen[told].path == "/api/serving-node/heartbeat"
        assert json.loads(backend.seen[told].body)["status"] == DRAINING
        assert node.load.draining
        assert not node.server.should_exit


async def test_no_request_is_routed_to_it_after_a_second(tmp_path: Path) -> None:
    given = {"database_url": f"sqlite:///{tmp_path / 'backend.sqlite3'}"}
    backend = create_app(load_settings(given | {"allow_private_nodes": True}))
    async with registered(backend, 60) as node, AsyncClient(base_url=node.url) as client:
        listed = partial(client.get, "/api/serving-node/list", params={"lora": "legal"})
        assert (await listed()).json()["count"] == 1
        began = sigterm()
        while (await listed()).json()["count"]:
            assert time.monotonic() - began < PROMISED_S
        assert time.monotonic() - began < PROMISED_S
        assert node.load.running
        assert not node.server.should_exit


async def test_what_never_ends_is_aborted_at_the_limit() -> None:
    async with registered(StandIn(answers(200, {"success": True})), LIMIT_S) as node:
        began = sigterm()
        await asyncio.wait_for(node.draining, 10)
        assert time.monotonic() - began >= LIMIT_S
        assert node.load.running
        assert node.server.should_exit
        assert node.server.config.timeout_graceful_shutdown == 0 < LINGER_S


async def endless(request: Request) -> Response:
    async def body() -> AsyncIterator[str]:
        yield 'data: {"choices": [{"text": "To be"}]}\n\n'
        await asyncio.Event().wait()

    if (kind := request.path_params["kind"]) == "whole":
        await asyncio.Event().wait()
    return StreamingResponse(body(), media_type=f"text/{kind}")


@asynccontextmanager
async def ending(http: str) -> AsyncIterator[tuple[uvicorn.Server, AsyncClient]]:
    """A server that has ended when the context does, without waiting for what runs."""
    app = Endings(Starlette(routes=[Route("/v1/{kind}", endless)]))
    config = uvicorn.Config(
        app, port=(port := free_port()), http=http, log_level="critical", lifespan="off"
    )
    server = uvicorn.Server(config)
    server.capture_signals = nullcontext  # type: ignore[assignment, method-assign]
    serving = asyncio.create_task(server.serve())
    await wait_until_async(lambda: server.started, 10, "the server")
    async with AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        yield server, client
    await asyncio.wait_for(serving, 10)


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("kind", ["plain", "event-stream"])
async def test_a_stream_that_is_aborted_ends_as_an_error(http: str, kind: str) -> None:
    said, broken = "", False
    async with ending(http) as (server, client):
        try:
            async with client.stream("GET", f"/v1/{kind}") as answer:
                async for part in answer.aiter_text():
                    said += part
                    end(server, linger_s=0)
        except RemoteProtocolError:
            broken = True
    assert broken
    assert said.count("To be") == 1
    assert "[DONE]" not in said
    assert ("event: error\n" in said) == (kind == "event-stream")


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_an_answer_that_has_not_begun_is_refused(http: str) -> None:
    async with ending(http) as (server, client):
        asked = asyncio.create_task(client.get("/v1/whole"))
        await wait_until_async(lambda: bool(server.server_state.tasks), 10, "the request")
        end(server, linger_s=0)
        answer = await asked
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
