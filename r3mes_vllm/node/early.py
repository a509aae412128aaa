"""The port before the engine is there: open from the first moment, so that a probe gets an answer
where it would find nobody, and handed over to vLLM's server without being closed."""

import asyncio
import socket
import ssl
import threading
import time
from typing import ClassVar

from starlette.responses import JSONResponse, Response

from r3mes_vllm.errors import PortTaken
from r3mes_vllm.node.refusals import refusal
from r3mes_vllm.request_id import HEADER, tame
from r3mes_vllm.unread import bounded

_CONNECTION_S = 5.0
"""For one connection, all in all."""
_CONNECTIONS = 64
"""At a time. The oldest makes room for another one, so that silent clients keep nobody out."""
_HEAD_BYTES = 16 << 10
_BACKLOG = 2048
_NO_FILES_S = 0.1
"""Before the next try when the process has as many files open as it may."""


class Early:
    """Answers every request on `host:port` with 503, in a thread of its own, with TLS if there is
    `tls`. Raises PortTaken."""

    current: ClassVar["Early | None"] = None
    """Of this process; None under plain `vllm serve`."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.reason = "the node is starting"
        """Said by `/health`."""
        self.address = (host, port)
        self._socket = _listening(host, port)
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._answers: dict[asyncio.Task[None], None] = {}
        """Under way, the oldest first."""
        self._ending = asyncio.Event()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="early port", daemon=True).start()

    def end(self) -> None:
        """Accept no more; who was accepted gets the answer still. The port stays open, and who
        comes now waits for the next server."""
        if not self._ended.is_set():
            self._loop.call_soon_threadsafe(self._ending.set)
            self._ended.wait()

    def close(self) -> None:
        self.end()
        self._socket.close()

    def socket_for(self, address: tuple[str, int]) -> socket.socket | None:
        """The listening socket, to be served further; None, and the port is closed, if the next
        server wants another address."""
        if address == self.address:
            return self._socket
        self.close()
        return None

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._ended.set()
            self._loop.close()

    async def _serve(self) -> None:
        self._loop.add_reader(self._socket, self._accept)
        await self._ending.wait()
        self._loop.remove_reader(self._socket)
        self._ended.set()
        await asyncio.gather(*self._answers, return_exceptions=True)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            time.sleep(_NO_FILES_S)
            return
        connection.setblocking(False)
        if len(self._answers) >= _CONNECTIONS:
            oldest = next(iter(self._answers))
            del self._answers[oldest]
            oldest.cancel()
        task = self._loop.create_task(self._answer(connection))
        self._answers[task] = None
        task.add_done_callback(lambda it: self._answers.pop(it, None))

    async def _answer(self, connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(_CONNECTION_S):
                reader, writer = await self._open(connection)
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(_answer_to(head, self.reason))
                    if writer.can_write_eof():  # not with TLS, which reads on by itself
                        writer.write_eof()
                        while await reader.read(_HEAD_BYTES):
                            pass  # closed with something unread, the answer would be lost
                    writer.close()
                    await writer.wait_closed()
                finally:
                    writer.transport.abort()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            connection.close()

    async def _open(
        self, connection: socket.socket
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader = asyncio.StreamReader(limit=_HEAD_BYTES, loop=self._loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=self._loop)
        transport, _ = await self._loop.connect_accepted_socket(
            lambda: protocol, connection, ssl=self._tls
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, self._loop)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    door = bounded(socket.socket(family, socket.SOCK_STREAM))
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
        door.listen(_BACKLOG)
    except OSError as error:
        door.close()
        raise PortTaken(
            f"can't listen on {host}:{port}: {error.strerror}",
            hint=f"stop what listens there, or pass --port {port + 1}",
        ) from error
    door.setblocking(False)
    return door


def _answer_to(head: bytes, reason: str) -> bytes:
    method, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
    target = rest.partition(" ")[0]
    response = _refusal("/" + target.partition("?")[0].lstrip("/"), reason)
    response.headers[HEADER] = tame(_given(head))
    response.headers["retry-after"] = "5"
    response.headers["connection"] = "close"
    fields = b"".join(b"%b: %b\r\n" % field for field in response.raw_headers)
    body = b"" if method == "HEAD" else bytes(response.body)
    return b"HTTP/1.1 503 Service Unavailable\r\n" + fields + b"\r\n" + body


def _given(head: bytes) -> list[str]:
    """The request's ids that are in it."""
    fields = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    name = HEADER.encode()
    return [value.strip().decode("latin-1") for key, _, value in fields if key.lower() == name]


def _refusal(path: str, reason: str) -> Response:
    if path == "/health":
        body = {"status": "starting", "available_loras": [], "reason": reason}
        return JSONResponse(body, 503)
    if path == "/ready":
        return JSONResponse({"ready": False, "reason": "starting"}, 503)
    return refusal(path, 503, "starting", f"{reason}; ask again soon")
