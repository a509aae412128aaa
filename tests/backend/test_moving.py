"""An answer that one node began and another ends."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from r3mes_vllm.backend.dial import Timeouts
from r3mes_vllm.carry import FRAMES, HEADER, RESUME, Frame, Step
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.framing import TEXT, TOLD, WORDS, Framing, event
from tests.backend.stand_ins import (
    LEGAL_CID,
    OTHER_CID,
    DiesAfter,
    Network,
    StandIn,
    streams,
    wallet,
)

CHAT = {"message": "hi", "lora_name": "legal"}
V1 = {"model": "legal", "messages": [], "stream": True}
OURS: dict[str, Any] = {"version": "0.2.0", "adapters": {"legal": LEGAL_CID}}


@dataclass
class Answer:
    body: bytes = b""
    complete: bool = True
    first: str = ""
    """The wallet of the node that began it."""
    status: int = 0

    @property
    def said(self) -> str:
        """The text of its events."""
        lines = [it for it in self.body.decode().splitlines() if it.startswith('data: {"id')]
        chunks = [json.loads(it.removeprefix("data: ")) for it in lines]
        return "".join(it["choices"][0]["delta"]["content"] for it in chunks)


Node = tuple[Any, dict[str, Any]]
"""What it does, and what it registers besides."""


async def ask(network: Network, path: str, asked: dict[str, Any], **headers: str) -> Answer:
    answer = Answer()
    try:
        async with network.http.stream("POST", path, json=asked, headers=headers) as response:
            answer.status = response.status_code
            answer.first = response.headers.get("x-r3mes-node", "")
            assert HEADER not in response.headers
            async for piece in response.aiter_raw():
                answer.body += piece
    except httpx.RemoteProtocolError:
        answer.complete = False
    return answer


async def begun_at_first(
    network: Network, start_node: StartNode, nodes: Sequence[Node], asked: dict[str, Any]
) -> Answer:
    """The answer to `asked` that the first of `nodes` begins: the others come when it is asked."""
    (behaviour, additive), *others = nodes

    async def first(request: Request) -> Response:
        for number, (other, more) in enumerate(others, 2):
            node = other if isinstance(other, StandIn) else StandIn(other)
            await network.register(await start_node(node), "legal", number=number, **more)
        response: Response = await behaviour(request)
        return response

    await network.register_lora("legal")
    await network.register(await start_node(StandIn(first)), "legal", **additive)
    path = "/v1/chat/completions" if "messages" in asked else "/chat"
    answer = await ask(network, path, asked)
    assert answer.first == wallet(1)
    return answer


@pytest.mark.parametrize("count", range(1, len(WORDS)))
async def test_text_goes_on_from_its_tokens(
    network: Network, start_node: StartNode, count: int
) -> None:
    other = Framing()
    nodes = [(Framing(dies_after=count), OURS), (other, OURS)]
    answer = await begun_at_first(network, start_node, nodes, CHAT)
    assert (answer.body.decode(), answer.complete) == (TEXT, True)
    assert [it.tokens for it in other.past[-1].steps or ()] == [[n] for n in range(count)]


@pytest.mark.parametrize("count", range(1, len(WORDS) + 2))
async def test_events_go_on_from_their_tokens(
    network: Network, start_node: StartNode, count: int
) -> None:
    nodes = [(Framing(dies_after=count, created=111), OURS), (Framing(created=222), OURS)]
    answer = await begun_at_first(network, start_node, nodes, V1)
    assert (answer.said, answer.complete) == (TEXT, True)
    assert answer.body.count(b"[DONE]") == 1
    assert b"222" not in answer.body
    moved = f"[DONE]\n\n: x-r3mes-nodes: {wallet(1)}, {wallet(2)}\n\n"
    assert answer.body.endswith(moved.encode())


@pytest.mark.parametrize(("asked", "frames"), [(CHAT, len(WORDS)), (V1, len(WORDS) + 2)])
async def test_who_breaks_off_after_the_end_has_said_all(
    network: Network, start_node: StartNode, asked: dict[str, Any], frames: int
) -> None:
    other = StandIn(Framing())
    nodes: list[Node] = [(Framing(dies_after=frames), OURS), (other, OURS)]
    answer = await begun_at_first(network, start_node, nodes, asked)
    assert answer.complete
    assert TEXT in (answer.said or answer.body.decode())
    assert not other.seen


@pytest.mark.parametrize("asked", [CHAT, V1], ids=["text", "events"])
async def test_an_end_before_the_end_is_none(
    network: Network, start_node: StartNode, asked: dict[str, Any]
) -> None:
    """Such as that of a proxy before a node, which speaks HTTP/1.0."""

    class Early(Framing):
        def frames(self, body: bytes, carry: str) -> tuple[list[bytes], dict[str, str]]:
            frames, headers = super().frames(body, carry)
            return frames[:4], headers

    nodes: list[Node] = [(Early(), OURS), (Framing(), OURS)]
    answer = await begun_at_first(network, start_node, nodes, asked)
    assert (answer.said or answer.body.decode(), answer.complete) == (TEXT, True)


@pytest.mark.parametrize("frames", [0, 1, 2])
async def test_a_second_that_breaks_off_before_it_has_said_what_the_first_did(
    network: Network, start_node: StartNode, frames: int
) -> None:
    """An old node's text is what the client has, not what the second told of it."""

    async def second(request: Request) -> Response:
        # as one whose first frame holds less than the text that it was given
        found, headers = Framing().frames(await request.body(), FRAMES)
        return DiesAfter(*found[:frames], b"[", headers=headers)

    async def old(request: Request) -> Response:
        return DiesAfter(b"To be", b", or", headers={"content-type": "text/plain"})

    nodes: list[Node] = [(old, {}), (second, OURS), (Framing(), OURS)]
    for _ in range(4):  # which of the two is asked first is the balancer's choice
        answer = await begun_at_first(network, start_node, nodes, CHAT)
        assert (answer.body.decode(), answer.complete) == (TEXT, True)
        await network.http.post("/api/serving-node/deregister", json={"wallet_address": wallet(2)})
        await network.http.post("/api/serving-node/deregister", json={"wallet_address": wallet(3)})


