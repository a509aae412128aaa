"""One request's way through the backend, byte by byte.

The client hears nothing until a node has begun, or what answers in its place. Then each piece goes
on as it comes, and if a node breaks off, the rest comes from another one. If none can give it, the
client's connection ends before the terminating chunk, so that no HTTP/1.1 client takes the answer
for complete; a client that leaves ends the node's connection. (In HTTP/1.0 the close is the only
end there is: a reverse proxy in front must speak 1.1 to this backend.)
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

import httpx
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from r3mes_vllm.backend.course import EVENTS, STREAMS, Course
from r3mes_vllm.backend.dial import TRY_ANOTHER, Ask, Beginning, Dialler, Outgoing, Timeouts, told
from r3mes_vllm.backend.elsewhere import Substitute
from r3mes_vllm.backend.headers import RawHeaders, to_client
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.backend.metrics import Metrics
from r3mes_vllm.backend.refusals import NodeFailed, NodeTimedOut, NoSocket
from r3mes_vllm.disconnect import while_connected
from r3mes_vllm.errors import R3mesError
from r3mes_vllm.request_id import HEADER

log = logging.getLogger(__name__)

_MOST_NODES = 8
"""That give one answer."""

_BROKEN = (
    b'event: error\ndata: {"error": {"message": "the answer broke off, and no other node could go '
    b'on with it", "type": "server_error", "param": null, "code": "node_failed"}}\n\n'
)

Holders = Callable[[Course], Awaitable[Sequence[KnownNode]]]
"""Those that may go on with an answer."""


Source = Callable[[Ask], Awaitable[Beginning | Substitute]]
"""Of an answer. Raises R3mesError if it gives none."""

_NODES = "x-r3mes-nodes"
"""In a comment after the last event: all that gave it, where they were several."""


class Relay(Response):
    """The answer of the first of `nodes` that begins one, else of the first of `others`; `rest`
    gives the nodes that may go on with it. `missing` says why there are no `nodes`."""

    def __init__(
        self,
        nodes: Sequence[KnownNode],
        outgoing: Outgoing,
        *,
        name: str | None,
        missing: R3mesError | None = None,
        others: Sequence[Source] = (),
        rest: Holders,
        dialler: Dialler,
        timeouts: Timeouts,
        metrics: Metrics,
    ) -> None:
        self.background = None
        self._nodes = nodes
        self._outgoing = outgoing
        self._name = name
        self._missing = missing
        self._others = others
        self._rest = rest
        self._dialler = dialler
        self._timeouts = timeouts
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = Headers(scope=scope)[HEADER]
        try:
            await while_connected(receive, self._relay(request_id, send))
        except TimeoutError:
            log.warning("request %s: its client reads nothing", request_id)

    async def _relay(self, request_id: str, send: Send) -> None:
        client = _Client(send, self._timeouts.between_bytes)
        failure, refusal = self._missing, None
        for source in (self._holders, *self._others):
            nodes = self._nodes if source == self._holders else ()
            course = Course(self._outgoing, self._name, tried := set[str]())
            try:
                begun = await source(course.outgoing)
                if isinstance(begun, Substitute):
                    await self._replace(request_id, begun, client)
                elif self._others and begun.response.status_code in TRY_ANOTHER:
                    refusal = begun  # to be passed on if nobody else answers
                    continue
                else:
                    await self._follow(request_id, course, begun, client, nodes, tried)
            except NoSocket:  # for nobody else either
                raise
            except R3mesError as error:
                failure = failure or error
            else:
                return
        if refusal is None:
            raise failure or NodeFailed("no node answered")
        course = Course(self._outgoing, self._name, set())
        await self._follow(request_id, course, refusal, client, (), set())

    async def _holders(self, ask: Ask) -> Beginning:
        if self._missing:
            raise self._missing
        return await self._dialler.begin(self._nodes, ask)

    async def _replace(self, request_id: str, substitute: Substitute, client: "_Client") -> None:
        kind = substitute.kind
        try:
            await client.begin(substitute.status, substitute.headers)
            async with aclosing(substitute.pieces()) as pieces:
                async for piece in pieces:
                    await client.send(piece)
            await client.send(b"", more=False)
        except NodeFailed as error:
            log.warning("request %s: fallback %s broke off: %s", request_id, kind, error)
            self._metrics.fallback_failures.labels(kind).inc()
            if substitute.is_events:
                await client.send(_BROKEN)
        finally:
            await substitute.aclose()

    async def _follow(
        self,
        request_id: str,
        course: Course,
        beginning: Beginning,
        client: "_Client",
        nodes: Sequence[KnownNode],
        tried: set[str],
    ) -> None:
        """Pass on what it begins, and what others go on with; of `nodes`, as long as the client has
        nothing. `tried` are those that were asked. Raises NodeFailed if it gets nothing."""
        while True:
            wallet, resumed = beginning.node.wallet_address, client.begun
            try:
                await self._pass_on(course, beginning, client)
                return
            except (httpx.TransportError, NodeFailed) as error:
                log.warning("request %s: node %s broke off: %s", request_id, wallet, told(error))
                if not resumed:  # else it may have been given nonsense to go on with
                    beginning.flight.broke()
            finally:
                await beginning.aclose()
            if not client.begun:
                course = Course(self._outgoing, self._name, tried)
            elif course.is_whole:
                await self._end(course, client)
                return
            following = await self._next(course, tried, nodes)
            if following is None:
                self._metrics.broken_streams.inc()
                await _break_off(course, client)
                return
            beginning = following

    async def _pass_on(self, course: Course, beginning: Beginning, client: "_Client") -> None:
        response = beginning.response
        headers = [] if client.begun else _headers(beginning)
        now, patience_s = asyncio.get_running_loop().time, self._timeouts.between_bytes
        try:
            # One limit for all: to set one up for each piece costs as much as to read it.
            async with (
                asyncio.timeout(patience_s) as limit,
                aclosing(course.pieces(beginning)) as pieces,
            ):
                async for piece in pieces:
                    limit.reschedule((came := now()) + patience_s)
                    await client.begin(response.status_code, headers)
                    await client.put(piece)
                    limit.reschedule((gone := now()) + patience_s)
                    beginning.flight.passed(len(piece), gone - came)
        except TimeoutError:
            if client.reads_nothing:
                raise
            raise NodeTimedOut(f"it was silent for {patience_s:g} s") from None
        await client.begin(response.status_code, headers)
        if response.is_success:
            beginning.flight.finished()
        await self._end(course, client)

    async def _end(self, course: Course, client: "_Client") -> None:
        if len(course.nodes) > 1:
            self._metrics.moved_streams.inc()
            if course.kind == EVENTS:
                await client.send(f": {_NODES}: {', '.join(course.nodes)}\n\n".encode())
        await client.send(b"", more=False)

    async def _next(
        self, course: Course, tried: set[str], nodes: Sequence[KnownNode]
    ) -> Beginning | None:
        """The rest from one that was not tried yet; None if there is none."""
        if len(tried) >= _MOST_NODES:
            return None
        try:
            if course.begun:
                nodes = await self._rest(course)
            able = [n for n in nodes if n.wallet_address not in tried and course.can_ask(n)]
            judge = _is_an_answer if self._others and not course.begun else None
            if not able:
                return None
            return await self._dialler.begin(able, course.outgoing, is_an_answer=judge)
        except R3mesError as error:
            if isinstance(error, NoSocket) and not course.begun:
                raise
            return None


def _headers(beginning: Beginning) -> RawHeaders:
    """For the client. What streams may get another length than the node that begins it says."""
    response = beginning.response
    headers = to_client(response.headers.raw, wallet=beginning.node.wallet_address)
    if not response.headers.get("content-type", "").lower().startswith(STREAMS):
        return headers
    return [it for it in headers if it[0] != b"content-length"]


def _is_an_answer(node: KnownNode, response: httpx.Response) -> bool:
    return response.status_code not in TRY_ANOTHER


async def _break_off(course: Course, client: "_Client") -> None:
    """End `client`'s answer so that nobody takes it for complete. Raises NodeFailed if it has not
    begun."""
    if not client.begun:
        raise NodeFailed("the node broke off before it answered")
    if course.kind == EVENTS:
        await client.send(b"\n\n" * course.is_within_event + _BROKEN)
    # Returning with the body unfinished is how ASGI says it: the server closes.


class _Client:
    """What an answer goes to. Raises TimeoutError when it leaves what it was sent unread."""

    def __init__(self, send: Send, patience_s: float) -> None:
        self.begun = False
        self.reads_nothing = False
        """While it has not taken what it was sent."""
        self._send = send
        self._patience_s = patience_s

    async def begin(self, status: int, headers: RawHeaders) -> None:
        """Send them, unless that was done."""
        if self.begun:
            return
        self.begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send(self, data: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self._patience_s):
            await self.put(data, more=more)

    async def put(self, data: bytes, *, more: bool = True) -> None:
        """As `send`, for as long as it takes."""
        self.reads_nothing = True
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.reads_nothing = False
