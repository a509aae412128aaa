"""Fetching from an honest gateway and from liars: what is refused, and that nothing of it stays."""

import asyncio
import gzip
import io
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from r3mes_vllm.errors import (
    BadDAG,
    BlockMismatch,
    ContentNotFound,
    ContentTooLarge,
    IpfsError,
)
from r3mes_vllm.ipfs import car, unixfs, varint
from r3mes_vllm.ipfs.blockstore import BlockStore
from r3mes_vllm.ipfs.cid import CID, DAG_PB, RAW
from r3mes_vllm.ipfs.fetch import Progress, fetch
from r3mes_vllm.ipfs.pack import CHUNK, pack
from r3mes_vllm.ipfs.sources import CarSource, GatewaySource
from r3mes_vllm.ipfs.tree import Limits
from r3mes_vllm.ipfs.unixfs import Link
from tests.programs import free_port

Blocks = list[car.Block]


@dataclass
class Published:
    root: CID
    blocks: Blocks
    folder: Path


@pytest.fixture
def published(tmp_path: Path) -> Published:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_bytes(os.urandom(5 * CHUNK + 17))
    root = pack(folder, tmp_path / "folder.car")
    return Published(root, list(car.read_file(tmp_path / "folder.car")), folder)


@dataclass
class Gateway:
    """A trustless gateway on loopback; `lie` changes the blocks of a CAR or replaces the answer."""

    published: Published
    lie: Callable[[Blocks], Blocks | Response] | None = None
    asked: list[str] = field(default_factory=list)

    async def answer(self, request: Request) -> Response:
        cid = CID.parse(request.path_params["cid"])
        form = request.query_params["format"]
        self.asked.append(form)
        found = [block for block in self.published.blocks if form == "car" or block[0] == cid]
        if not found:
            return Response("not found", 404)
        told = self.lie(found) if self.lie else found
        if isinstance(told, Response):
            return told
        if form == "raw":
            return Response(told[0][1], media_type="application/vnd.ipld.raw")
        file = io.BytesIO()
        car.write(file, cid, told)
        return Response(file.getvalue(), media_type="application/vnd.ipld.car")


@asynccontextmanager
async def listening(gateway: Gateway) -> AsyncIterator[GatewaySource]:
    app = Starlette(routes=[Route("/ipfs/{cid}", gateway.answer)])
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off"))
    server.capture_signals = nullcontext  # type: ignore[assignment,method-assign]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield GatewaySource(f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = server.force_exit = True
        await task


def same(published: Published, into: Path) -> bool:
    return all(
        (into / path.name).read_bytes() == path.read_bytes() for path in published.folder.iterdir()
    )


def kept(folder: Path) -> Iterable[bytes]:
    return [path.read_bytes() for path in folder.iterdir()]


async def test_an_honest_gateway(published: Published, tmp_path: Path) -> None:
    gateway, seen = Gateway(published), list[Progress]()
    async with listening(gateway) as source:
        await fetch(
            published.root,
            tmp_path / "into",
            blocks=BlockStore(tmp_path / "blocks"),
            sources=[source],
            progress=seen.append,
        )
    assert same(published, tmp_path / "into")
    assert gateway.asked == ["car"]
    assert seen[-1].bytes_verified == sum(len(data) for _, data in published.blocks)
    assert seen[-1].source == source.name


def flip(blocks: Blocks) -> Blocks:
    cid, data = blocks[-1]
    return [*blocks[:-1], (cid, bytes([data[0] ^ 1]) + data[1:])]


def swap(blocks: Blocks) -> Blocks:
    return [*blocks[:-1], (blocks[-1][0], blocks[0][1] + b"x")]


def compress(blocks: Blocks) -> Response:
    file = io.BytesIO()
    car.write(file, blocks[0][0], blocks)
    return Response(gzip.compress(file.getvalue()), headers={"content-encoding": "gzip"})


def endless(blocks: Blocks) -> Response:
    head = io.BytesIO()
    car.write(head, blocks[0][0], [])

    async def body() -> AsyncIterator[bytes]:
        yield head.getvalue()
        for number in range(1 << 30):
            data = number.to_bytes(4, "big") * (1 << 18)
            name = bytes(CID.of(RAW, data))
            yield varint.encode(len(name) + len(data)) + name + data
            await asyncio.sleep(0)

    return StreamingResponse(body())


def stalled(blocks: Blocks) -> Response:
    async def body() -> AsyncIterator[bytes]:
        yield b"\x3a"
        await asyncio.sleep(3600)

    return StreamingResponse(body())


