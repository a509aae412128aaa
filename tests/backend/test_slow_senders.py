"""Who sends slowly, or stops, costs the others nothing, and the backend no more than it has."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from r3mes_vllm.backend import bodies
from r3mes_vllm.backend.bodies import Room
from r3mes_vllm.backend.database import database_url, open_engine
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.stand_ins import PATIENCE_S, Network, StandIn, unused_port, wallet
from tests.backend.test_server import program

HEAD = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
BEAT = {"wallet_address": wallet(1), "status": "active", "current_load": 0}


async def begun(url: str, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    where = httpx.URL(url)
    reader, writer = await asyncio.open_connection(where.host, where.port)
    writer.write(sent)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize(
    ("sent", "code"),
    [(b"", "headers_too_slow"), (HEAD, "headers_too_slow"), (HEAD + b"\r\n{", "too_slow")],
)
async def test_a_request_that_does_not_come_is_cut_off_while_others_are_served(
    tmp_path: Path, sent: bytes, code: str
) -> None:
    database = f"sqlite:///{tmp_path}/b.sqlite3"
    given = {"header_timeout": 0.5, "body_timeout": 0.5, "database_url": database}
    with program(backend_port=(port := unused_port()), **given) as process:
        assert process.stdout
        await asyncio.to_thread(process.stdout.readline)
        url = f"http://127.0.0.1:{port}"
        reader, writer = await begun(url, sent)
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            hearing = asyncio.create_task(reader.read())
            until = time.monotonic() + PATIENCE_S
            while not hearing.done() and time.monotonic() < until:
                assert (await http.get("/health")).is_success
                await asyncio.sleep(0.05)
        writer.close()
        assert hearing.done()
        said = await hearing
    assert said.startswith(b"HTTP/1.1 408 ")
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == code


async def test_a_head_without_an_end_is_refused(tmp_path: Path) -> None:
    with program(
        backend_port=(port := unused_port()), database_url=f"sqlite:///{tmp_path}/b.sqlite3"
    ) as process:
        assert process.stdout
        await asyncio.to_thread(process.stdout.readline)
        reader, writer = await begun(f"http://127.0.0.1:{port}", HEAD)
        hearing = asyncio.create_task(reader.read())
        for _ in range(300):
            if hearing.done():
                break
            writer.write(b"X-More: " + b"x" * 8000 + b"\r\n")
            await asyncio.sleep(0.01)
        writer.close()
        assert hearing.done()
        assert (await hearing).startswith(b"HTTP/1.1 431 ")


async def test_bodies_that_stop_in_the_middle_fill_no_more_than_their_room(
    network: Network,
) -> None:
    assert network.app
    room = network.app.state.room = Room(left=3 * bodies._SMALL)
    half = HEAD + b"\r\n" + b"x" * 2 * bodies._SMALL
    async with AsyncExitStack() as until_end:
        for _ in range(3):
            _, writer = await begun(network.url, half)
            until_end.callback(writer.close)
        async with asyncio.timeout(PATIENCE_S):
            while room.left:
                await asyncio.sleep(0.01)
        reader, writer = await begun(network.url, half)
        until_end.callback(writer.close)
        refused = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in refused.lower()
        assert b'"busy"' in refused
        beat = await network.http.post("/api/serving-node/heartbeat", json=BEAT)
        assert beat.status_code == 404  # read, and understood
    async with asyncio.timeout(PATIENCE_S):
        while room.left < 3 * bodies._SMALL:
            await asyncio.sleep(0.01)


def lists() -> int:
    """Empty ones, in this process."""
    return sum(type(it) is list and not it for it in gc.get_objects())


@pytest.mark.parametrize("path", ["/chat", "/v1/completions"])
async def test_a_body_that_is_being_answered_has_its_room_and_takes_no_more(
    start_backend: StartBackend, start_node: StartNode, path: str
) -> None:
    network = await start_backend(fallback_url="http://127.0.0.1:9")
    began, goes_on = asyncio.Event(), asyncio.Event()

    async def waits(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"hel"
            began.set()
            await goes_on.wait()
            yield b"lo"

        return StreamingResponse(body(), media_type="text/plain")

    await network.register(await start_node(StandIn(waits)), "legal")
    assert network.app
    room = network.app.state.room
    left, before = room.left, lists()
    sent = b'{"message":"hi","model":"legal","x":[' + 99_999 * b"[]," + b"[]]}"
    asking = asyncio.create_task(network.http.post(path, content=sent))
    await asyncio.wait_for(began.wait(), PATIENCE_S)
    assert lists() - before < 1000
    assert room.left == left - (len(sent) - bodies._SMALL)
    goes_on.set()
    assert (await asking).text == "hello"
    async with asyncio.timeout(PATIENCE_S):
        while room.left < left:
            await asyncio.sleep(0.01)


async def test_what_is_acknowledged_is_on_the_disk(tmp_path: Path) -> None:
    engine = open_engine(database_url(f"sqlite:///{tmp_path}/b.sqlite3"))
    async with engine.connect() as connection:
        found = await connection.execute(text("PRAGMA synchronous"))
        assert found.scalar_one() == 2  # FULL, https://sqlite.org/pragma.html#pragma_synchronous
    await engine.dispose()
