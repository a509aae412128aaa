"""Bytes go through as they come, and an answer that is cut off is seen to be cut off."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from r3mes_vllm.backend.balancer import State
from r3mes_vllm.backend.dial import Timeouts
from r3mes_vllm.carry import FRAMES, HEADER, Frame, Step
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.stand_ins import (
    PATIENCE_S,
    Behaviour,
    DiesAfter,
    Network,
    StandIn,
    says_hello,
    streams,
    unused_port,
    wallet,
)

ASK = {"message": "hi", "lora_name": "legal"}
RAW_BODY = json.dumps(ASK).encode()
RAW_ASK = (
    b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(RAW_BODY), RAW_BODY)
)


class StepByStep(StandIn):
    """Sends one piece each time it is let, and notes when the backend hangs up."""

    def __init__(self, *pieces: bytes) -> None:
        super().__init__(self._stream)
        self.pieces = pieces
        self.asked, self.may_go_on, self.left = (
            asyncio.Event(),
            asyncio.Semaphore(0),
            asyncio.Event(),
        )

    async def _stream(self, request: Request) -> Response:
        self.asked.set()
        if not self.pieces:
            await self._until_left(request)
            return Response()

        async def body() -> AsyncIterator[bytes]:
            try:
                for piece in self.pieces:
                    yield piece
                    await self.may_go_on.acquire()
            except asyncio.CancelledError:
                self.left.set()
                raise

        return StreamingResponse(body(), media_type="text/plain; charset=utf-8")

    async def _until_left(self, request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.005)
        self.left.set()


@contextlib.asynccontextmanager
async def raw(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare TCP connection to the backend."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_each_piece_arrives_before_the_node_sends_the_next(
    network: Network, start_node: StartNode
) -> None:
    node = StepByStep(b"one ", b"two ", b"three")
    await network.register(await start_node(node), "legal")
    async with network.http.stream("POST", "/chat", json=ASK) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        pieces = answer.aiter_raw()
        for expected in node.pieces:
            # The node waits: had anything on the way kept this piece back, this would time out.
            assert await asyncio.wait_for(anext(pieces), PATIENCE_S) == expected
            node.may_go_on.release()
        assert await anext(pieces, None) is None


async def test_the_status_is_held_back_until_the_node_begins(
    network: Network, start_node: StartNode
) -> None:
    begin = asyncio.Event()

    async def later(request: Request) -> Response:
        await begin.wait()
        return Response("late", 429)

    node = StandIn(later)
    await network.register(await start_node(node), "legal")
    async with raw(network.url) as (reader, writer):
        writer.write(RAW_ASK)
        while not node.seen:
            await asyncio.sleep(0.001)
        early = asyncio.create_task(reader.readuntil(b"\r\n"))
        # A whole other request fits in between, and this one still has no status.
        assert (await network.http.get("/health")).status_code == 200
        assert not early.done()
        begin.set()
        assert await asyncio.wait_for(early, PATIENCE_S) == b"HTTP/1.1 429 Too Many Requests\r\n"


async def test_a_client_that_leaves_mid_stream_ends_the_nodes_stream(
    network: Network, start_node: StartNode
) -> None:
    node = StepByStep(b"one ", b"two ")
    await network.register(await start_node(node), "legal")
    async with raw(network.url) as (reader, writer):
        writer.write(RAW_ASK)
        await asyncio.wait_for(reader.readuntil(b"one "), PATIENCE_S)
        assert not node.left.is_set()
    await asyncio.wait_for(node.left.wait(), PATIENCE_S)


async def test_a_client_that_leaves_before_the_first_byte_ends_the_nodes_work(
    network: Network, start_node: StartNode
) -> None:
    node = StepByStep()
    await network.register(await start_node(node), "legal")
    async with raw(network.url) as (_, writer):
        writer.write(RAW_ASK)
        await asyncio.wait_for(node.asked.wait(), PATIENCE_S)
        assert not node.left.is_set()
    await asyncio.wait_for(node.left.wait(), PATIENCE_S)


async def test_a_stream_that_breaks_is_an_error_for_httpx(
    network: Network, start_node: StartNode
) -> None:
    async def dies(request: Request) -> Response:
        return DiesAfter(b"half of ")

    await network.register(await start_node(StandIn(dies)), "legal")
    async with network.http.stream("POST", "/chat", json=ASK) as answer:
        assert answer.status_code == 200
        pieces = answer.aiter_raw()
        assert await anext(pieces) == b"half of "
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(pieces)
    metrics = (await network.http.get("/metrics")).text
    assert "r3mes_backend_broken_streams_total 1.0" in metrics


@pytest.mark.parametrize("complete", [True, False])
async def test_a_stream_that_breaks_never_gets_its_terminating_chunk(
    network: Network, start_node: StartNode, complete: bool
) -> None:
    async def dies(request: Request) -> Response:
        return DiesAfter(b"half of ")

    whole = streams(b"half of ")
    await network.register(await start_node(StandIn(whole if complete else dies)), "legal")
    async with raw(network.url) as (reader, writer):
        writer.write(RAW_ASK.replace(b"Host: x", b"Host: x\r\nConnection: close"))
        sent = await asyncio.wait_for(reader.read(), PATIENCE_S)
    assert b"8\r\nhalf of \r\n" in sent
    # The twin shows what is looked for: a whole stream does end with it.
    assert sent.endswith(b"\r\n0\r\n\r\n") is complete


async def test_a_body_shorter_than_its_length_is_an_error_for_the_client(
    network: Network, start_node: StartNode
) -> None:
    async def short(request: Request) -> Response:
        return DiesAfter(b'{"res', headers={"content-length": "100"})

    await network.register(await start_node(StandIn(short)), "legal")
    with pytest.raises(httpx.RemoteProtocolError):
        await network.http.post("/chat", json=ASK)


async def test_a_node_that_falls_silent_is_given_up(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    network = await start_backend(timeouts=Timeouts(between_bytes=0.05))
    node = StepByStep(b"one ", b"never")
    await network.register(await start_node(node), "legal")
    with pytest.raises(httpx.RemoteProtocolError):
        await network.http.post("/chat", json=ASK)
    await asyncio.wait_for(node.left.wait(), PATIENCE_S)


async def test_a_node_that_never_begins_is_given_up(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    network = await start_backend(timeouts=Timeouts(first_byte=0.05))
    node = StepByStep()
    await network.register(await start_node(node), "legal")
    answer = await network.http.post("/chat", json=ASK)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "node_timed_out"
    await asyncio.wait_for(node.left.wait(), PATIENCE_S)


async def ejected_s(network: Network, number: int = 1) -> float | None:
    """For how long that node is asked last."""
    return (await state_of(network, number)).ejected_s


async def state_of(network: Network, number: int = 1) -> State:
    assert network.app
    backend = network.app.state.backend
    [node] = [it for it in await backend.live_nodes() if it.wallet_address == wallet(number)]
    state: State = backend.balancer.state(node)
    return state


@pytest.mark.parametrize("begun", [False, True], ids=["nothing", "headers"])
async def test_a_node_that_never_begins_is_passed_over_and_then_left_alone(
    start_backend: StartBackend, start_node: StartNode, begun: bool
) -> None:
    """That takes no dial for it, and its beats go on."""
    left = 0

    async def hangs(request: Request) -> Response:
        return Hangs()

    class Hangs(Response):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal left
            if begun:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            while (await receive())["type"] != "http.disconnect":
                pass
            left += 1

    hanging = StandIn(hangs)
    network = await start_backend(timeouts=Timeouts(first_byte=1))
    await network.register(await start_node(hanging), "legal")
    await network.register(await start_node(StandIn()), "legal", number=2)
    for number in range(200):
        answer = await network.http.post("/chat", json=ASK | {"message": f"question {number}"})
        assert (answer.status_code, answer.text) == (200, "hello")
        if await ejected_s(network):
            break
    assert len(hanging.seen) == 3
    async with asyncio.timeout(PATIENCE_S):  # nothing goes on there that nobody waits for
        while left < 3:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("soon", [True, False])
async def test_a_client_that_leaves_tells_of_the_node_only_after_a_long_silence(
    start_backend: StartBackend, start_node: StartNode, streams: bool, soon: bool
) -> None:
    limit = 100 if soon else 0.5
    network = await start_backend(timeouts=Timeouts(first_byte=limit, answer=limit))
    node = StepByStep()
    await network.register(await start_node(node), "legal")

    async def ask_and_leave() -> None:
        with contextlib.suppress(httpx.ReadTimeout):
            patience = 0.1 if soon else 0.3
            await network.http.post("/chat", json=ASK | {"stream": streams}, timeout=patience)

    await asyncio.gather(*(ask_and_leave() for _ in range(3)))
    await asyncio.wait_for(node.left.wait(), PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):
        while (await state_of(network)).in_flight:
            await asyncio.sleep(0.001)
    assert (await ejected_s(network) is None) == soon


async def test_a_whole_answer_that_takes_long_is_asked_for_once(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    async def takes_long(request: Request) -> Response:
        await asyncio.sleep(0.2)
        return await says_hello(request)

    network = await start_backend(timeouts=Timeouts(first_byte=0.05))
    nodes = [StandIn(takes_long), StandIn(takes_long)]
    for number, node in enumerate(nodes):
        await network.register(await start_node(node), "legal", number=number)
    answer = await network.http.post("/chat", json=ASK | {"stream": False})
    assert answer.text == "hello"
    assert sum(len(node.seen) for node in nodes) == 1


async def test_a_whole_answer_that_does_not_come_is_the_nodes_failure(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    network = await start_backend(timeouts=Timeouts(answer=0.05))
    await network.register(await start_node(StepByStep()), "legal")
    for _ in range(3):
        assert await ejected_s(network) is None
        answer = await network.http.post("/chat", json=ASK | {"stream": False})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "node_timed_out")
    assert await ejected_s(network)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/chat", ASK),
        ("/v1/chat/completions", {"model": "legal", "messages": []}),
        ("/v1/embeddings", {"model": "legal", "input": "hi"}),
    ],
)
@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_whole_answer_has_a_limit_of_its_own(
    start_backend: StartBackend,
    start_node: StartNode,
    path: str,
    asked: dict[str, object],
    is_whole: bool,
) -> None:
    """Its first byte comes when all of it is made."""

    async def takes_long(request: Request) -> Response:
        await asyncio.sleep(0.2)
        return await says_hello(request)

    short, long = ("first_byte_timeout", "answer_timeout")[:: 1 if is_whole else -1]
    settings: dict[str, Any] = {short: 0.05, long: PATIENCE_S}
    network = await start_backend(**settings)
    await network.register(await start_node(StandIn(takes_long)), "legal")
    whole = await network.http.post(path, json=asked | {"stream": False})
    assert whole.status_code == (200 if is_whole else 504)
    if path != "/v1/embeddings":
        stream = await network.http.post(path, json=asked | {"stream": True})
        assert stream.status_code == (504 if is_whole else 200)


async def test_a_client_that_does_not_read_is_given_up(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    network = await start_backend(timeouts=Timeouts(between_bytes=0.2))
    left = asyncio.Event()

    async def flood(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 65536
                    await asyncio.sleep(0)  # uvicorn's send does not yield once nobody listens
            finally:
                left.set()

        return StreamingResponse(body())

    await network.register(await start_node(StandIn(flood)), "legal")
    async with raw(network.url) as (_, writer):
        writer.write(RAW_ASK)
        await asyncio.wait_for(left.wait(), PATIENCE_S)


async def test_nothing_is_compressed_and_no_credential_reaches_the_node(
    network: Network, start_node: StartNode
) -> None:
    node = StandIn()
    await network.register(await start_node(node), "legal")
    sent = {
        "Accept-Encoding": "gzip, br",
        "Authorization": "Bearer secret",
        "X-API-Key": "secret",
        "Cookie": "session=secret",
        "Connection": "keep-alive, X-Private",
        "X-Private": "secret",
        "Proxy-Authorization": "secret",
        "TE": "trailers",
        "Upgrade": "h2c",
        "X-Forwarded-For": "10.0.0.1",
    }
    await network.http.post("/chat", json=ASK, headers=sent)
    seen = node.seen[0]
    assert seen.header("accept-encoding") == ["identity"]
    assert b"secret" not in b" ".join(value for _, value in seen.headers)
    for name in ("connection", "te", "upgrade", "x-forwarded-for", "transfer-encoding"):
        assert not seen.header(name)


async def test_what_a_node_says_about_the_connection_or_the_origin_stays_behind(
    network: Network, start_node: StartNode
) -> None:
    async def chatty(request: Request) -> Response:
        headers = {
            "Set-Cookie": "a=b",
            "Keep-Alive": "timeout=9",
            "Proxy-Authenticate": "Basic",
            "Access-Control-Allow-Origin": "*",
            "Strict-Transport-Security": "max-age=1",
            "X-R3MES-Adapter": "legal",
            "X-R3MES-Node": "remes1somebodyelse",
        }
        return Response("<script>", headers=headers, media_type="text/html")

    await network.register(await start_node(StandIn(chatty)), "legal")
    answer = await network.http.post("/chat", json=ASK)
    gone = {"set-cookie", "keep-alive", "proxy-authenticate", "strict-transport-security"}
    assert not (gone | {"access-control-allow-origin"}) & set(answer.headers)
    assert answer.headers["x-r3mes-adapter"] == "legal"
    assert answer.headers.get_list("x-r3mes-node") == [wallet(1)]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]


class Bare(Response):
    """Sends `head` and `body` as they are, which uvicorn would not."""

    def __init__(self, head: bytes, body: bytes = b"") -> None:
        super().__init__()
        self._sent = b"HTTP/1.1 %b\r\nConnection: close\r\n\r\n%b" % (head, body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport = send.__self__.transport  # type: ignore[attr-defined]
        transport.write(self._sent)
        transport.close()


@pytest.mark.parametrize("header", [b"X-R3MES-CID: a\x01b", b"Content-Type: text/plain\x7f"])
async def test_a_header_that_can_not_be_sent_is_the_nodes_failure(
    network: Network, start_node: StartNode, header: bytes
) -> None:
    async def bad(request: Request) -> Response:
        return Bare(b"200 OK\r\nContent-Length: 5\r\n" + header, b"hello")

    await fails_and_is_passed_over(network, start_node, StandIn(bad))


async def fails_and_is_passed_over(
    network: Network, start_node: StartNode, bad_one: StandIn
) -> None:
    await network.register(await start_node(bad_one), "legal", number=1)
    answer = await network.http.post("/chat", json=ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "node_failed")
    await network.register(await start_node(StandIn()), "legal", number=2)
    # at once: one after the other all go to whichever of the two seems a little faster
    asking = [network.http.post("/chat", json=ASK | {"message": f"{n}"}) for n in range(24)]
    assert [it.text for it in await asyncio.gather(*asking)] == ["hello"] * 24
    assert len(bad_one.seen) > 1


async def nothing(request: Request) -> Response:
    return Response(media_type="text/plain")


async def no_content(request: Request) -> Response:
    return Bare(b"204 No Content\r\nContent-Length: 5")


async def no_frame(request: Request) -> Response:
    return Response(media_type="text/plain", headers={HEADER: FRAMES})


async def frames_of_nothing(request: Request) -> Response:
    frames = Frame([Step([0], "stop")], b"").pack()
    return Response(frames, media_type="text/plain", headers={HEADER: FRAMES})


@pytest.mark.parametrize("behaviour", [nothing, no_content, no_frame, frames_of_nothing])
async def test_an_answer_with_nothing_in_it_is_none(
    network: Network, start_node: StartNode, behaviour: Behaviour
) -> None:
    await fails_and_is_passed_over(network, start_node, StandIn(behaviour))


@pytest.mark.parametrize("kind", [b"application/json", b"text/plain"])
async def test_of_two_lengths_the_chunks_count(
    network: Network, start_node: StartNode, kind: bytes
) -> None:
    async def both(request: Request) -> Response:
        head = b"200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\nContent-Type: " + kind
        return Bare(head, b"5\r\nhello\r\n0\r\n\r\n")

    await network.register(await start_node(StandIn(both)), "legal")
    answer = await network.http.post("/chat", json=ASK)
    assert (answer.status_code, answer.text) == (200, "hello")


async def test_the_request_id_goes_through_or_is_made(
    network: Network, start_node: StartNode
) -> None:
    node = StandIn()
    await network.register(await start_node(node), "legal")
    given = await network.http.post("/chat", json=ASK, headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    assert node.seen[0].header("x-request-id") == ["abc-1"]
    for headers in ({}, {"X-Request-Id": "no blanks, please"}):
        made = (await network.http.post("/chat", json=ASK, headers=headers)).headers
        assert len(made["x-request-id"]) == 32
        assert node.seen[-1].header("x-request-id") == [made["x-request-id"]]


async def test_a_proxy_in_the_environment_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, start_backend: StartBackend, start_node: StartNode
) -> None:
    dead = f"http://127.0.0.1:{unused_port()}"
    monkeypatch.setenv("HTTP_PROXY", dead)
    monkeypatch.setenv("ALL_PROXY", dead)
    network = await start_backend()
    url = await start_node(StandIn())
    await network.register(url, "legal")
    assert (await network.http.post("/chat", json=ASK)).text == "hello"

    # The twin: a client that reads the environment goes to the proxy and fails.
    async with httpx.AsyncClient(trust_env=True) as trusting:
        with pytest.raises(httpx.ConnectError):
            await trusting.post(f"{url}/chat", json=ASK)


async def test_one_users_cookie_is_not_another_users(
    network: Network, start_node: StartNode
) -> None:
    async def sets(request: Request) -> Response:
        return Response("x", headers={"Set-Cookie": "who=first"})

    node = StandIn(sets)
    await network.register(await start_node(node), "legal")
    for _ in range(2):
        await network.http.post("/chat", json=ASK)
    assert node.seen[1].header("cookie") == []


async def test_many_requests_at_once_are_all_answered_and_none_is_left_open(
    network: Network, start_node: StartNode
) -> None:
    open_now = 0

    class Counting(StandIn):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal open_now
            open_now += scope["type"] == "http"
            try:
                await super().__call__(scope, receive, send)
            finally:
                open_now -= scope["type"] == "http"

    await network.register(await start_node(Counting(says_hello)), "legal")
    for _ in range(10):
        batch = (network.http.post("/chat", json=ASK) for _ in range(20))
        assert {answer.text for answer in await asyncio.gather(*batch)} == {"hello"}
    assert open_now == 0
    metrics = (await network.http.get("/metrics")).text
    assert "r3mes_backend_in_flight_requests 1.0" in metrics
