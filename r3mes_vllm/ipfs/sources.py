"""Where blocks come from: a folder of blocks, a CAR file, an IPFS daemon, a trustless gateway.

None is trusted: what they give is checked by who asks. https://docs.ipfs.tech/reference/kubo/rpc/
and https://specs.ipfs.tech/http-gateways/trustless-gateway/
"""

import asyncio
import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Protocol, TypedDict

from r3mes_vllm.errors import BadCAR, SourceFailed, SourceShaky
from r3mes_vllm.ipfs.blockstore import BlockStore
from r3mes_vllm.ipfs.car import BLOCK_LIMIT, CarFile, CarReader, LentBlock
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.http import Body, Exchange
from r3mes_vllm.urls import public

_CAR = "application/vnd.ipld.car"
_RAW = "application/vnd.ipld.raw"
_ANSWER_LIMIT = 1 << 16

_FIRST_BACK_OFF_S = 60.0
_LONGEST_BACK_OFF_S = 86_400.0
_FORGOTTEN_S = 3600.0
_DOUBTS = 3
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0

_GROWTH, _RARE_GROWTH = 4, 64
"""Blocks for each request at a time, before one more is tried."""

_counting = threading.Lock()


@dataclass
class Standing:
    """Whether a source may be asked; kept from one fetch to the next."""

    lies: int = 0
    alone_until: float = 0.0
    """For the last of them."""
    doubts: int = 0
    """Blocks in a row that may have been cut short."""
    refusals: int = 0
    """In a row, for being busy."""
    until: float = 0.0
    """Not before then, by `time.monotonic`."""
    reason: str = ""
    bytes: int = 0
    """Of blocks that it gave, and that were what their CIDs say."""
    bears: int = 1 << 10
    """Requests of a fetch at a time: fewer after it failed under more."""
    borne: int = 0
    """Blocks that came with so many at a time."""
    strict: bool = False
    """It once asked for a pause, which takes long: that more is tried is rare."""

    @property
    def wait_s(self) -> float:
        return max(0.0, self.until - time.monotonic())

    def lied(self) -> None:
        """Leave it alone for a minute, and each time for twice as long, up to a day; for each
        hour since the last time's end one is forgotten."""
        forgotten = (time.monotonic() - self.alone_until) // _FORGOTTEN_S
        self.lies = max(0, self.lies - max(0, int(forgotten)))
        pause = min(_FIRST_BACK_OFF_S * 2**self.lies, _LONGEST_BACK_OFF_S)
        self.lies = min(self.lies + 1, 32)
        self.alone_until = time.monotonic() + pause
        self._leave_alone(pause, "it gave wrong bytes")

    def busy(self, pause: float) -> None:
        """It asked for `pause` seconds without requests; it gets a second, and each time in a row
        twice as much, up to a minute, if that is more."""
        if not self.wait_s:  # else it was asked before it said so to another
            self.refusals = min(self.refusals + 1, 32)
        self.strict = True
        least = min(_FIRST_PAUSE_S * 2 ** (self.refusals - 1), _LONGEST_PAUSE_S)
        self._leave_alone(max(pause, least), "it asked for a pause")

    def gave(self, count: int) -> None:
        """So many bytes. Called in several threads: each fetch has its own."""
        with _counting:
            self.bytes += count

    def useful(self) -> None:
        """It gave a block that was wanted."""
        self.refusals = self.doubts = 0

    def strained(self, at_once: int) -> None:
        """It failed under `at_once` requests, or what it bears if that is less."""
        self.bears, self.borne = max(1, min(self.bears, at_once) // 2), 0

    def bore(self) -> None:
        """It gave a block with as many requests at a time as it is known to bear."""
        self.borne += 1
        if self.borne >= (_RARE_GROWTH if self.strict else _GROWTH) * self.bears:
            self.bears, self.borne = self.bears + 1, 0

    def _leave_alone(self, pause: float, reason: str) -> None:
        if pause > self.wait_s:
            self.until, self.reason = time.monotonic() + pause, reason


Fill = Callable[[memoryview, float], Awaitable[list[LentBlock]]]
"""As `CarReader.fill`, without holding up the loop."""


class Source(Protocol):
    """`name` stands in errors and progress. Both calls raise SourceFailed, and so does what the
    first gives, and BadCAR."""

    name: str
    standing: Standing
    at_once: int
    """Blocks to ask for at a time."""

    def car(
        self, root: CID, exchange: Exchange, *, alone: bool = False
    ) -> AbstractAsyncContextManager[Fill]:
        """Unchecked blocks under `root`: in any order, perhaps others too, perhaps not all; only
        its own if it is wanted `alone` and the source can tell."""

    async def block(self, cid: CID, exchange: Exchange) -> bytes:
        """One unchecked block."""


class CarSource:
    """A CAR file on this machine."""

    at_once = 1

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        self.name = name or path.name
        self.standing = Standing()
        self._path = path
        self._file: CarFile | None = None

    @asynccontextmanager
    async def car(
        self, root: CID, exchange: Exchange, *, alone: bool = False
    ) -> AsyncIterator[Fill]:
        try:
            file = self._path.open("rb")
        except OSError as error:
            raise SourceFailed(f"can't read {self._path}: {error.strerror}") from error
        with file:
            reader = CarReader(_Readable(file, self._path), self.name)
            yield lambda *room: asyncio.to_thread(reader.fill, *room)

    async def block(self, cid: CID, exchange: Exchange) -> bytes:
        try:
            data = await asyncio.to_thread(self._read, cid)
        except (OSError, BadCAR) as error:
            raise SourceFailed(f"can't read {self._path}: {error}") from error
        if data is None:
            raise SourceFailed(f"{self.name} does not hold {cid}")
        return data

    def _read(self, cid: CID) -> bytes | None:
        self._file = self._file or CarFile(self._path)
        return self._file.block(cid)


class _Readable:
    """Raises SourceFailed where the file raises OSError."""

    def __init__(self, file: BufferedReader, path: Path) -> None:
        self._file = file
        self._path = path

    def readinto(self, buffer: memoryview) -> int:
        try:
            return self._file.readinto(buffer)
        except OSError as error:
            raise SourceFailed(f"can't read {self._path}: {error.strerror}") from error


class BlocksSource:
    """A folder of blocks, such as `blocks` in the repository of a Kubo that isn't running."""

    at_once = 4

    def __init__(self, directory: Path) -> None:
        self.name = str(directory)
        self.standing = Standing()
        self._blocks = BlockStore(directory)

    @asynccontextmanager
    async def car(
        self, root: CID, exchange: Exchange, *, alone: bool = False
    ) -> AsyncIterator[Fill]:
        blocks: list[LentBlock] = [(root, await self.block(root, exchange))]

        async def fill(buffer: memoryview, patience_s: float) -> list[LentBlock]:
            given, blocks[:] = list(blocks), []
            return given

        yield fill

    async def block(self, cid: CID, exchange: Exchange) -> bytes:
        try:
            data = await asyncio.to_thread(self._blocks.get, cid)
        except OSError as error:
            raise SourceFailed(f"can't read {self.name}: {error.strerror}") from error
        if data is None:
            raise SourceFailed(f"{self.name} does not hold {cid}")
        return data


class _Request(TypedDict):
    method: str
    url: str
    headers: dict[str, str]


class _HttpSource(ABC):
    """What the two kinds of HTTP source share. The query of `url` is part of every request."""

    at_once = 8

    def __init__(self, url: str) -> None:
        self.name = public(url)
        self.standing = Standing()
        plain = url.partition("#")[0]
        self._url, _, self._query = plain.partition("?")
        self._url = self._url.rstrip("/")

    @abstractmethod
    def _car_request(self, root: CID, exchange: Exchange, alone: bool) -> _Request: ...

    @abstractmethod
    def _block_request(self, cid: CID, exchange: Exchange) -> _Request: ...

    def _at(self, path: str, query: str) -> str:
        return f"{self._url}{path}?{query}" + (f"&{self._query}" if self._query else "")

    @asynccontextmanager
    async def car(
        self, root: CID, exchange: Exchange, *, alone: bool = False
    ) -> AsyncIterator[Fill]:
        async with exchange.ask(self.name, **self._car_request(root, exchange, alone)) as body:
            reader = CarReader(body, self.name)
            yield lambda *room: body.connection.call(reader.fill, *room)

    async def block(self, cid: CID, exchange: Exchange) -> bytes:
        request = self._block_request(cid, exchange)
        async with exchange.ask(self.name, **request) as body:
            data = await body.connection.call(body.whole, BLOCK_LIMIT)
        if (body.is_text or body.has_no_end) and not cid.matches(data):
            self._require_honest(body, cid)
        return data

    def _require_honest(self, body: Body, cid: CID) -> None:
        """Raises SourceFailed where bytes that are not the block's need not be a lie."""
        if body.is_text:
            raise SourceFailed(f"{self.name} answered with a page, not a block")
        self.standing.doubts += 1
        if self.standing.doubts < _DOUBTS:
            raise SourceShaky(f"{self.name} cut {cid} short, or gave wrong bytes", answered=True)


class KuboSource(_HttpSource):
    """The RPC API of a local daemon (Kubo, js-ipfs)."""

    def _car_request(self, root: CID, exchange: Exchange, alone: bool) -> _Request:
        # The daemon's time-out is for the whole command.
        return self._request("dag/export", root, exchange.limits.total_s)

    def _block_request(self, cid: CID, exchange: Exchange) -> _Request:
        # Without one, it looks for a missing block for ever.
        return self._request("block/get", cid, exchange.limits.stall_s)

    async def import_car(self, path: Path, exchange: Exchange) -> None:
        """Give the blocks of the CAR file to the daemon. Raises SourceFailed, and OSError."""
        url = self._at("/api/v0/dag/import", "pin-roots=false")
        with path.open("rb") as file:
            async with exchange.ask(self.name, "POST", url, upload=file) as body:
                await body.connection.call(body.whole, _ANSWER_LIMIT)

    async def pin(self, cid: CID, exchange: Exchange) -> None:
        """Keep it from the daemon's garbage collection. Raises SourceFailed."""
        request = self._request("pin/add", cid, exchange.limits.total_s)
        answer = await _whole(exchange, self.name, request, _ANSWER_LIMIT)
        try:
            pins = [CID.parse(text) for text in json.loads(answer)["Pins"]]
        except Exception as error:
            raise SourceFailed(f"{self.name} answered {answer[:200]!r} to pin/add") from error
        if cid not in pins:
            raise SourceFailed(f"{self.name} did not pin {cid}")

    def _request(self, command: str, cid: CID, timeout_s: float) -> _Request:
        query = f"arg={cid}&timeout={max(1, round(timeout_s))}s"
        return {"method": "POST", "url": self._at(f"/api/v0/{command}", query), "headers": {}}


class GatewaySource(_HttpSource):
    """A trustless gateway: only CARs and raw blocks are asked for, which can be checked. Its URL
    may end in `/ipfs`, as people copy it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._url = self._url.removesuffix("/ipfs").rstrip("/")

    def _car_request(self, root: CID, exchange: Exchange, alone: bool) -> _Request:
        form = "car&dag-scope=block" if alone else "car"
        return self._request(root, form, f"{_CAR}; version=1; order=dfs; dups=n")

    def _block_request(self, cid: CID, exchange: Exchange) -> _Request:
        return self._request(cid, "raw", _RAW)

    def _request(self, cid: CID, form: str, accept: str) -> _Request:
        url = self._at(f"/ipfs/{cid}", f"format={form}")
        return {"method": "GET", "url": url, "headers": {"Accept": accept}}


async def _whole(exchange: Exchange, name: str, request: _Request, limit: int) -> bytes:
    async with exchange.ask(name, **request) as body:
        return await body.connection.call(body.whole, limit)
