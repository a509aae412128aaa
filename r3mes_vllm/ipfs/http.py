"""The HTTP of one fetch, with answers from servers that nobody trusts.

Nothing is decompressed, no redirect leads elsewhere, and a body that trickles has failed.
"""

import base64
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, IncompleteRead
from math import isfinite
from typing import BinaryIO
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from r3mes_vllm.errors import SourceBusy, SourceFailed, SourceLacks, SourceShaky
from r3mes_vllm.ipfs.connection import Connection, Origin
from r3mes_vllm.ipfs.tree import Limits
from r3mes_vllm.urls import public

_LACKING = (400, 404, 406, 415, 501)
"""What servers answer that don't have a block, or that don't know the form it is asked for in."""

_SHAKY = (502, 503, 504)
_REDIRECTS = 3
_LONGEST_PAUSE_S = 3600.0
_SHORT_PAUSE_S = 5.0
_MOST_THREADS = 256
"""Started as they are needed, one for each request under way."""

_UPLOADED = 1 << 20
_BOUNDARY = "r3mes-vllm-upload"
_SAID = 200
"""Characters, of a server."""

_FAILURES = (HTTPException, OSError, ValueError)


@asynccontextmanager
async def exchange(limits: Limits) -> AsyncIterator["Exchange"]:
    """The connections of one fetch."""
    with ThreadPoolExecutor(_MOST_THREADS, "r3mes-http") as threads:
        it = Exchange(limits, threads)
        try:
            yield it
        finally:
            it.close()


class Body:
    """The body of a 200. What is read on a thread goes through `connection.call`."""

    def __init__(self, name: str, connection: Connection, response: HTTPResponse) -> None:
        self.connection = connection
        self._name = name
        self._response = response
        self.is_text = response.headers.get("content-type", "").strip().lower().startswith("text/")
        self.has_no_end = response.length is None and not response.chunked
        """It ends where the connection does, for whatever reason."""

    def readinto(self, buffer: memoryview) -> int:
        """As many bytes as `buffer` is long, fewer at the end. Raises SourceFailed."""
        try:
            came = self._response.readinto(buffer)
        except _FAILURES as error:
            raise _failed(self._name, error) from error
        if came < len(buffer) and self._response.length:
            raise SourceShaky(
                f"{self._name} ended {self._response.length} bytes early", answered=True
            )
        return came

    def whole(self, limit: int) -> bytes:
        """All of it, at most `limit` bytes. Raises SourceFailed."""
        data = memoryview(bytearray(limit + 1))
        length = 0
        while came := self.readinto(data[length:]):
            length += came
            if length > limit:
                raise SourceFailed(f"{self._name} sent more than {limit} bytes")
        return bytes(data[:length])


class Exchange:
    """Connections are used again, for one request at a time."""

    def __init__(self, limits: Limits, threads: ThreadPoolExecutor) -> None:
        self.limits = limits
        self._threads = threads
        self._idle: dict[Origin, list[Connection]] = {}

    @asynccontextmanager
    async def ask(
        self,
        name: str,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        upload: BinaryIO | None = None,
    ) -> AsyncIterator[Body]:
        """The body of a 200. Raises SourceFailed, and SourceBusy when the server says when to
        come again; what is raised while the body is read passes through."""
        try:
            connection, response = await self._answered(name, method, url, headers or {}, upload)
        except _FAILURES as error:
            raise _failed(name, error) from error
        try:
            yield Body(name, connection, response)
        finally:
            self._done_with(connection, response)

    def close(self) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.close()

    async def _answered(
        self,
        name: str,
        method: str,
        url: str,
        headers: Mapping[str, str],
        upload: BinaryIO | None,
    ) -> tuple[Connection, HTTPResponse]:
        for _ in range(_REDIRECTS + 1):
            target = urlsplit(url)
            connection, response = await self._requested(target, method, headers, upload)
            try:
                if not 300 <= response.status < 400:
                    _require_plain_200(name, response)
                    return connection, response
                url = _followed(name, url, response.headers.get("location", ""))
            except BaseException:
                connection.close()
                raise
            self._done_with(connection, response)
        raise SourceFailed(f"{name} redirects more than {_REDIRECTS} times")

    async def _requested(
        self, target: SplitResult, method: str, headers: Mapping[str, str], upload: BinaryIO | None
    ) -> tuple[Connection, HTTPResponse]:
        """The answer's status and headers; an open connection may turn out to be closed."""
        origin = _origin(target)
        while True:
            connection = self._take_idle(origin) or await Connection.open(
                origin, self.limits.stall_s, self._threads
            )
            try:
                response = await connection.call(
                    _request, connection, target, method, headers, upload
                )
            except BaseException as error:
                connection.close()
                if connection.used and isinstance(error, ConnectionError):
                    continue
                raise
            return connection, response

    def _take_idle(self, origin: Origin) -> Connection | None:
        connections = self._idle.get(origin, [])
        while connections:
            connection = connections.pop()
            if connection.idle:
                return connection
            connection.close()
        return None

    def _done_with(self, connection: Connection, response: HTTPResponse) -> None:
        reusable = response.isclosed() and not response.will_close
        response.close()
        if reusable:
            connection.used = True
            self._idle.setdefault(connection.origin, []).append(connection)
        else:
            connection.close()