LIES: dict[str, Callable[[Blocks], Blocks | Response]] = {
    "flip": flip,
    "swap": swap,
    "gzip": compress,
    "endless": endless,
    "stalled": stalled,
    "redirect": lambda _: RedirectResponse("http://127.0.0.1:9/elsewhere"),
    "429": lambda _: Response(status_code=429, headers={"retry-after": "7"}),
    "html": lambda _: Response("<html>captcha</html>"),
    "empty": lambda _: Response(b""),
    "500": lambda _: Response("[Gateway Error: Response truncated", 500),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_liar_is_named_and_nothing_of_it_is_kept(
    published: Published, tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r3mes_vllm.ipfs.sources._STALL_S", 0.5)
    monkeypatch.setattr("r3mes_vllm.ipfs.fetch._WAITING_LIMIT", 1 << 20)
    limits = Limits(bytes=8 << 20)
    blocks = BlockStore(tmp_path / "blocks")
    async with listening(Gateway(published, LIES[lie])) as liar:
        with pytest.raises(IpfsError) as caught:
            await fetch(
                published.root, tmp_path / "into", blocks=blocks, sources=[liar], limits=limits
            )
        assert liar.name in str(caught.value)
        assert isinstance(caught.value, BlockMismatch if lie in ("flip", "swap") else IpfsError)
        assert not (tmp_path / "into").exists()
        honest_bytes = [data for _, data in published.blocks]
        assert all(data in honest_bytes for data in kept(tmp_path / "blocks"))
        async with listening(Gateway(published)) as honest:  # and another has it
            await fetch(
                published.root,
                tmp_path / "into",
                blocks=blocks,
                sources=[liar, honest],
                limits=limits,
            )
    assert same(published, tmp_path / "into")


async def test_with_the_check_off_the_flipped_byte_is_served(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CID, "matches", lambda self, data: True)
    async with listening(Gateway(published, flip)) as liar:
        await fetch(
            published.root,
            tmp_path / "into",
            blocks=BlockStore(tmp_path / "blocks"),
            sources=[liar],
        )
    assert not same(published, tmp_path / "into")


@pytest.mark.parametrize(
    "order",
    [
        lambda blocks: blocks[::-1],
        lambda blocks: blocks * 2,
        lambda blocks: [(CID.of(RAW, b"not asked for"), b"not asked for"), *blocks],
        lambda blocks: blocks[:3],
        lambda blocks: blocks[:1],
    ],
    ids=["reversed", "twice", "extra", "cut between blocks", "root only"],
)
async def test_order_doubles_extras_and_gaps_do_no_harm(
    published: Published, tmp_path: Path, order: Callable[[Blocks], Blocks]
) -> None:
    async with listening(Gateway(published, order)) as source:
        await fetch(
            published.root,
            tmp_path / "into",
            blocks=BlockStore(tmp_path / "blocks"),
            sources=[source],
        )
    assert same(published, tmp_path / "into")
    assert b"not asked for" not in kept(tmp_path / "blocks")


async def test_what_was_kept_is_not_fetched_again(published: Published, tmp_path: Path) -> None:
    where = tmp_path / "blocks"
    first = BlockStore(where)
    for cid, data in published.blocks[:-2]:
        first.put(cid, data, "an earlier run")
    gateway = Gateway(published)
    async with listening(gateway) as source:
        await fetch(published.root, tmp_path / "into", blocks=BlockStore(where), sources=[source])
    assert gateway.asked == ["raw", "raw"]
    assert same(published, tmp_path / "into")


@pytest.mark.parametrize("damage", [b"", b"another"])
async def test_a_block_damaged_on_disk_is_fetched_again(
    published: Published, tmp_path: Path, damage: bytes
) -> None:
    where = tmp_path / "blocks"
    first = BlockStore(where)
    for cid, data in published.blocks:
        first.put(cid, data, "an earlier run")
    path = where / published.blocks[-1][0].multihash.hex()
    path.write_bytes(damage)
    async with listening(Gateway(published)) as source:
        await fetch(published.root, tmp_path / "into", blocks=BlockStore(where), sources=[source])
    assert same(published, tmp_path / "into")


async def test_nobody_has_it(published: Published, tmp_path: Path) -> None:
    empty = Gateway(Published(published.root, [], published.folder))
    async with listening(empty) as source:
        with pytest.raises(ContentNotFound, match=f"{published.root}.*404"):
            await fetch(
                published.root,
                tmp_path / "into",
                blocks=BlockStore(tmp_path / "blocks"),
                sources=[source, GatewaySource("http://127.0.0.1:9")],
            )


async def test_a_cancelled_fetch_leaves_no_folder(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(Gateway(published, stalled)) as source:
        task = asyncio.create_task(
            fetch(
                published.root,
                tmp_path / "into",
                blocks=BlockStore(tmp_path / "blocks"),
                sources=[source],
            )
        )
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not [path for path in tmp_path.iterdir() if "into" in path.name]


# Trees that are verified and still hostile.


def node(links: list[Link], data: bytes) -> car.Block:
    block = unixfs._encode_node(links, data)
    return CID.of(DAG_PB, block), block


def raw(data: bytes) -> car.Block:
    return CID.of(RAW, data), data


def directory(*entries: tuple[str, CID]) -> car.Block:
    return node([Link(cid, name, 0) for name, cid in entries], b"\x08\x01")


LEAF = raw(b"leaf")
FILE_OF_4 = b"\x08\x02\x18\x04\x20\x04"


def bombs() -> Iterable[tuple[str, type[IpfsError], Blocks]]:
    for name in ("..", ".", "a/b", "a\\b", "a\0b", "", "x" * 256):
        yield f"name {name[:5]!r}", BadDAG, [directory((name, LEAF[0])), LEAF]
    for twins in (("a", "a"), ("a", "A"), ("\u00e9", "e\u0301"), ("\u212b", "\u00e5")):
        yield f"twins {twins}", BadDAG, [directory(*((name, LEAF[0]) for name in twins)), LEAF]
    yield "symlink", BadDAG, [node([], b"\x08\x04\x12\x0b/etc/passwd")]
    yield "no unixfs", BadDAG, [node([], b"")]
    yield "metadata", BadDAG, [node([], b"\x08\x03")]
    yield "more sizes than links", BadDAG, [node([], FILE_OF_4)]
    yield "named part", BadDAG, [node([Link(LEAF[0], "x", 4)], FILE_OF_4), LEAF]
    yield (
        "wrong filesize",
        BadDAG,
        [node([Link(LEAF[0], "", 4)], b"\x08\x02\x18\x05\x20\x04"), LEAF],
    )
    yield (
        "wrong blocksize",
        BadDAG,
        [node([Link(LEAF[0], "", 4)], b"\x08\x02\x18\x05\x20\x05"), LEAF],
    )
    yield (
        "a directory in a file",
        BadDAG,
        [
            node([Link(directory()[0], "", 4)], FILE_OF_4),
            directory(),
        ],
    )
    yield "bad fanout", BadDAG, [node([], b"\x08\x05\x30\x07")]
    shards = [node([], b"\x08\x05\x30\x80\x02")]
    for _ in range(20):
        shards.append(
            node([Link(shards[-1][0], f"{i:02X}", 0) for i in range(3)], b"\x08\x05\x30\x80\x02")
        )
    yield "shards of shards", BadDAG, shards[::-1]
    huge = varint.encode(1 << 40)
    yield (
        "a terabyte",
        ContentTooLarge,
        [
            node([Link(LEAF[0], "", 4)], b"\x08\x02\x18" + huge + b"\x20" + huge),
            LEAF,
        ],
    )
    deep = [directory()]
    for _ in range(40):
        deep.append(directory(("d", deep[-1][0])))
    yield "too deep", ContentTooLarge, deep[::-1]
    wide = [LEAF]
    for _ in range(20):
        wide.append(directory(*((str(i), wide[-1][0]) for i in range(10))))
    yield "a tree of trees", ContentTooLarge, wide[::-1]
    doubled = [raw(b"x" * 1024)]
    size = 1024
    for _ in range(40):
        part = varint.encode(size)
        size *= 2
        data = b"\x08\x02\x18" + varint.encode(size) + b"\x20" + part + b"\x20" + part
        doubled.append(node([Link(doubled[-1][0], "", 0)] * 2, data))
    yield "one leaf a billion times", ContentTooLarge, doubled[::-1]


@pytest.mark.parametrize(
    ("error", "blocks"), [it[1:] for it in bombs()], ids=[it[0] for it in bombs()]
)
async def test_a_hostile_tree_is_refused(
    tmp_path: Path, error: type[IpfsError], blocks: Blocks
) -> None:
    path = tmp_path / "hostile.car"
    with path.open("wb") as file:
        car.write(file, blocks[0][0], blocks)
    with pytest.raises(error):
        await fetch(
            blocks[0][0],
            tmp_path / "into",
            blocks=BlockStore(tmp_path / "blocks"),
            sources=[CarSource(path)],
            limits=Limits(bytes=64 << 20, files=200, total_s=20),
        )
    assert not (tmp_path / "into").exists()


async def test_inline_data_shards_and_empty_files_are_read(tmp_path: Path) -> None:
    inline = CID(RAW, 0, b"inside the CID")
    empty, in_file = raw(b""), node([], b"\x08\x02\x12\x02hi\x18\x02")
    names = [Link(inline, "0Finline", 0), Link(empty[0], "A0empty", 0)]
    shard = node([*names, Link(in_file[0], "B1a..b", 0)], b"\x08\x05\x30\x80\x02")
    inner = node([Link(shard[0], "1C", 0)], b"\x08\x05\x30\x80\x02")
    path = tmp_path / "shards.car"
    with path.open("wb") as file:
        car.write(file, inner[0], [inner, shard, empty, in_file])
    await fetch(
        inner[0],
        tmp_path / "into",
        blocks=BlockStore(tmp_path / "blocks"),
        sources=[CarSource(path)],
    )
    found = {path.name: path.read_bytes() for path in (tmp_path / "into").iterdir()}
    assert found == {"inline": b"inside the CID", "empty": b"", "a..b": b"hi"}


async def test_a_lone_file_is_written_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x" * (CHUNK + 1))
    root = pack(tmp_path / "one", tmp_path / "one.car")
    await fetch(
        root,
        tmp_path / "into",
        blocks=BlockStore(tmp_path / "blocks"),
        sources=[CarSource(tmp_path / "one.car")],
    )
    assert (tmp_path / "into").read_bytes() == b"x" * (CHUNK + 1)
