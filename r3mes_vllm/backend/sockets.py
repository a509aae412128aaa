"""Connections to nodes for httpx, on asyncio's own streams.

By itself httpx goes through anyio, which costs a third of what each token that passes costs.
"""

import asyncio
import errno
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import httpcore
import httpx

from r3mes_vllm.backend.refusals import NoSocket

_OPTION = tuple[Any, ...]
_NAMED = b"#"
"""In a connection's host, between its address and the name it is for; in neither of them."""
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
"""What this machine lacks, whatever is dialled."""


class Transport(httpx.AsyncHTTPTransport):
    """For http and https; no proxies. An idle connection is kept for `keepalive_s` seconds. Raises
    NoSocket, besides what httpx does, where this machine has none left."""

    def __init__(self, *, keepalive_s: float, context: ssl.SSLContext | None = None) -> None:
        context = context or httpx.create_ssl_context(trust_env=False)
        super().__init__(verify=context, trust_env=False)
        self._pool = _Pool(context, keepalive_s)  # type: ignore[assignment]


_Place = tuple[bytes, bytes, int | None]


class _Pool:
    """Connections that wait for a request, by where they lead, in place of httpcore's own pool:
    that looks at each of them for each of them whenever a request comes or ends, which with a
    hundred streams costs more than all else.

    An address that is dialled in place of a name (`sni_hostname`) has connections of that name
    alone: the certificate of an open one was checked against no other.
    """

    def __init__(self, context: ssl.SSLContext, keepalive_s: float) -> None:
        self._context = context
        self._keepalive_s = keepalive_s
        self._idle: dict[_Place, dict[httpcore.AsyncHTTPConnection, asyncio.TimerHandle]] = {}
        self._closing = set[asyncio.Task[None]]()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        for waiting in list(self._idle.values()):
            for connection, expiry in waiting.items():
                expiry.cancel()
                await connection.aclose()
        self._idle.clear()

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        if name := request.extensions.get("sni_hostname"):
            request.url.host += _NAMED + str(name).encode()
        place = request.url.scheme, request.url.host, request.url.port
        connection = await self._waiting(place) or self._new(request.url.origin)
        try:
            response = await connection.handle_async_request(request)
        except BaseException:
            await connection.aclose()
            raise
        return httpcore.Response(
            response.status,
            headers=response.headers,
            content=_Body(response.stream, lambda: self._keep(place, connection)),
            extensions=response.extensions,
        )

    def _new(self, origin: httpcore.Origin) -> httpcore.AsyncHTTPConnection:
        return httpcore.AsyncHTTPConnection(
            origin,
            ssl_context=self._context,
            keepalive_expiry=self._keepalive_s,
            network_backend=_Sockets(),
        )

    async def _waiting(self, place: _Place) -> httpcore.AsyncHTTPConnection | None:
        """The one that waits for the shortest time."""
        while waiting := self._idle.get(place):
            connection, expiry = waiting.popitem()
            expiry.cancel()
            if not waiting:
                del self._idle[place]
            if not connection.has_expired():  # nor closed at its other end
                return connection
            await connection.aclose()
        return None

    def _keep(self, place: _Place, connection: httpcore.AsyncHTTPConnection) -> None:
        """Unless it has ended with its answer."""
        if connection.is_idle():
            loop = asyncio.get_running_loop()
            expiry = loop.call_later(self._keepalive_s, self._expire, place, connection)
            self._idle.setdefault(place, {})[connection] = expiry

    def _expire(self, place: _Place, connection: httpcore.AsyncHTTPConnection) -> None:
        del self._idle[place][connection]
        if not self._idle[place]:
            del self._idle[place]
        closing = asyncio.get_running_loop().create_task(connection.aclose())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


class _Body:
    """An answer's, after which its connection may be `kept`."""

    def __init__(self, stream: Any, kept: Callable[[], None]) -> None:
        self._stream = stream
        self._kept = kept

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._stream)

    async def aclose(self) -> None:
        await self._stream.aclose()
        kept, self._kept = self._kept, _nothing
        kept()


def _nothing() -> None:
    pass


# Their arguments are httpcore's.
# ruff: noqa: ASYNC109


class _Sockets(httpcore.AsyncNetworkBackend):
    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[_OPTION] | None = None,
    ) -> "_Socket":
        address, _, _ = host.partition(_NAMED.decode())
        with _told_as(httpcore.ConnectError, httpcore.ConnectTimeout):
            try:
                async with asyncio.timeout(timeout):
                    return _Socket(*await asyncio.open_connection(address, port))
            except OSError as error:
                if _is_ours(error, address):
                    raise NoSocket(f"this backend has no socket left: {error}") from error
                raise

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Socket(httpcore.AsyncNetworkStream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _told_as(httpcore.ReadError, httpcore.ReadTimeout):
            if timeout is None:
                return await self._reader.read(max_bytes)
            async with asyncio.timeout(timeout):
                return await self._reader.read(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _told_as(httpcore.WriteError, httpcore.WriteTimeout):
            self._writer.write(buffer)
            async with asyncio.timeout(timeout):
                await self._writer.drain()

    async def aclose(self) -> None:
        self._writer.close()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> "_Socket":
        try:
            with _told_as(httpcore.ConnectError, httpcore.ConnectTimeout):
                async with asyncio.timeout(timeout):
                    await self._writer.start_tls(ssl_context, server_hostname=server_hostname)
        except BaseException:
            self._writer.close()
            raise
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            # Asked of an idle connection: its server has closed it, or has said something (that it
            # waits no longer, as 408) which would be taken for the answer to the next request.
            unasked: bytearray = self._reader._buffer  # type: ignore[attr-defined]
            return bool(unasked) or self._reader.at_eof()
        return self._writer.get_extra_info({"server_addr": "peername"}.get(info, info))


def _is_ours(error: OSError, address: str) -> bool:
    if error.errno == errno.EADDRNOTAVAIL:  # no port is left; in IPv6 also that it is not set up
        return address.replace(".", "").isdecimal()
    return error.errno in _OURS


@contextmanager
def _told_as(failed: type[Exception], timed_out: type[Exception]) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:  # which is an OSError
        raise timed_out(str(error)) from error
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that can't be one
        raise failed(str(error)) from error
