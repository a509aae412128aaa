"""One connection to a server that nobody trusts: opened on the loop, read by threads.

A thread that reads straight into a buffer does twice what an event loop does that copies. The
standard library's HTTP is enough for it: one request at a time, nothing decompressed or followed.
"""

import asyncio
import io
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPResponse, parse_headers
from ipaddress import ip_address
from typing import Any, Literal, NamedTuple, TypeVar

_CONNECT_S = 5.0
_RECEIVE = 1 << 20
"""Bytes that the kernel buffers of what comes from this machine: more would leave the processor's
cache before it is read. For a longer way it finds by itself how many are needed."""

_SEND = 1 << 20
_INFORMATIONAL = 10
"""Answers before the answer."""

_SLOWEST = 1024
"""Bytes a second; less than this over the stall time-out is a stall."""

T = TypeVar("T")


class Origin(NamedTuple):
    scheme: str
    host: str
    port: int


class Connection:
    """`http` is used on threads, through `call`. `stall_s` in seconds."""

    def __init__(
        self, origin: Origin, sock: socket.socket, stall_s: float, threads: ThreadPoolExecutor
    ) -> None:
        self.origin = origin
        self.used = False
        """For a request before this one."""
        self._sock = sock
        self._threads = threads
        self._stall_s = stall_s
        self.http = HTTPConnection(origin.host, origin.port, blocksize=_SEND)
        self.http.default_port = 443 if origin.scheme == "https" else 80
        self.http.auto_open = 0
        self.http.response_class = _Response

    @classmethod
    async def open(
        cls, origin: Origin, stall_s: float, threads: ThreadPoolExecutor
    ) -> "Connection":
        """Raises OSError, TimeoutError too, and UnicodeError for a host that can't be one."""
        async with asyncio.timeout(stall_s):
            found = await _looked_up(origin)
        failure: OSError | None = None
        for family, _, _, _, address in found:
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:  # a family that this machine does not have
                failure = failure or error
                continue
            connection = cls(origin, sock, stall_s, threads)
            try:
                await connection._connect(address)
            except OSError as error:
                connection.close()
                failure = failure or error
            except BaseException:
                connection.close()
                raise
            else:
                return connection
        raise failure or ConnectionError(f"{origin.host} has no address")

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """`function`, which may wait for this connection, on a thread. Cancelling ends the wait
        by shutting the connection down, and returns when the thread has left it."""
        submitted = self._threads.submit(function, *args)
        done = asyncio.wrap_future(submitted)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            self._shut_down()
            while not done.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({done})
            if not done.cancelled():
                done.exception()
            raise

    @property
    def idle(self) -> bool:
        """Whether it may carry another request: it is open, and nothing unasked has come."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """When no thread is in it."""
        self._sock.close()

    async def _connect(self, address: Any) -> None:
        if ip_address(address[0]).is_loopback:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE)
        self._sock.setblocking(False)
        async with asyncio.timeout(min(_CONNECT_S, self._stall_s)):
            await asyncio.get_running_loop().sock_connect(self._sock, address)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.settimeout(self._stall_s)
        if self.origin.scheme == "https":
            secured = _system_tls().wrap_socket(
                self._sock, server_hostname=self.origin.host, do_handshake_on_connect=False
            )
            self._sock = secured
            await self.call(secured.do_handshake)
        self.http.sock = _Socket(self._sock, self._stall_s)

    def _shut_down(self) -> None:
        with suppress(OSError):
            # Not that of SSLSocket, which changes what the thread is using.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)


async def _looked_up(origin: Origin) -> list[Any]:
    """As `socket.getaddrinfo` says, on a thread that is left alone when nobody waits any more: a
    resolver that does not answer can hold it for longer than all the rest of a fetch takes."""
    if f".{origin.host}".rstrip(".").endswith(".localhost"):
        # Below it no resolver need know a name (RFC 6761 6.3); Kubo's gateway sends on to such.
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", origin.port)),
            (socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("::1", origin.port, 0, 0)),
        ]
    loop = asyncio.get_running_loop()
    done: asyncio.Future[list[Any]] = loop.create_future()

    def tell(found: list[Any], error: Exception | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(found)
        else:
            done.set_exception(error)

    def look_up() -> None:
        found: list[Any] = []
        problem: Exception | None = None
        try:
            found += socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            problem = error
        with suppress(RuntimeError):  # its loop may be closed
            loop.call_soon_threadsafe(tell, found, problem)

    threading.Thread(target=look_up, name="r3mes-names", daemon=True).start()
    try:
        return await done
    except socket.gaierror as error:
        raise ConnectionError(
            f"the name {origin.host} does not resolve: {error.strerror}"
        ) from error


@cache
def _system_tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Response(HTTPResponse):
    def _read_status(self) -> tuple[str, int, str]:
        """Of the answer proper: the standard library knows of the informational ones that come
        before it only 100, and skips that for ever (RFC 9110 15.2)."""
        for _ in range(_INFORMATIONAL + 1):
            found: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if not 100 <= found[1] < 200:
                return found
            parse_headers(self.fp)
        raise HTTPException(f"more than {_INFORMATIONAL} informational answers")


class _Socket:
    """What http.client uses of a socket; closing is left to the connection."""

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        self._sock = sock
        self._stall_s = stall_s

    def makefile(self, mode: Literal["rb"]) -> io.BufferedReader:
        return io.BufferedReader(_Received(self._sock, self._stall_s))

    def sendall(self, data: bytes) -> None:
        self._sock.sendall(data)

    def close(self) -> None:
        pass


class _Received(io.RawIOBase):
    """Raises TimeoutError when no byte comes for `stall_s`, and when too few came while it was
    waited for more."""

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        self._sock = sock
        self._stall_s = stall_s
        self._waited_s = 0.0
        self._came = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        began = time.monotonic()
        came = self._sock.recv_into(buffer)
        if self._came:  # the first may take all the time
            self._waited_s += time.monotonic() - began
        self._came += came
        if self._waited_s > self._stall_s:
            if self._came < _SLOWEST * self._stall_s:
                raise TimeoutError(f"only {self._came} bytes came in {self._waited_s:.0f} s")
            self._waited_s, self._came = 0.0, 0
        return came
