"""A trustless gateway on loopback, honest or not: `lie` says what it does to its answers."""

import asyncio
import gzip
import io
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from r3mes_vllm.ipfs import car, varint
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.ipfs.pack import CHUNK, pack
from r3mes_vllm.ipfs.sources import GatewaySource
from tests.programs import free_port

Blocks = list[car.Block]
Lie = Callable[[Blocks], Blocks | Response]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Published:
    root: CID
    blocks: Blocks
    folder: Path

    def into(self, written: Path) -> bool:
        """Whether `written` is the same folder."""
        here = {path.relative_to(self.folder) for path in self.folder.rglob("*")}
        there = {path.relative_to(written) for path in written.rglob("*")}
        return here == there and all(
            (written / path).read_bytes() == (self.folder / path).read_bytes()
            for path in here
            if (self.folder / path).is_file()
        )


def publish(folder: Path, *, leaves: int = 5) -> Published:
    """A new folder with a small file and one of some leaves."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_bytes(os.urandom(leaves * CHUNK + 17))
    return packed(folder)


def packed(folder: Path) -> Published:
    root = pack(folder, folder.with_suffix(".car"))
    return Published(root, list(car.read_file(folder.with_suffix(".car"))), folder)


@dataclass
class Gateway:
    published: Published
    lie: Lie | None = None
    pause_s: float = 0.0
    """Before each answer."""
    forms: tuple[str, ...] = ("car", "raw")
    """That it knows."""
    asked: list[str] = field(default_factory=list)

    async def answer(self, request: Request) -> Response:
        cid = CID.parse(request.path_params["cid"])
        form = request.query_params["format"]
        self.asked.append(form)
        await asyncio.sleep(self.pause_s)
        if form not in self.forms:
            return Response("no such format", 406)
        whole = form == "car" and request.query_params.get("dag-scope") != "block"
        found = [block for block in self.published.blocks if whole or block[0] == cid]
        if not found:
            return Response("not found", 404)
        told = self.lie(found) if self.lie else found
        if isinstance(told, Response):
            return told
        if form == "raw":
            return Response(told[0][1], media_type="application/vnd.ipld.raw")
        return Response(car_of(told), media_type="application/vnd.ipld.car")


def car_of(blocks: Blocks) -> bytes:
    file = io.BytesIO()
    car.write(file, blocks[0][0], blocks)
    return file.getvalue()


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


@asynccontextmanager
async def bare(serve: Serve) -> AsyncIterator[GatewaySource]:
    """One whose HTTP is what `serve` says to each connection."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield GatewaySource(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        server.close()


def flip(blocks: Blocks) -> Blocks:
    cid, data = blocks[-1]
    return [*blocks[:-1], (cid, bytes([data[0] ^ 1]) + data[1:])]


def swap(blocks: Blocks) -> Blocks:
    return [*blocks[:-1], (blocks[-1][0], blocks[0][1] + b"x")]


def compress(blocks: Blocks) -> Response:
    return Response(gzip.compress(car_of(blocks)), headers={"content-encoding": "gzip"})


def truncate(blocks: Blocks) -> Response:
    whole = car_of(blocks)
    return Response(whole[: len(whole) * 2 // 3])


def truncate_with_words(blocks: Blocks) -> Response:
    """As Kubo's gateway ends an answer that it can't complete."""
    whole = car_of(blocks)
    return Response(whole[: len(whole) // 2] + b"\n[Gateway Error: Response truncated\n")


def endless(blocks: Blocks) -> Response:
    async def body() -> AsyncIterator[bytes]:
        yield car_of(blocks)[:1]
        head = io.BytesIO()
        car.write(head, blocks[0][0], [])
        yield head.getvalue()[1:]
        for number in range(1 << 30):
            data = number.to_bytes(4, "big") * (1 << 18)
            name = bytes(CID.of(RAW, data))
            yield varint.encode(len(name) + len(data)) + name + data
            await asyncio.sleep(0)

    return StreamingResponse(body())


def stall(blocks: Blocks) -> Response:
    async def body() -> AsyncIterator[bytes]:
        yield car_of(blocks)[:1]
        await asyncio.sleep(3600)

    return StreamingResponse(body())


def trickle(blocks: Blocks) -> Response:
    async def body() -> AsyncIterator[bytes]:
        for byte in car_of(blocks):
            yield bytes([byte])
            await asyncio.sleep(0.05)

    return StreamingResponse(body())


LIES: dict[str, Lie] = {
    "flip": flip,
    "swap": swap,
    "gzip": compress,
    "endless": endless,
    "stall": stall,
    "trickle": trickle,
    "redirect": lambda _: RedirectResponse("http://127.0.0.1:9/elsewhere"),
    "busy": lambda _: Response(status_code=429, headers={"retry-after": "700"}),
    "html": lambda _: Response("<html>captcha</html>", media_type="text/html"),
    "not html": lambda _: Response("<html>captcha</html>"),
    "empty": lambda _: Response(b""),
    "500": lambda _: Response("no", 500),
}
