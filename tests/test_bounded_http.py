"""What a connection may send before its request is whole, and offer beside it, on a real server;
with uvicorn's own protocol beside it, which waits for ever and loses bodies."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from r3mes_vllm.bounded_http import bounded
from tests.programs import free_port

SECONDS, BYTES = 0.5, 4096
LINGERS = 1.2
"""Seconds in which a refused client may read why."""
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
"""As Java's HttpClient and `curl --http2` have it."""
WEBSOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
HEAD = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"


@dataclass
class Served:
    port: int
    server: uvicorn.Server

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def say(
        self, *parts: bytes, pause: float = 0, wait: float = 5, until: bytes | None = None
    ) -> bytes:
        """All that comes back until the connection ends, `until` comes, or for `wait` seconds."""
        reader, writer = await self.connect()
        hearing = asyncio.create_task(_hear(reader, until))
        for part in parts:
            if hearing.done():
                break
            with suppress(ConnectionError):
                writer.write(part)
                await writer.drain()
            await asyncio.sleep(pause)
        await asyncio.wait({hearing}, timeout=wait)
        writer.close()
        reader.feed_eof()
        return await hearing


async def _hear(reader: asyncio.StreamReader, until: bytes | None) -> bytes:
    said = b""
    with suppress(ConnectionError):
        while part := await reader.read(1 << 16):
            said += part
            if until is not None and until in said:
                break
    return said