async def test_an_answer_of_no_kind_is_not_begun_again(
    network: Network, start_node: StartNode
) -> None:
    async def untyped(request: Request) -> Response:
        return DiesAfter(b"To be, or", headers={"x-nothing": ""})

    other = StandIn(streams(TEXT.encode()))
    nodes: list[Node] = [(untyped, {}), (other, {})]
    answer = await begun_at_first(network, start_node, nodes, CHAT)
    assert (answer.body, answer.complete) == (b"To be, or", False)
    assert not other.seen


async def test_nobody_is_asked_twice_for_one_answer(
    network: Network, start_node: StartNode
) -> None:
    refusing_ones = [StandIn(refusing(500)) for _ in range(4)]
    nodes: list[Node] = [(Framing(dies_after=3), OURS), *((it, OURS) for it in refusing_ones)]
    answer = await begun_at_first(network, start_node, nodes, CHAT)
    assert not answer.complete
    assert all(len(it.seen) <= 1 for it in refusing_ones)


async def test_on_another_base_model_nobody_goes_on(
    network: Network, start_node: StartNode
) -> None:
    other = StandIn(Framing())
    nodes: list[Node] = [
        (Framing(dies_after=3), OURS | {"base_model": "one"}),
        (other, OURS | {"base_model": "two"}),
    ]
    answer = await begun_at_first(network, start_node, nodes, CHAT)
    assert (answer.body.decode(), answer.complete) == ("".join(WORDS[:3]), False)
    assert not other.seen


async def test_a_node_that_answers_as_another_adapter_is_passed_over(
    network: Network, start_node: StartNode
) -> None:
    await network.register_lora("legal")
    alien = Framing(headers={"X-R3MES-Adapter": "medical", "X-R3MES-CID": OTHER_CID})
    await network.register(await start_node(StandIn(alien)), "legal", **OURS)
    answer = await ask(network, "/chat", CHAT)
    assert answer.status == 502


async def test_an_errors_text_is_not_gone_on_with(network: Network, start_node: StartNode) -> None:
    class Failing(DiesAfter):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 400, "headers": TYPED})
            await send({"type": "http.response.body", "body": b"To be", "more_body": True})

    async def behaviour(request: Request) -> Response:
        return Failing()

    other = StandIn(streams(TEXT.encode()))
    nodes: list[Node] = [(behaviour, {}), (other, {})]
    answer = await begun_at_first(network, start_node, nodes, CHAT)
    assert (answer.status, answer.complete) == (400, False)


TYPED = [(b"content-type", b"text/plain")]


async def test_a_length_of_the_first_is_not_that_of_the_whole(
    network: Network, start_node: StartNode
) -> None:
    headers = {"content-type": "text/plain", "content-length": "13"}

    async def dying(request: Request) -> Response:
        return DiesAfter(b"To be, or", headers=headers)

    nodes: list[Node] = [(dying, {}), (Framing(), OURS)]
    answer = await begun_at_first(network, start_node, nodes, CHAT)
    assert (answer.body.decode(), answer.complete) == (TEXT, True)


async def test_an_event_that_broke_off_does_not_hide_the_error(
    network: Network, start_node: StartNode
) -> None:
    dying = dies(event("To", 1) + b'data: {"id":"a","cho', kind="text/event-stream")
    answer = await begun_at_first(network, start_node, [(dying, {})], V1)
    assert b"\n\nevent: error\ndata: " in answer.body
    assert not answer.complete


