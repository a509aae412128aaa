"""One request's way through the backend, byte by byte.

The client hears nothing until a node has begun. Then each piece goes on as it comes. A node that
breaks off ends the client's connection before the terminating chunk, so that no HTTP/1.1 client
takes the answer for complete; a client that leaves ends the node's connection. (In HTTP/1.0 the
close is the only end there is: a reverse proxy in front must speak 1.1 to this backend.)
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

import httpx
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from r3mes_vllm.backend.dial import Beginning, Dialler, Outgoing, Timeouts
from r3mes_vllm.backend.headers import to_client
from r3mes_vllm.backend.metrics import Metrics
from r3mes_vllm.disconnect import while_connected
from r3mes_vllm.wire import Node

log = logging.getLogger(__name__)


class Relay(Response):
    """The answer of the first of `nodes` that begins one."""

    def __init__(
        self,
        nodes: Sequence[Node],
        outgoing: Outgoing,
        *,
        dialler: Dialler,
        timeouts: Timeouts,
        metrics: Metrics,
        request_id: str,
    ) -> None:
        self.background = None
        self._nodes = nodes
        self._outgoing = outgoing
        self._dialler = dialler
        self._timeouts = timeouts
        self._metrics = metrics
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._relay(send))

    async def _relay(self, send: Send) -> None:
        beginning = await self._dialler.begin(self._nodes, self._outgoing)
        try:
            await self._pass_on(beginning, send)
        except (httpx.TransportError, TimeoutError) as error:
            # Returning with the body unfinished is how ASGI says it: the server closes.
            self._metrics.broken_streams.inc()
            wallet = beginning.node.wallet_address
            log.warning("request %s: stream of node %s broke: %r", self._request_id, wallet, error)
        finally:
            await beginning.response.aclose()

    async def _pass_on(self, beginning: Beginning, send: Send) -> None:
        response, wallet = beginning.response, beginning.node.wallet_address
        headers = to_client(response.headers.raw, wallet=wallet, request_id=self._request_id)
        start = {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": headers,
        }
        await send(start)
        limit = self._timeouts.between_bytes
        async for piece in self._pieces(beginning):
            async with asyncio.timeout(limit):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self, beginning: Beginning) -> AsyncIterator[bytes]:
        """Raises TimeoutError when the node falls silent."""
        piece: bytes | None = beginning.first
        while piece is not None:
            if piece:
                yield piece
            async with asyncio.timeout(self._timeouts.between_bytes):
                piece = await anext(beginning.rest, None)
