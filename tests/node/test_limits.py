"""What a request may send, on a real server; each limit from both sides."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from r3mes_vllm.node.limits import Limits
from r3mes_vllm.node.load import Load
from r3mes_vllm.settings import load
from tests.programs import free_port

MOST = 1 << 20


@asynccontextmanager
async def limited(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A server that says how many bytes came, on `/wait` after half a second."""

    async def length(request: Request) -> PlainTextResponse:
        size = len(await request.body())
        if request.url.path == "/v1/wait":
            await asyncio.sleep(0.5)
        return PlainTextResponse(str(size))

    routes = [Route(path, length, methods=["GET", "POST"]) for path in ("/chat", "/v1/wait", "/x")]
    given = load({"body_bytes": MOST, **settings})
    app = Limits(Starlette(routes=routes), given, Load(given.requests_at_once))
    config = uvicorn.Config(app, port=(port := free_port()), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client
    server.should_exit = True
    await serving


async def chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 65536):
        yield bytes(65536)
    yield bytes(size % 65536)


@pytest.mark.parametrize("path", ["/chat", "/v1/wait", "/x"])
async def test_a_body_up_to_the_limit_comes_whole_and_one_over_it_not(path: str) -> None:
    async with limited() as client:
        for size in (0, 1, MOST):
            assert (await client.post(path, content=bytes(size))).text == str(size)
            assert (await client.post(path, content=chunks(size))).text == str(size)
        for content in (bytes(MOST + 1), chunks(MOST + 1), chunks(9 * MOST)):
            answer = await client.post(path, content=content)
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                413,
                "content_too_large",
            )


@pytest.mark.parametrize("path", ["/chat", "/v1/wait", "/x"])
async def test_a_body_that_is_packed_is_refused_by_its_header(path: str) -> None:
    async with limited() as client:
        for encoding in ("gzip", "br, identity", "IDENTITY, zstd"):
            packed = await client.post(path, content=b"x", headers={"Content-Encoding": encoding})
            assert (packed.status_code, packed.headers["accept-encoding"]) == (415, "identity")
            assert "Content-Encoding" in packed.json()["error"]["message"]
        for encoding in ("", "identity", "Identity"):
            plain = await client.post(path, content=b"x", headers={"Content-Encoding": encoding})
            assert plain.text == "1"


async def test_one_that_asks_first_is_told_before_it_sends() -> None:
    async with limited() as client:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(
            b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert (await asyncio.wait_for(reader.readline(), 1)).startswith(b"HTTP/1.1 413")
        writer.close()


async def test_a_slow_sender_is_cut_off_while_others_are_served() -> None:
    async with limited(body_timeout=0.5) as client:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        for _ in range(4):
            writer.write(b"x")
            await asyncio.sleep(0.05)
            assert (await client.post("/chat", content=b"abc")).text == "3"
        answer = await asyncio.wait_for(reader.read(), 2)
        assert answer.startswith(b"HTTP/1.1 408")
        writer.close()


async def test_more_than_may_be_at_work_are_shed_and_the_others_not_harmed() -> None:
    async with limited(requests_at_once=3) as client:
        answers = await asyncio.gather(*(client.post("/v1/wait", content=b"1") for _ in range(5)))
        assert sorted(it.status_code for it in answers) == [200] * 3 + [503] * 2
        (shed, *_) = (it for it in answers if it.status_code == 503)
        assert shed.headers["retry-after"] == "1"
        assert shed.json()["error"]["type"] == "server_error"
        assert (await client.post("/v1/wait")).status_code == 200
        waiting = [asyncio.create_task(client.post("/v1/wait")) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert (await client.post("/x")).status_code == 200
        await asyncio.gather(*waiting)


async def test_one_that_goes_away_makes_room() -> None:
    async with limited(requests_at_once=1) as client:
        _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")
        await asyncio.sleep(0.1)
        assert (await client.post("/chat")).status_code == 503
        writer.close()
        await asyncio.sleep(0.1)
        assert (await client.post("/chat")).status_code == 200