async def test_it_goes_on_again_and_again(network: Network, start_node: StartNode) -> None:
    nodes = [(Framing(dies_after=2 * n), OURS) for n in range(1, 5)]
    answer = await begun_at_first(network, start_node, [*nodes, (Framing(), OURS)], V1)
    assert (answer.said, answer.complete) == (TEXT, True)


async def test_a_silent_node_has_failed(start_backend: StartBackend, start_node: StartNode) -> None:
    class Silent(Framing):
        async def __call__(self, request: Request) -> Response:
            response = await super().__call__(request)
            assert isinstance(response, DiesAfter)
            return Falls(response)

    network = await start_backend(timeouts=Timeouts(between_bytes=0.3))
    nodes = [(Silent(dies_after=3), OURS), (Framing(), OURS)]
    answer = await begun_at_first(network, start_node, nodes, CHAT)
    assert (answer.body.decode(), answer.complete) == (TEXT, True)


async def test_one_that_does_not_begin_to_go_on_leaves_time_for_the_next(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    async def hangs(request: Request) -> Response:
        return Falls()

    network = await start_backend(timeouts=Timeouts(first_byte=2.5))
    for _ in range(20):
        hanging = StandIn(hangs)
        nodes: list[Node] = [(Framing(dies_after=3), OURS), (hanging, OURS), (Framing(), OURS)]
        answer = await begun_at_first(network, start_node, nodes, CHAT)
        assert (answer.body.decode(), answer.complete) == (TEXT, True)
        if hanging.seen:  # which of the two is asked first is the balancer's choice
            return
        for number in (1, 2, 3):
            gone = {"wallet_address": wallet(number)}
            await network.http.post("/api/serving-node/deregister", json=gone)
    raise AssertionError("the second node was never asked first")


class Falls(Response):
    """Silent after what `inner` sends, for as long as anyone waits."""

    def __init__(self, inner: Response | None = None) -> None:
        super().__init__()
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._inner:
            await self._inner(scope, receive, send)
        while (await receive())["type"] != "http.disconnect":
            pass


def dies(*pieces: bytes, kind: str = "text/plain", **headers: str) -> Any:
    async def behaviour(request: Request) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return DiesAfter(*pieces, headers=named | {"content-type": kind})

    return behaviour


class TestOldNodes:
    """They send no frames."""

    PIECES = (b"To be", ", or nö".encode()[:-1])
    """The second ends within a letter."""

    async def test_ours_goes_on_from_the_text(
        self, network: Network, start_node: StartNode
    ) -> None:
        other = Framing()
        nodes: list[Node] = [(dies(b"To be", b", or"), {}), (other, OURS)]
        answer = await begun_at_first(network, start_node, nodes, CHAT)
        assert (answer.body.decode(), answer.complete) == (TEXT, True)
        assert other.past[-1].text == "To be, or"

    async def test_an_old_one_says_it_again(self, network: Network, start_node: StartNode) -> None:
        again = streams(TEXT.encode()[:4], TEXT.encode()[4:])
        nodes: list[Node] = [(dies(*self.PIECES), {}), (again, {})]
        answer = await begun_at_first(network, start_node, nodes, CHAT)
        assert (answer.body.decode(), answer.complete) == (TEXT, True)

    async def test_of_a_known_version_an_old_one_is_not_asked(
        self, network: Network, start_node: StartNode
    ) -> None:
        """It does not say which one it has."""
        old = StandIn(streams(TEXT.encode()))
        nodes = [(Framing(dies_after=5), OURS), (old, {})]
        answer = await begun_at_first(network, start_node, nodes, CHAT)
        assert (answer.body.decode(), answer.complete) == ("".join(WORDS[:5]), False)
        assert not old.seen

    @pytest.mark.parametrize("other", [b"To be, or what? That is too long", b"To be"])
    async def test_an_old_one_that_says_something_else(
        self, network: Network, start_node: StartNode, other: bytes
    ) -> None:
        nodes: list[Node] = [(dies(*self.PIECES), {}), (streams(other), {})]
        answer = await begun_at_first(network, start_node, nodes, CHAT)
        assert (answer.body, answer.complete) == (b"".join(self.PIECES), False)

    async def test_events_end_as_an_error(self, network: Network, start_node: StartNode) -> None:
        dying = dies(event("To", 1), kind="text/event-stream")
        answer = await begun_at_first(network, start_node, [(dying, {}), (Framing(), OURS)], V1)
        assert (answer.said, answer.complete) == ("To", False)
        assert b"event: error\ndata: " in answer.body
        assert b"[DONE]" not in answer.body


def refusing(status: int) -> Any:
    async def behaviour(request: Request) -> Response:
        if request.headers[HEADER] == RESUME:
            return Response("no", status)
        return DiesAfter(headers={"content-type": "text/plain"})  # never asked first for long

    return behaviour


ALIEN = {"X-R3MES-Adapter": "legal", "X-R3MES-CID": OTHER_CID}


@pytest.mark.parametrize("asked", [CHAT, V1], ids=["text", "events"])
@pytest.mark.parametrize(
    "others",
    [
        [],
        [(Framing(), OURS | {"adapters": {"legal": OTHER_CID}})],
        [(Framing(headers=ALIEN), OURS)],
        [(Framing(headers={}), OURS)],
        [(refusing(400), OURS), (refusing(503), OURS)],
        [(streams(b"To be"), OURS)],
        [(Framing(words=WORDS[:2]), OURS)],
    ],
    ids=["none", "registers other", "has other", "says none", "refuse", "no frames", "short"],
)
async def test_if_nobody_goes_on_it_ends_as_an_error(
    network: Network, start_node: StartNode, asked: dict[str, Any], others: list[Node]
) -> None:
    dying = (Framing(dies_after=4), OURS)
    answer = await begun_at_first(network, start_node, [dying, *others], asked)
    assert not answer.complete
    assert b"[DONE]" not in answer.body
    if asked is V1:
        assert answer.body.endswith(b"\n\n")
        assert b"event: error\ndata: " in answer.body
        assert answer.said == "".join(WORDS[:3])
    else:
        assert answer.body.decode() == "".join(WORDS[:4])


async def test_what_can_not_be_told_ends_as_an_error(
    network: Network, start_node: StartNode
) -> None:
    """Of several answers at once, a node does not say which token is whose."""
    frames = [Frame([Step([0])], event("To", 1)).pack(), Frame(None, event(" be", 1)).pack()]
    dying = dies(*frames, kind="text/event-stream", **{HEADER.replace("-", "_"): FRAMES})
    answer = await begun_at_first(network, start_node, [(dying, OURS), (Framing(), OURS)], V1)
    assert (answer.said, answer.complete) == ("To be", False)


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\n",
        b"[5]\n",
        b"[-1,[]]\n",
        b'[1,[["x"]]]\n',
        b"[1,[[[1.5]]]]\n",
        b"[" * 100_000 + b"\n",
        b"9" * (2 << 20),
        b"[5,[]]\nab",
        b"[10000000000,[]]\n",
        b"[1,[[[]]]]\na",
        b'[1,[[[1],"error"]]]\na',
        b"[1,[" + b",".join([b"[[1]]"] * 2000) + b"]]\na",
    ],
    ids=range(12),
)
@pytest.mark.parametrize("begun", [False, True])
async def test_frames_that_are_none(
    network: Network, start_node: StartNode, garbage: bytes, begun: bool
) -> None:
    said = [Frame([Step([0])], b"To").pack()] if begun else []

    async def behaviour(request: Request) -> Response:
        response = await streams(*said, garbage)(request)
        response.headers.update(TOLD | {HEADER: FRAMES})
        return response

    await network.register_lora("legal")
    await network.register(await start_node(StandIn(behaviour)), "legal", **OURS)
    answer = await ask(network, "/chat", CHAT)
    if begun:
        assert (answer.body, answer.complete) == (b"To", False)
    else:
        assert answer.status == 502