def _failed(name: str, error: Exception) -> SourceFailed:
    unsaid = "no answer" if isinstance(error, TimeoutError) else type(error).__name__
    said = f"{name}: {_printable(str(error)) or unsaid}"
    if isinstance(error, IncompleteRead):
        return SourceShaky(said, answered=True)
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        return SourceShaky(said, answered=False)
    return SourceFailed(said)


def _printable(text: str) -> str:
    """What a server sent, as it may stand in an error."""
    return "".join(it if it.isprintable() else "?" for it in text[:_SAID])


def _origin(url: SplitResult) -> Origin:
    """Raises ValueError."""
    default = {"http": 80, "https": 443}.get(url.scheme)
    if default is None or not url.hostname:
        raise ValueError(f"{public(url.geturl())!r} is no http or https URL")
    return Origin(url.scheme, url.hostname, url.port or default)


def _request(
    connection: Connection,
    target: SplitResult,
    method: str,
    headers: Mapping[str, str],
    upload: BinaryIO | None,
) -> HTTPResponse:
    sent = {"User-Agent": "r3mes-vllm", "Accept-Encoding": "identity", **headers}
    if target.username is not None:
        user = f"{unquote(target.username)}:{unquote(target.password or '')}"
        sent["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    body: Iterator[bytes] | None = None
    if upload is not None:
        sent |= {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
        length, body = _multipart(upload)
        sent |= {"Content-Length": str(length)}
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    connection.http.request(method, path, body, sent)
    return connection.http.getresponse()


def _multipart(upload: BinaryIO) -> tuple[int, Iterator[bytes]]:
    """The file as a form of one field (RFC 7578), and its length."""
    head = (
        f"--{_BOUNDARY}\r\n"
        'Content-Disposition: form-data; name="file"; filename="file"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode()
    tail = f"\r\n--{_BOUNDARY}--\r\n".encode()

    def parts() -> Iterator[bytes]:
        upload.seek(0)
        yield head
        while data := upload.read(_UPLOADED):
            yield data
        yield tail

    return len(head) + os.fstat(upload.fileno()).st_size + len(tail), parts()


def _followed(name: str, asked: str, location: str) -> str:
    """Gateways send a CID's requests to a host of its own below theirs, which gets the user and the
    password too; anywhere else is refused, since it could be a service on this machine's own
    network."""
    there = urljoin(asked, location)
    before, after = _origin(urlsplit(asked)), _origin(urlsplit(there))
    same_port = after.port == before.port or (after.scheme, after.port) == ("https", 443)
    below = after.host == before.host or after.host.endswith(f".{before.host}")
    safe = after.scheme in (before.scheme, "https")
    if not (same_port and below and safe):
        where = f"{_printable(after.host)}:{after.port}"
        raise SourceFailed(f"{name} sends elsewhere, to {where}, which is not followed")
    user, at, _ = urlsplit(asked).netloc.rpartition("@")
    parts = urlsplit(there)
    return parts._replace(netloc=user + at + parts.netloc.rpartition("@")[2]).geturl()


def _require_plain_200(name: str, response: HTTPResponse) -> None:
    if response.status in (429, 503):
        pause = _pause(response.headers.get("retry-after"))
        if response.status == 429 or pause is not None:
            pause = _SHORT_PAUSE_S if pause is None else pause
            raise SourceBusy(
                f"{name} answered {response.status}: not before {pause:.0f} s", retry_after=pause
            )
    if response.status in _SHAKY:
        raise SourceShaky(f"{name} answered {response.status}", answered=True)
    if response.status in _LACKING:
        raise SourceLacks(f"{name} answered {response.status}", answered=response.status)
    if response.status != 200:
        raise SourceFailed(f"{name} answered {response.status}")
    if response.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise SourceFailed(f"{name} sent it compressed, unasked")
    if response.headers.get_content_type() == "text/html":
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
