"""Sources that fail in the middle of a fetch: what came is kept, the next one gives the rest, and
other fetches don't notice."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response, StreamingResponse

from r3mes_vllm.adapters.store import Store
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import WEIGHTS
from r3mes_vllm.errors import BlockMismatch, ContentNotFound
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.fetch import fetch, resolve
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.ipfs.sources import GatewaySource, KuboSource, Source, Standing
from r3mes_vllm.ipfs.tree import Limits
from tests import tiny
from tests.peers.gateway import (
    Blocks,
    Gateway,
    Published,
    bare,
    car_of,
    flip,
    listening,
    packed,
    publish,
)

SHORT = Limits(stall_s=0.5, total_s=30)
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return publish(tmp_path / "folder", leaves=9)


def stalled(start: bytes) -> Response:
    async def body() -> AsyncIterator[bytes]:
        yield start
        await asyncio.sleep(3600)

    return StreamingResponse(body(), headers={"content-length": str(1 << 24)})


def stall_after_half(blocks: Blocks) -> Response:
    whole = car_of(blocks)
    return stalled(whole[: len(whole) // 2] if len(blocks) > 1 else b"")


@asynccontextmanager
async def vanishing(published: Published) -> AsyncIterator[GatewaySource]:
    """Half an answer, then a reset, and nobody listens there any more."""
    whole = car_of(published.blocks)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(whole)}\r\n\r\n".encode()
        writer.write(head + whole[: len(whole) // 2])
        await writer.drain()
        await asyncio.sleep(1)  # a reset loses what nobody has read yet
        server.close()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield GatewaySource(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        server.close()


@asynccontextmanager
async def stalling(published: Published) -> AsyncIterator[GatewaySource]:
    async with listening(Gateway(published, stall_after_half)) as source:
        yield source


FAILING = {"stalls": stalling, "vanishes": vanishing}


@pytest.mark.parametrize("how", FAILING)
async def test_what_came_is_kept_and_the_next_source_is_asked_for_the_rest_only(
    published: Published, tmp_path: Path, how: str
) -> None:
    honest = Gateway(published)
    async with FAILING[how](published) as first, listening(honest) as second:
        began = time.monotonic()
        got = await fetch(published.root, tmp_path / "fetch", sources=[first, second], limits=SHORT)
        assert time.monotonic() - began < 15
    assert published.into(got)
    assert first.standing.bytes > len(car_of(published.blocks)) // 4
    assert first.standing.lies == 0
    assert set(honest.asked) == {"raw"}
    assert len(honest.asked) < len(published.blocks) - 3


@pytest.mark.parametrize("how", FAILING)
async def test_when_all_are_gone_the_error_names_them_and_the_next_try_goes_on(
    published: Published, tmp_path: Path, how: str
) -> None:
    folder = tmp_path / "fetch"
    sources: list[Source]
    async with FAILING[how](published) as first:
        sources = [first, GatewaySource(NOWHERE)]
        with pytest.raises(ContentNotFound, match="nobody offered") as caught:
            await fetch(published.root, folder, sources=sources, limits=SHORT)
    for source in sources:
        assert f"{source.name}: " in caught.value.message
    assert "--ipfs-gateway URL" in caught.value.hint
    honest = Gateway(published)
    async with listening(honest) as source:
        assert published.into(await fetch(published.root, folder, sources=[source]))
    assert 0 < len(honest.asked) < len(published.blocks) - 3


async def test_a_lie_in_the_last_block_costs_that_block_only(
    published: Published, tmp_path: Path
) -> None:
    liar, honest = Gateway(published, flip), Gateway(published)
    async with listening(liar) as first, listening(honest) as second:
        got = await fetch(published.root, tmp_path / "fetch", sources=[first, second])
    assert published.into(got)
    assert first.standing.lies == 1
    assert honest.asked == ["raw"]


class Several:
    """Adapters that one gateway has, block by block."""

    def __init__(self, folder: Path, count: int) -> None:
        self.each = [packed(tiny.make_adapter(folder / str(it), seed=it)) for it in range(count)]
        blocks = dict(block for it in self.each for block in it.blocks)  # they share some
        self.all = Published(self.each[0].root, [*blocks.items()], folder)

    def failing(self, number: int, fails: Callable[[Blocks], Blocks | Response]) -> Gateway:
        """A gateway that fails at the leaves of one of them."""
        shared = {cid for it in self.each if it is not self.each[number] for cid, _ in it.blocks}
        leaves = {cid for cid, _ in self.each[number].blocks[1:]} - shared

        def answer(found: Blocks) -> Blocks | Response:
            if len(found) > 1:
                return Response("no CARs", 500)
            return fails(found) if found[0][0] in leaves else found

        return Gateway(self.all, answer)


@pytest.fixture
def several(tmp_path: Path) -> Several:
    return Several(tmp_path, 4)


async def test_while_one_stalls_the_others_come(several: Several, tmp_path: Path) -> None:
    async with listening(several.failing(0, lambda found: stalled(b""))) as source:
        supply = Supply(Store(tmp_path / "cache"), ipfs_api=NOWHERE, gateways=[source.name])
        stuck = asyncio.create_task(supply.obtain(several.each[0].root))
        async with asyncio.timeout(20):  # it stalls for 30
            got = await asyncio.gather(*(supply.obtain(it.root) for it in several.each[1:]))
        assert not stuck.done()
        for it, published in zip(got, several.each[1:], strict=True):
            assert (it.path / WEIGHTS).read_bytes() == (published.folder / WEIGHTS).read_bytes()
        stuck.cancel()
        await asyncio.wait({stuck})


async def test_while_one_is_lied_about_all_come_from_who_is_honest(
    several: Several, tmp_path: Path
) -> None:
    async with (
        listening(several.failing(0, flip)) as liar,
        listening(several.failing(0, lambda found: found)) as honest,
    ):
        supply = Supply(
            Store(tmp_path / "cache"), ipfs_api=NOWHERE, gateways=[liar.name, honest.name]
        )
        got = await asyncio.gather(*(supply.obtain(it.root) for it in several.each))
    for it, published in zip(got, several.each, strict=True):
        assert (it.path / WEIGHTS).read_bytes() == (published.folder / WEIGHTS).read_bytes()


@pytest.fixture
def no_name(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No name below `.invalid` resolves, and nobody else is asked for one; who was looked up."""
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **named: Any) -> Any:
        if str(host).endswith(".invalid"):
            looked_up.append(host)
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *args, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return looked_up


