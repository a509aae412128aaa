"""Connections to nodes for httpx, on asyncio's own streams.

By itself httpx goes through anyio, which costs a third of what each token that passes costs.
"""

import asyncio
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx

_OPTION = tuple[Any, ...]
_NAMED = b"#"
"""In a connection's host, between its address and the name it is for; in neither of them."""


class Transport(httpx.AsyncHTTPTransport):
    """For http and https, no proxies."""

    def __init__(self, *, limits: httpx.Limits, context: ssl.SSLContext | None = None) -> None:
        context = context or httpx.create_ssl_context(trust_env=False)
        super().__init__(verify=context, trust_env=False, limits=limits)
        self._pool = _Pool(
            ssl_context=context,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_Sockets(),
        )


# Their arguments are httpcore's.
# ruff: noqa: ASYNC109


class _Pool(httpcore.AsyncConnectionPool):
    """An address that is dialled in place of a name (`sni_hostname`) has connections of that name
    alone: the certificate of an open one was checked against no other."""

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        if name := request.extensions.get("sni_hostname"):
            request.url.host += _NAMED + str(name).encode()
        return await super().handle_async_request(request)


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
            async with asyncio.timeout(timeout):
                return _Socket(*await asyncio.open_connection(address, port))

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
        if info == "is_readable":  # asked of an idle connection: whether its server has closed it
            return self._reader.at_eof()
        return self._writer.get_extra_info({"server_addr": "peername"}.get(info, info))


@contextmanager
def _told_as(failed: type[Exception], timed_out: type[Exception]) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:  # which is an OSError
        raise timed_out(str(error)) from error
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that can't be one
        raise failed(str(error)) from error
