"""Where blocks come from: a folder of blocks, a CAR file, an IPFS daemon, a trustless gateway.

None is trusted: what they give is checked by who asks. https://docs.ipfs.tech/reference/kubo/rpc/
and https://specs.ipfs.tech/http-gateways/trustless-gateway/
"""

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

from yarl import URL

from r3mes_vllm.errors import BadCAR, SourceFailed
from r3mes_vllm.ipfs.blockstore import BlockStore
from r3mes_vllm.ipfs.car import BLOCK_LIMIT, Block, CarFile, CarReader
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.http import Exchange

_CAR = "application/vnd.ipld.car"
_RAW = "application/vnd.ipld.raw"
_ANSWER_LIMIT = 1 << 16

_FIRST_BACK_OFF_S = 60.0
_LONGEST_BACK_OFF_S = 86_400.0


@dataclass
class Standing:
    """Whether a source may be asked; kept from one fetch to the next."""

    lies: int = 0
    until: float = 0.0
    """Not before then, by `time.monotonic`."""
    reason: str = ""

    @property
    def wait_s(self) -> float:
        return max(0.0, self.until - time.monotonic())

    def lied(self) -> None:
        """Leave it alone for a minute, and each time for twice as long, up to a day."""
        pause = min(_FIRST_BACK_OFF_S * 2**self.lies, _LONGEST_BACK_OFF_S)
        self.lies = min(self.lies + 1, 32)
        self.until, self.reason = time.monotonic() + pause, "it gave wrong bytes"

    def busy(self, pause: float) -> None:
        """It asked for `pause` seconds without requests."""
        self.until, self.reason = time.monotonic() + pause, "it asked for a pause"


class Source(Protocol):
    """`name` stands in errors and progress. Both calls raise SourceFailed, and the first BadCAR."""

    name: str
    standing: Standing
    at_once: int
    """Blocks to ask for at a time."""

    def car(self, root: CID, exchange: Exchange) -> AsyncGenerator[list[Block], None]:
        """Unchecked blocks under `root`: in any order, perhaps others too, perhaps not all."""

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

    async def car(self, root: CID, exchange: Exchange) -> AsyncGenerator[list[Block], None]:
        try:
            with self._path.open("rb") as file:
                reader = CarReader(self.name)
                while data := await asyncio.to_thread(file.read, 1 << 20):
                    yield reader.feed(data)
                reader.close()
        except OSError as error:
            raise SourceFailed(f"can't read {self._path}: {error.strerror}") from error

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


class BlocksSource:
    """A folder of blocks, such as `blocks` in the repository of a Kubo that isn't running."""

    at_once = 4

    def __init__(self, directory: Path) -> None:
        self.name = str(directory)
        self.standing = Standing()
        self._blocks = BlockStore(directory)

    async def car(self, root: CID, exchange: Exchange) -> AsyncGenerator[list[Block], None]:
        yield [(root, await self.block(root, exchange))]

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
    """What the two kinds of HTTP source share; `url` without a trailing slash."""

    at_once = 8

    def __init__(self, url: str) -> None:
        try:
            self.name = str(URL(url).with_user(None))
        except ValueError:
            self.name = url
        self.standing = Standing()
        self._url = url.rstrip("/")

    @abstractmethod
    def _car_request(self, root: CID, exchange: Exchange) -> _Request: ...

    @abstractmethod
    def _block_request(self, cid: CID, exchange: Exchange) -> _Request: ...

    async def car(self, root: CID, exchange: Exchange) -> AsyncGenerator[list[Block], None]:
        reader = CarReader(self.name)
        async with exchange.ask(self.name, **self._car_request(root, exchange)) as body:
            async for data in body:
                yield reader.feed(data)
        reader.close()

    async def block(self, cid: CID, exchange: Exchange) -> bytes:
        request = self._block_request(cid, exchange)
        return await _whole(exchange, self.name, request, BLOCK_LIMIT)


class KuboSource(_HttpSource):
    """The RPC API of a local daemon (Kubo, js-ipfs)."""

    def _car_request(self, root: CID, exchange: Exchange) -> _Request:
        # The daemon's time-out is for the whole command.
        return self._request("dag/export", root, exchange.limits.total_s)

    def _block_request(self, cid: CID, exchange: Exchange) -> _Request:
        # Without one, it looks for a missing block for ever.
        return self._request("block/get", cid, exchange.limits.stall_s)

    async def import_car(self, path: Path, exchange: Exchange) -> None:
        """Give the blocks of the CAR file to the daemon. Raises SourceFailed, and OSError."""
        url = f"{self._url}/api/v0/dag/import?pin-roots=false"
        with path.open("rb") as file:
            async with exchange.ask(self.name, "POST", url, upload={"file": file}) as body:
                async for _ in body:
                    pass

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
        return {"method": "POST", "url": f"{self._url}/api/v0/{command}?{query}", "headers": {}}


class GatewaySource(_HttpSource):
    """A trustless gateway: only CARs and raw blocks are asked for, which can be checked."""

    def _car_request(self, root: CID, exchange: Exchange) -> _Request:
        return self._request(root, "car", f"{_CAR}; version=1; order=dfs; dups=n")

    def _block_request(self, cid: CID, exchange: Exchange) -> _Request:
        return self._request(cid, "raw", _RAW)

    def _request(self, cid: CID, form: str, accept: str) -> _Request:
        url = f"{self._url}/ipfs/{cid}?format={form}"
        return {"method": "GET", "url": url, "headers": {"Accept": accept}}


async def _whole(exchange: Exchange, name: str, request: _Request, limit: int) -> bytes:
    data = bytearray()
    async with exchange.ask(name, **request) as body:
        async for part in body:
            data += part
            if len(data) > limit:
                raise SourceFailed(f"{name} sent more than {limit} bytes")
    return bytes(data)
