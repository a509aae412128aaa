"""uvicorn's HTTP, which by itself waits for ever for the rest of a request's head, and takes one of
any size."""

import asyncio
from contextlib import suppress
from http import HTTPStatus
from typing import Any, ClassVar

from starlette.responses import JSONResponse
from starlette.types import Receive

from r3mes_vllm.plain_http import PlainProtocol
from r3mes_vllm.request_id import HEADER, RequestIds, tame

_LINGER_S = 1.0
_SWALLOW_S = 2.0


class BoundedProtocol(PlainProtocol):
    """408 for a head that takes over `head_seconds` from the connection's or the request's first
    byte, 431 for one of over `head_bytes`."""

    head_bytes: ClassVar[int]
    head_seconds: ClassVar[float]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._late: asyncio.TimerHandle | None = None
        """Not None while a head is to come."""
        self._came = 0
        """Bytes of a head that isn't whole."""
        self._size = 0
        """Bytes of its fields."""
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_ended()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self._late is not None and not self.transport.is_closing():
            self._came += len(data)
            if self._came > self.head_bytes:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._came = self._size = 0
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._size += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._size += len(name) + len(value) + 4
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_ended()
        app = self.app
        if self._size > self.head_bytes:
            self.app = RequestIds(
                JSONResponse(
                    _body(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE), 431, {"connection": "close"}
                )
            )
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def _expect_head(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(
                self.head_seconds, self._refuse, HTTPStatus.REQUEST_TIMEOUT
            )

    def _head_ended(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: HTTPStatus) -> None:
        self._head_ended()
        if self.cycle is None or self.cycle.response_complete:
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\nconnection: close\r\n"
            head += f"{HEADER}: {tame([])}\r\n"
            body = JSONResponse(_body(status)).body
            fields = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            self.transport.write((head + fields).encode() + bytes(body))
            self._refused = True
        if not (self._refused and self.transport.can_write_eof()):
            self.transport.close()
            return
        # Closed at once, with more on its way, the answer would be lost to the client.
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)


def bounded(head_bytes: int, head_seconds: float) -> type[BoundedProtocol]:
    return type(
        "Bounded", (BoundedProtocol,), {"head_bytes": head_bytes, "head_seconds": head_seconds}
    )


async def swallow(receive: Receive) -> None:
    """What still comes of a body, for a client that reads no answer before it has sent all."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_SWALLOW_S):
            while (await receive()).get("more_body"):
                pass


def _body(status: HTTPStatus) -> dict[str, Any]:
    what = "too large" if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE else "too slow"
    code = f"headers_{what.replace(' ', '_')}"
    return {"error": {"code": code, "message": f"the request's headers are {what}", "hint": ""}}