@asynccontextmanager
async def served(*, protected: bool = True) -> AsyncIterator[Served]:
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    async def slow(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            for number in range(6):
                yield b"%d" % number
                await asyncio.sleep(SECONDS / 2)

        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/echo", echo, methods=["POST"]), Route("/slow", slow)])
    port = free_port()
    http = bounded(BYTES, SECONDS) if protected else HttpToolsProtocol
    config = uvicorn.Config(app, port=port, log_level="critical", lifespan="off", http=http)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield Served(port, server)
    finally:
        server.should_exit = server.force_exit = True
        await serving


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("head", [b"", b"P", HEAD, HEAD + b"X-A: b"])
async def test_a_head_that_never_ends_is_cut_off(head: bytes, protected: bool) -> None:
    async with served(protected=protected) as it:
        said = await it.say(head, wait=4 * SECONDS)
        assert said.startswith(b"HTTP/1.1 408 ") is protected
        assert (b'"headers_too_slow"' in said) is protected


async def test_one_that_trickles_is_cut_off_while_others_are_served() -> None:
    async with served() as it:
        trickle = asyncio.create_task(it.say(*(HEAD[i : i + 1] for i in range(40)), pause=0.05))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{it.port}") as client:
            while not trickle.done():
                assert (await client.post("/echo", content=b"hello")).text == "hello"
                await asyncio.sleep(0.02)
        assert (await trickle).startswith(b"HTTP/1.1 408 ")


async def test_the_next_request_on_a_connection_has_the_same_time() -> None:
    async with served() as it:
        said = await it.say(HEAD + b"\r\nhello", HEAD, pause=SECONDS / 4)
        first, _, second = said.partition(b"hello")
        assert first.startswith(b"HTTP/1.1 200 ")
        assert second.startswith(b"HTTP/1.1 408 ")


async def test_a_body_and_an_answer_may_take_longer() -> None:
    async with served() as it:
        body = await it.say(HEAD + b"\r\n", *(b"%d" % i for i in range(5)), pause=SECONDS / 2)
        assert body.endswith(b"01234")
        head = b"GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert (await it.say(head, wait=60)).endswith(b"5\r\n0\r\n\r\n")


async def test_a_late_second_head_does_not_get_into_the_first_answer() -> None:
    async with served() as it:
        said = await it.say(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /slow", pause=0.05)
        assert said.count(b"HTTP/1.1") == 1
        assert b"408" not in said


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize(
    "parts",
    [
        [HEAD + b"X-A: " + b"a" * BYTES + b"\r\n\r\nhello"],
        [HEAD, *[b"X-A: %s\r\n" % (b"a" * 100)] * 60, b"\r\nhello"],
        [b"GET /" + b"a" * BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
        [HEAD, b"X-A: ", *[b"a" * 1000] * 10],
    ],
    ids=["one field", "many fields", "a long path", "without an end"],
)
async def test_a_head_that_is_too_large_is_refused(parts: list[bytes], protected: bool) -> None:
    async with served(protected=protected) as it:
        said = await it.say(*parts, wait=SECONDS / 2)
        assert said.startswith(b"HTTP/1.1 431 ") is protected
        assert (b'"headers_too_large"' in said) is protected


async def test_a_head_up_to_the_limit_is_served() -> None:
    async with served() as it:
        room = BYTES - len(HEAD) - 20
        said = await it.say(HEAD + b"X-A: " + b"a" * room + b"\r\n\r\nhello", wait=SECONDS / 2)
        assert said.startswith(b"HTTP/1.1 200 ")


async def test_a_thousand_half_open_connections_are_served_beside_and_then_gone() -> None:
    async with served() as it:
        idle = [await it.connect() for _ in range(1000)]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{it.port}") as client:
            assert (await client.post("/echo", content=b"hello")).text == "hello"
        await asyncio.sleep(SECONDS + LINGERS)
        assert len(it.server.server_state.connections) <= 1
        for _, writer in idle:
            writer.close()


def answered(said: bytes) -> list[bytes]:
    """The bodies of what was answered with 200."""
    first, *answers = said.split(b"HTTP/1.1 200 OK\r\n")
    assert not first
    return [answer.partition(b"\r\n\r\n")[2] for answer in answers]


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("bytewise", [True, False])
@pytest.mark.parametrize(
    "head",
    [
        HEAD + OFFER,
        HEAD + b"uPGRADE:h2c\r\nConnection: keep-alive, \tupgrade\r\n",
        HEAD + OFFER + b"Upgrade: websocket\r\nUpgrade: TLS/1.2, h2c\r\n",
        HEAD + OFFER + b"Connection: keep-alive\r\nX-A:\r\nX-A: \xe9\r\n",
        HEAD + b"Upgrade: websocket\r\nConnection: upgrade\r\nConnection: keep-alive\r\n",
        HEAD.replace(b"1.1", b"1.0") + OFFER,
        HEAD + WEBSOCKET,
        HEAD.replace(b"/echo", b"http://x:80/echo?a=b") + OFFER,
    ],
)
async def test_a_request_that_offers_another_protocol_keeps_its_body(
    head: bytes, bytewise: bool, protected: bool
) -> None:
    async with served(protected=protected) as it:
        whole = head + b"\r\nhello"
        pieces = [bytes([byte]) for byte in whole] if bytewise else [whole]
        said = await it.say(*pieces, wait=5 if protected else 0.3, until=b"\r\n\r\nhello")
        assert (said.startswith(b"HTTP/1.1 200 ") and said.endswith(b"hello")) is protected


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
async def test_no_body_behind_an_offer_is_taken_for_a_request(
    chunked: bool, protected: bool
) -> None:
    inner = b"GET /slow HTTP/1.1\r\nHost: x\r\n" + OFFER + b"\r\n"
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(inner)
    body = b"%x\r\n%b\r\n0\r\nUpgrade: h2c\r\n\r\n" % (len(inner), inner) if chunked else inner
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\n%b\r\n%b\r\n" % (framing, OFFER)
    async with served(protected=protected) as it:
        for pieces in ([head + body], [head, body], [head[:-3], head[-3:] + body[:9], body[9:]]):
            said = await it.say(
                *pieces,
                HEAD + b"\r\nhello",
                pause=0.05,
                wait=5 if protected else 0.3,
                until=b"hello",
            )
            assert (answered(said) == [inner, b"hello"]) is protected


async def test_requests_follow_one_another_whatever_they_offer() -> None:
    requests = [HEAD + OFFER + b"\r\nfirst", HEAD + b"\r\nnext.", HEAD + OFFER + b"\r\nthird"]
    async with served() as it:
        for times, pieces in (
            (1, requests),
            (1, [b"".join(requests)]),
            (9, [b"".join(requests * 9)]),
        ):
            said = await it.say(*pieces, HEAD + OFFER + b"\r\nlast.", pause=0.05, until=b"last.")
            assert answered(said) == [b"first", b"next.", b"third"] * times + [b"last."]


@pytest.mark.parametrize(
    "head",
    [
        (HEAD + OFFER).replace(b"\r\n", b"\n") + b"\n",
        HEAD + b"Connection: Upgrade\r\nUpgrade:\r\n h2c\r\n\r\n",
        HEAD + OFFER + b"Transfer-Encoding: chunked\r\n\r\n",
        HEAD.replace(b"POST", b"CONNECT") + b"\r\n",
        HEAD.replace(b"POST", b"CONNECT") + OFFER + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=["line feeds", "folded", "two lengths", "CONNECT", "CONNECT with an offer", "HTTP/2"],
)
async def test_what_is_no_request_ends_the_connection(head: bytes) -> None:
    async with served() as it:
        said = await it.say(head, b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n", pause=0.05, wait=5)
        assert said.startswith(b"HTTP/1.1 400 ")
        assert said.count(b"HTTP/1.1") == 1


async def test_a_head_with_an_offer_has_the_same_bounds() -> None:
    async with served() as it:
        late = await it.say(HEAD + OFFER + b"\r\nhello", HEAD + OFFER, wait=4 * SECONDS)
        assert late.count(b"HTTP/1.1 200 ") == late.count(b"HTTP/1.1 408 ") == 1
        large = await it.say(HEAD + OFFER + b"X-A: " + b"a" * BYTES + b"\r\n\r\nhello")
        assert large.startswith(b"HTTP/1.1 431 ")


async def test_curl_that_offers_http_2_is_answered() -> None:
    async with served() as it:
        url = f"http://127.0.0.1:{it.port}/echo"
        asking = ["-sS", "--noproxy", "*", "-m", "10", "--http2", "-d", "hello", url, url]
        curl = await asyncio.create_subprocess_exec("curl", *asking, stdout=-1)
        said, _ = await curl.communicate()
        assert said == b"hellohello"
