"""What a node does first when it is told to end, and when it ends whatever runs."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import pytest
import uvicorn
from httpx import AsyncClient, RemoteProtocolError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.node.drain import Drain
from r3mes_vllm.node.endings import Endings
from r3mes_vllm.node.heartbeat import Registration
from r3mes_vllm.node.load import Load
from r3mes_vllm.node.restart import LINGER_S, Restart, end
from r3mes_vllm.wire import DRAINING, RegisterNode
from tests.backend.stand_ins import StandIn, answers, serving, wallet
from tests.programs import free_port, wait_until_async

LIMIT_S = 0.5


@dataclass
class Node:
    """Registered at `backend`, with one request that runs."""

    backend: StandIn
    load: Load
    server: uvicorn.Server
    draining: asyncio.Task[None]


@pytest.fixture
async def node(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Node]:
    monkeypatch.setattr(Restart, "ended", False)
    backend = StandIn(answers(200, {"success": True}))
    described = RegisterNode(
        wallet_address=wallet(1), endpoint_url="http://127.0.0.1:9", available_lora_list=["legal"]
    )
    async with serving(backend) as url, BackendClient(url) as client:
        load, server = Load(10), uvicorn.Server(uvicorn.Config(Starlette()))
        registration = Registration(client, lambda: described, lambda: load.running, 30)
        network = asyncio.create_task(registration.run())
        drain = Drain(load, request.param)
        drain.catch_signals()
        draining = asyncio.create_task(drain.run(server, registration, network))
        await wait_until_async(lambda: bool(registration.accepted_at), 10, "the registration")
        with load.counted():
            yield Node(backend, load, server, draining)
        draining.cancel()
        with suppress(asyncio.CancelledError):
            await draining


@pytest.mark.parametrize("node", [60.0], indirect=True)
async def test_the_first_thing_is_to_tell_the_backend(node: Node) -> None:
    told, began = len(node.backend.seen), time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    await wait_until_async(lambda: len(node.backend.seen) > told, 10, "the backend to hear of it")
    assert time.monotonic() - began < 1
    first = node.backend.seen[told]
    assert first.path == "/api/serving-node/heartbeat"
    assert json.loads(first.body)["status"] == DRAINING
    assert node.load.draining
    assert not node.server.should_exit


@pytest.mark.parametrize("node", [LIMIT_S], indirect=True)
async def test_what_never_ends_is_aborted_at_the_limit(node: Node) -> None:
    began = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(node.draining, 10)
    assert time.monotonic() - began >= LIMIT_S
    assert node.load.running
    assert node.server.should_exit
    assert node.server.config.timeout_graceful_shutdown == 0 < LINGER_S


async def endless(request: Request) -> Response:
    async def body() -> AsyncIterator[str]:
        yield 'data: {"choices": [{"text": "To be"}]}\n\n'
        await asyncio.Event().wait()

    return StreamingResponse(body(), media_type=f"text/{request.path_params['kind']}")


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("kind", ["plain", "event-stream"])
async def test_a_stream_that_is_aborted_ends_as_an_error(http: str, kind: str) -> None:
    app = Endings(Starlette(routes=[Route("/v1/{kind}", endless)]))
    config = uvicorn.Config(
        app, port=(port := free_port()), http=http, log_level="critical", lifespan="off"
    )
    server = uvicorn.Server(config)
    server.capture_signals = nullcontext  # type: ignore[assignment, method-assign]
    serving = asyncio.create_task(server.serve())
    await wait_until_async(lambda: server.started, 10, "the server")
    said, broken = "", False
    try:
        async with (
            AsyncClient() as client,
            client.stream("GET", f"http://127.0.0.1:{port}/v1/{kind}") as answer,
        ):
            async for part in answer.aiter_text():
                said += part
                end(server, linger_s=0)
    except RemoteProtocolError:
        broken = True
    await asyncio.wait_for(serving, 10)
    assert broken
    assert said.count("To be") == 1
    assert "[DONE]" not in said
    assert ("event: error\n" in said) == (kind == "event-stream")
