"""Where blocks come from: an IPFS daemon, a trustless gateway, a CAR file. None is trusted.

https://docs.ipfs.tech/reference/kubo/rpc/ and https://specs.ipfs.tech/http-gateways/trustless-gateway/
"""

import asyncio
import functools
import ssl
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Protocol

import httpx

from r3mes_vllm.errors import SourceFailed
from r3mes_vllm.ipfs.car import BLOCK_LIMIT, Block, CarReader, read_file
from r3mes_vllm.ipfs.cid import CID

_CONNECT_S = 5.0
_STALL_S = 30.0
"""Without a byte for so long, a source has failed."""

_DAEMON_TIMEOUT = "25s"  # the daemon's own: without it, it looks for a missing CID for ever
_CAR = "application/vnd.ipld.car"
_RAW = "application/vnd.ipld.raw"


class Source(Protocol):
    """`name` stands in errors and progress. Both calls raise SourceFailed, and BlockMismatch or
    BadCAR when the source lies."""

    name: str

    def car(self, root: CID) -> AsyncGenerator[Block, None]:
        """Verified blocks under `root`: in any order, perhaps others too, perhaps not all."""

    async def block(self, cid: CID) -> bytes:
        """One verified block."""


class CarSource:
    """A CAR file on this machine."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path

    async def car(self, root: CID) -> AsyncGenerator[Block, None]:
        blocks = read_file(self._path)
        try:
            while (block := await asyncio.to_thread(next, blocks, None)) is not None:
                yield block
        except OSError as error:
            raise SourceFailed(f"can't read {self._path}: {error.strerror}") from error

    async def block(self, cid: CID) -> bytes:
        async with aclosing(self.car(cid)) as blocks:
            async for found, data in blocks:
                if found == cid:
                    return data
        raise SourceFailed(f"{self.name} does not hold {cid}")


class _HttpSource(ABC):
    """What the two kinds of HTTP source share; `url` without a trailing slash."""

    method: str

    def __init__(self, url: str) -> None:
        self.name = url
        self._url = url.rstrip("/")

    @abstractmethod
    def _car_request(self, root: CID) -> dict[str, object]: ...

    @abstractmethod
    def _block_request(self, cid: CID) -> dict[str, object]: ...

    async def car(self, root: CID) -> AsyncGenerator[Block, None]:
        reader = CarReader(self.name)
        async with self._open(self._car_request(root)) as response:
            async for data in response.aiter_raw():
                for block in await asyncio.to_thread(reader.feed, data):
                    yield block
        reader.close()

    async def block(self, cid: CID) -> bytes:
        data = bytearray()
        async with self._open(self._block_request(cid)) as response:
            async for part in response.aiter_raw():
                data += part
                if len(data) > BLOCK_LIMIT:
                    raise SourceFailed(f"{self.name} sent a block over {BLOCK_LIMIT} bytes")
        cid.check(bytes(data), self.name)
        return bytes(data)

    @asynccontextmanager
    async def _open(self, request: dict[str, object]) -> AsyncIterator[httpx.Response]:
        timeout = httpx.Timeout(_STALL_S, connect=_CONNECT_S)
        try:
            async with (
                httpx.AsyncClient(timeout=timeout, trust_env=False, verify=_tls()) as client,
                client.stream(self.method, **request) as response,  # type: ignore[arg-type]
            ):
                if response.status_code != 200:
                    await _refuse(self.name, response)
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise SourceFailed(f"{self.name} sent it compressed, unasked")
                yield response
        except httpx.TimeoutException as error:
            raise SourceFailed(f"{self.name} sent nothing for {_STALL_S:.0f} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise SourceFailed(f"{self.name}: {reason}") from error


class KuboSource(_HttpSource):
    """The RPC API of a local daemon (Kubo, js-ipfs)."""

    method = "POST"

    def _car_request(self, root: CID) -> dict[str, object]:
        return self._request("dag/export", root)

    def _block_request(self, cid: CID) -> dict[str, object]:
        return self._request("block/get", cid)

    def _request(self, command: str, cid: CID) -> dict[str, object]:
        params = {"arg": str(cid), "timeout": _DAEMON_TIMEOUT}
        return {
            "url": f"{self._url}/api/v0/{command}",
            "params": params,
            "headers": {"Accept-Encoding": "identity"},
        }


class GatewaySource(_HttpSource):
    """A trustless gateway: only CARs and raw blocks are asked for, which can be checked."""

    method = "GET"

    def _car_request(self, root: CID) -> dict[str, object]:
        return self._request(root, "car", f"{_CAR}; version=1; order=dfs; dups=n")

    def _block_request(self, cid: CID) -> dict[str, object]:
        return self._request(cid, "raw", _RAW)

    def _request(self, cid: CID, form: str, accept: str) -> dict[str, object]:
        return {
            "url": f"{self._url}/ipfs/{cid}",
            "params": {"format": form},
            "headers": {"Accept": accept, "Accept-Encoding": "identity"},
        }


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # takes longer than a request


async def _refuse(name: str, response: httpx.Response) -> None:
    if response.is_redirect:
        raise SourceFailed(f"{name} sends elsewhere, which is not followed")
    if response.status_code == 429:
        wait = response.headers.get("retry-after", "a while")
        raise SourceFailed(f"{name} has too many requests: try again after {wait}")
    raise SourceFailed(f"{name} answered {response.status_code}")
