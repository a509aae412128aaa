"""The HTTP of one fetch, with answers from servers that nobody trusts.

aiohttp rather than httpx: 3 GB/s against 1.2 GB/s of a body read from loopback, and a fetch is
all body. Nothing is decompressed, no redirect leads elsewhere, and a body that trickles has failed.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import isfinite
from typing import BinaryIO

import aiohttp
from yarl import URL

from r3mes_vllm.errors import SourceBusy, SourceFailed
from r3mes_vllm.ipfs.tree import Limits

_CONNECT_S = 5.0
_BUFFER = 1 << 20
_SLOWEST = 1024
"""Bytes a second; less than this over `stall_s` is a stall."""

_REDIRECTS = 3
_LONGEST_PAUSE_S = 3600.0
_SHORT_PAUSE_S = 5.0


@asynccontextmanager
async def exchange(limits: Limits) -> AsyncIterator["Exchange"]:
    """The connections of one fetch."""
    stall = limits.stall_s
    async with aiohttp.ClientSession(
        auto_decompress=False,
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity", "User-Agent": "r3mes-vllm"},
        read_bufsize=_BUFFER,
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=min(_CONNECT_S, stall), sock_read=stall
        ),
    ) as session:
        yield Exchange(session, limits)


class Exchange:
    def __init__(self, session: aiohttp.ClientSession, limits: Limits) -> None:
        self.limits = limits
        self._session = session

    @asynccontextmanager
    async def ask(
        self,
        name: str,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        upload: Mapping[str, BinaryIO] | None = None,
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """The body of a 200, as it comes. Raises SourceFailed, here or while it is read, and
        SourceBusy when the server says when to come again."""
        target = URL(url)
        try:
            for _ in range(_REDIRECTS + 1):
                async with self._session.request(
                    method, target, headers=headers, data=upload, allow_redirects=False
                ) as response:
                    if 300 <= response.status < 400:
                        target = _followed(name, target, response)
                        continue
                    _require_plain_200(name, response)
                    body = self._body(name, response)
                    try:
                        yield body
                    finally:
                        await body.aclose()
                    return
            raise SourceFailed(f"{name} redirects more than {_REDIRECTS} times")
        except TimeoutError as error:
            raise SourceFailed(f"{name} sent nothing for {self.limits.stall_s:g} s") from error
        except (aiohttp.ClientError, ValueError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise SourceFailed(f"{name}: {reason}") from error

    async def _body(
        self, name: str, response: aiohttp.ClientResponse
    ) -> AsyncGenerator[bytes, None]:
        stall = self.limits.stall_s
        since, came = time.monotonic(), 0
        async for data, _ in response.content.iter_chunks():  # as received, not joined
            came += len(data)
            if (now := time.monotonic()) - since > stall:
                if came < _SLOWEST * stall:
                    raise SourceFailed(f"{name} sent only {came} bytes in {now - since:.0f} s")
                since, came = now, 0
            yield data


def _followed(name: str, asked: URL, response: aiohttp.ClientResponse) -> URL:
    """Gateways send a CID's requests to a host of its own below theirs; anywhere else is refused,
    since it could be a service on this machine's own network."""
    there = asked.join(URL(response.headers.get("location", "")))
    here = asked.host or ""
    same_port = there.port == asked.port or (there.scheme, there.port) == ("https", 443)
    below = there.host == here or (there.host or "").endswith(f".{here}")
    safe = there.scheme == asked.scheme or there.scheme == "https"
    if not (here and same_port and below and safe):
        raise SourceFailed(
            f"{name} sends elsewhere, to {there.host}:{there.port}, which is not followed"
        )
    return there


def _require_plain_200(name: str, response: aiohttp.ClientResponse) -> None:
    if response.status in (429, 503):
        pause = _pause(response.headers.get("retry-after"))
        if response.status == 429 or pause is not None:
            pause = _SHORT_PAUSE_S if pause is None else pause
            raise SourceBusy(
                f"{name} answered {response.status}: not before {pause:.0f} s", retry_after=pause
            )
    if response.status != 200:
        raise SourceFailed(f"{name} answered {response.status}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise SourceFailed(f"{name} sent it compressed, unasked")
    if response.content_type == "text/html":
        raise SourceFailed(f"{name} answered with a page of HTML: is it a trustless gateway?")


def _pause(value: str | None) -> float | None:
    """Seconds, from a `Retry-After` in seconds or with a date (RFC 9110)."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), _LONGEST_PAUSE_S) if isfinite(seconds) else None
