"""Gateways that fail now and then, or under more than they bear."""

import asyncio
import time
from contextlib import AbstractAsyncContextManager
from itertools import count
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import Response

from r3mes_vllm.errors import ContentNotFound
from r3mes_vllm.ipfs import asking, sources, unixfs
from r3mes_vllm.ipfs.cid import CID, Data
from r3mes_vllm.ipfs.fetch import fetch
from r3mes_vllm.ipfs.sources import GatewaySource, Standing
from r3mes_vllm.ipfs.tree import Limits
from tests.peers.gateway import Blocks, Gateway, Published, bare, listening, publish
from tests.programs import free_port

LEAVES = 30
SHORT = Limits(stall_s=0.5)


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return publish(tmp_path / "folder", leaves=LEAVES)


class Crowded(Gateway):
    """Raw blocks only, for so many at once; to the others it says `no`."""

    def __init__(self, published: Published, most: int, no: Response) -> None:
        super().__init__(published, forms=("raw",))
        self.most, self.no = most, no
        self.now = self.busiest = self.refused = 0

    async def answer(self, request: Request) -> Response:
        if self.now >= self.most:
            self.refused += 1
            return self.no
        self.now += 1
        self.busiest = max(self.busiest, self.now)
        await asyncio.sleep(0.02)
        self.now -= 1
        return await super().answer(request)


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_gateway_that_fails_now_and_then_is_asked_again(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(asking, "_FIRST_PAUSE_S", 0.01)
    turns = count(1)

    def third_time_lucky(blocks: Blocks) -> Blocks | Response:
        return Response("bad gateway", status) if next(turns) % 3 else blocks

    gateway = Gateway(published, third_time_lucky, forms=("raw",))
    async with listening(gateway) as source:
        got = await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert published.into(got)


async def test_a_gateway_is_asked_for_as_much_at_once_as_it_bears(
    published: Published, tmp_path: Path
) -> None:
    gateway = Crowded(published, 2, Response("limit_conn", 503))
    async with listening(gateway) as source:
        got = await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert published.into(got)
    assert gateway.refused < LEAVES
    assert source.standing.bears < 4


def few_connections(published: Published, most: int) -> AbstractAsyncContextManager[GatewaySource]:
    """Those over it are closed without a word."""
    blocks = dict(published.blocks)
    here: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        here.add(writer)
        try:
            while len(here) <= most:
                head = await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(0.01)
                path, _, query = head.split(b" ")[1].decode().partition("?")
                body = blocks[CID.parse(path.rpartition("/")[2])]
                status = b"200 OK" if query == "format=raw" else b"501 No"
                writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, len(body)))
                writer.write(body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            here.discard(writer)
            writer.close()

    return bare(serve)


async def test_a_gateway_that_closes_what_is_over_its_connections_gives_all(
    published: Published, tmp_path: Path
) -> None:
    async with few_connections(published, 3) as source:
        got = await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert published.into(got)
    assert source.standing.bears < 8


def half_then(published: Published, status: int) -> Gateway:
    """Half of a CAR, and then this status."""
    half = published.blocks[: LEAVES // 2]
    return Gateway(published, lambda it: half if len(it) > 1 else Response("no", status))


async def test_where_nobody_listens_is_not_waited_for(published: Published, tmp_path: Path) -> None:
    folder = tmp_path / "fetch"
    async with listening(half_then(published, 500)) as source:  # leaves many to ask for
        with pytest.raises(ContentNotFound):
            await fetch(published.root, folder, sources=[source])
    for into in (folder, tmp_path / "fresh"):
        dead = GatewaySource(f"http://127.0.0.1:{free_port()}")
        began = time.monotonic()
        with pytest.raises(ContentNotFound, match=rf"{dead.name}: .*Connect call failed"):
            await fetch(published.root, into, sources=[dead])
        assert time.monotonic() - began < 1


@pytest.mark.parametrize("begins", [True, False])
async def test_one_that_never_recovers_is_given_up(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins: bool
) -> None:
    monkeypatch.setattr(asking, "_PATIENCE_S", 0.5)
    limits = SHORT if begins else Limits()
    half = half_then(published, 503)
    gateway = half if begins else Gateway(published, lambda _: Response("no", 503))
    async with listening(gateway) as source:
        began = time.monotonic()
        with pytest.raises(ContentNotFound, match=f"{source.name} answered 503"):
            await fetch(published.root, tmp_path / "fetch", sources=[source], limits=limits)
        assert time.monotonic() - began < 5
    assert 3 < gateway.asked.count("raw") < 60


async def test_while_one_does_not_recover_another_gives_it(
    published: Published, tmp_path: Path
) -> None:
    async with (
        listening(half_then(published, 503)) as shaky,
        listening(Gateway(published)) as honest,
    ):
        began = time.monotonic()
        got = await fetch(published.root, tmp_path / "fetch", sources=[shaky, honest])
        assert time.monotonic() - began < 5
    assert published.into(got)


def test_what_a_source_bears_is_halved_and_grows_again() -> None:
    standing = Standing()
    for bears in (4, 2, 1, 1):
        standing.strained(8)
        assert standing.bears == bears
    for _ in range(4 * (1 + 2)):
        standing.bore()
    assert standing.bears == 3


async def test_many_are_asked_for_at_once_also_after_the_one_node_that_links_to_them(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_read(cid: CID, data: Data) -> unixfs.Node:
        node = unixfs.read(cid, data)
        if len(node.links) == LEAVES + 1:
            time.sleep(0.2)
        return node

    monkeypatch.setattr("r3mes_vllm.ipfs.tree.read", slow_read)
    gateway = Crowded(published, 100, Response("never", 500))
    async with listening(gateway) as source:
        await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert gateway.busiest > 4


async def test_what_is_under_way_when_a_pause_is_asked_for_comes_and_less_is_asked_for_after_it(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_FIRST_PAUSE_S", 0.05)
    gateway = Crowded(published, 2, Response("slow down", 429, {"retry-after": "0"}))
    async with listening(gateway) as source:
        got = await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert published.into(got)
    assert source.standing.bears == 2
    assert gateway.refused < 8 + 4
    assert gateway.asked.count("raw") == len(published.blocks)  # none of them twice