async def test_a_name_that_does_not_resolve_is_said_and_the_next_source_asked(
    published: Published, tmp_path: Path, no_name: list[str]
) -> None:
    lost: list[Source] = [
        KuboSource("http://daemon.invalid:5001"),
        GatewaySource("https://gateway.invalid"),
    ]
    with pytest.raises(ContentNotFound) as caught:
        await fetch(published.root, tmp_path / "a", sources=lost, limits=SHORT)
    for url, host in (
        ("http://daemon.invalid:5001", "daemon.invalid"),
        ("https://gateway.invalid", "gateway.invalid"),
    ):
        assert f"{url}: the name {host} does not resolve" in caught.value.message
    assert "--ipfs-gateway URL" in caught.value.hint
    async with listening(Gateway(published)) as source:
        got = await fetch(published.root, tmp_path / "b", sources=[*lost, source])
    assert published.into(got)
    assert set(no_name) == {"daemon.invalid", "gateway.invalid"}


async def test_who_waits_for_a_name_keeps_nobody_waiting(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a resolver that does not answer: it holds a thread for many seconds."""
    real, over = socket.getaddrinfo, threading.Event()

    def getaddrinfo(host: Any, *args: Any, **named: Any) -> Any:
        if str(host).endswith(".invalid"):
            over.wait(20)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real(host, *args, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    lost = GatewaySource("http://gateway.invalid")
    try:
        async with listening(Gateway(published)) as source:
            began = time.monotonic()
            got = await fetch(published.root, tmp_path / "a", sources=[lost, source], limits=SHORT)
            assert published.into(got)
            assert time.monotonic() - began < 15
        with pytest.raises(ContentNotFound, match=r"gateway\.invalid"):
            await fetch(published.root, tmp_path / "b", sources=[lost], limits=SHORT)
        assert time.monotonic() - began < 15
    finally:
        over.set()


async def test_why_a_path_can_not_be_followed_is_said(published: Published, tmp_path: Path) -> None:
    path = IpfsPath(published.root, ("weights",))
    with pytest.raises(ContentNotFound, match=rf"{NOWHERE}: .*Connect call failed"):
        await resolve(path, tmp_path / "way", sources=[KuboSource(NOWHERE)])


async def test_a_page_of_text_is_no_lie_and_a_block_of_that_type_is_taken(
    published: Published, tmp_path: Path
) -> None:
    page = Gateway(published, lambda _: Response("Too many requests.", media_type="text/plain"))
    async with listening(page) as source:
        with pytest.raises(ContentNotFound, match="answered with a page, not a block"):
            await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert source.standing.lies == 0

    def plain(blocks: Blocks) -> Response:  # what nginx says of a file that it does not know
        return Response(blocks[0][1], media_type="text/plain")

    async with listening(Gateway(published, plain, forms=("raw",))) as source:
        assert published.into(await fetch(published.root, tmp_path / "fetch", sources=[source]))


def closing(
    published: Published, wrong: Callable[[int], bool]
) -> AbstractAsyncContextManager[GatewaySource]:
    """Raw blocks whose end is that of the connection; those at which it is `wrong` are cut."""
    blocks, turns = dict(published.blocks), count(1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path, _, query = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode().partition("?")
        if query == "format=raw":
            data = blocks[CID.parse(path.rpartition("/")[2])]
            cut = len(data) // 2 if wrong(next(turns)) else len(data)
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + data[:cut])
        else:
            writer.write(b"HTTP/1.1 406 No\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    return bare(serve)


async def test_a_block_that_was_cut_short_unseen_is_no_lie_but_many_in_a_row_are(
    published: Published, tmp_path: Path
) -> None:
    async with closing(published, lambda turn: turn == 3) as source:
        assert published.into(await fetch(published.root, tmp_path / "a", sources=[source]))
    assert source.standing.lies == 0
    async with closing(published, lambda turn: True) as liar:
        with pytest.raises(BlockMismatch, match=liar.name):
            await fetch(published.root, tmp_path / "b", sources=[liar])
    assert liar.standing.lies == 1


def test_lies_are_forgotten_by_the_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1e6
    monkeypatch.setattr(time, "monotonic", lambda: now)
    standing = Standing()
    for pause_s in (60, 120, 240):
        standing.lied()
        assert standing.wait_s == pause_s
        now += pause_s
    now += 2 * 3600
    standing.lied()
    assert standing.wait_s == 120