async def test_who_breaks_off_before_its_first_word_is_not_noticed(
    network: Network, start_node: StartNode
) -> None:
    half = Frame([Step([0])], b"To").pack()[:-1]
    broke = []

    async def dying(request: Request) -> Response:
        broke.append(request.headers[HEADER])
        return DiesAfter(half, headers=TOLD | {HEADER: FRAMES, "content-type": "text/plain"})

    await network.register_lora("legal")
    both: list[Any] = [dying, Framing()]
    for number, node in enumerate(both, 1):
        url = await start_node(StandIn(node))
        await network.register(url, "legal", number=number, **OURS)
    for number in range(200):
        answer = await ask(network, "/chat", CHAT | {"message": f"question {number}"})
        assert (answer.body.decode(), answer.complete) == (TEXT, True)
        assert answer.first == wallet(2)
        if broke:
            return
    raise AssertionError("the first node was never asked first")


async def test_a_client_can_not_ask_for_frames(network: Network, start_node: StartNode) -> None:
    node = StandIn(Framing())
    await network.register_lora("legal")
    await network.register(await start_node(node), "legal", **OURS)
    answer = await network.http.post("/chat", json=CHAT, headers={HEADER: RESUME})
    assert answer.text == TEXT
    assert node.seen[0].header(HEADER) == [FRAMES]
