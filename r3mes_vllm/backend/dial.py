"""Getting an answer's beginning out of one of several nodes."""

import asyncio
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import httpx

from r3mes_vllm.backend.addresses import Addresses
from r3mes_vllm.backend.endpoints import Resolve, host_of, public_address
from r3mes_vllm.backend.flights import Flight
from r3mes_vllm.backend.headers import RawHeaders, bearer
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.backend.refusals import BadInput, NodeFailed, NodeTimedOut, Unavailable, Unresolved
from r3mes_vllm.backend.sockets import Transport

log = logging.getLogger(__name__)

TRY_ANOTHER = {404, 429, *range(500, 600)}
"""What a node says of itself, not of the request: it has lost the adapter, has too much to do; from
500 up it is not well, and 508 is a backend's own loop."""
_LOCKED = {401, 403}
"""No client's matter: the key that the node was sent is not the client's, but its own."""
_FULL = {429, 503}
_REFUSAL_BYTES, _REFUSAL_S = 64 << 10, 5.0
"""Of a body that says no: it is read before the others are asked, and is small."""
# Shorter than any server keeps an idle connection, so that none is reused as it dies.
_KEEPALIVE_S = 2.0
_URLS = 4096
"""Parsed and kept."""
_SHARE = 0.2
"""Of a stream's limit: 24 s. A node of ours waits 20 s for an adapter before it says that it is not
there, and clients of the existing network wait 30 s for the first byte."""
_QUOTE = re.compile(r"[:'\"].*", re.DOTALL)


@dataclass(frozen=True)
class Timeouts:
    """Seconds."""

    connect: float = 5.0
    first_byte: float = 120.0
    """From the first dial to the first byte of a stream, whichever node gives it."""
    between_bytes: float = 60.0
    """Also how long a client may leave what it was sent unread."""
    answer: float = 600.0
    """As `first_byte`, of a whole answer: its first byte comes when it is made. openai-python
    waits as long."""

    def limit(self, *, streams: bool) -> float:
        """From the first dial to the first byte of the body."""
        return self.first_byte if streams else self.answer

    def share(self, *, streams: bool) -> float:
        """Of that, what a node has while there are others to ask. Who makes a whole answer is as
        silent as who hangs: to ask another would throw much work away."""
        return self.first_byte * _SHARE if streams else self.answer

    def silence(self, *, streams: bool) -> float:
        """After which a node has failed, also if it is the client that waits no longer."""
        return self.first_byte * _SHARE if streams else self.answer / 2


@dataclass(frozen=True)
class Outgoing:
    """A request on its way to whichever node takes it."""

    path: str
    headers: RawHeaders
    body: bytes
    streams: bool = True
    """It asks for a stream, not for a whole answer."""
    conversation: str | None = None
    """See `conversations`."""
    resumes: bool = False
    """It is to go on with what another node said: that it can't is no failure of its own."""


Ask = Callable[[KnownNode], Outgoing | None]
"""What to ask of a node; None for one to leave out."""


Judge = Callable[[KnownNode, httpx.Response], bool]
"""Whether a response is to be passed on; else another node is tried."""


@dataclass(frozen=True)
class Beginning:
    """A node's status and headers, the first bytes of its body, and the rest to come: none of a
    status of TRY_ANOTHER, whose connection and flight are over."""

    node: KnownNode
    response: httpx.Response
    first: bytes
    rest: AsyncIterator[bytes]
    flight: Flight

    async def aclose(self) -> None:
        try:
            await self.response.aclose()
        finally:
            self.flight.__exit__()


class _Full(NodeFailed):
    """It said so; `seconds` is how long it is."""

    def __init__(self, status: int, seconds: float) -> None:
        super().__init__(f"it answered {status}")
        self.seconds = seconds


class _Locked(NodeFailed):
    """It does not let this backend in."""


class _Undialled(Exception):
    """No connection: the node saw nothing of the request."""


def http_client(timeouts: Timeouts) -> httpx.AsyncClient:
    """Follows no redirect, reads no environment. What it waits for a byte is its user's matter."""
    return httpx.AsyncClient(
        trust_env=False,
        follow_redirects=False,
        timeout=_patience(timeouts),
        transport=Transport(keepalive_s=_KEEPALIVE_S),
    )


def told(error: Exception) -> str:
    """For the log: what came and is no HTTP, which `error` quotes, may be of somebody's answer."""
    if isinstance(error, httpx.ProtocolError):
        return f"{type(error).__name__}({_QUOTE.sub('', str(error))!r})"
    return repr(error)


def _patience(timeouts: Timeouts) -> httpx.Timeout:
    return httpx.Timeout(None, connect=timeouts.connect, write=timeouts.between_bytes)


@lru_cache(_URLS)
def _url(endpoint_url: str, path: str) -> httpx.URL:
    return httpx.URL(endpoint_url.rstrip("/") + path)


class _Unresolved(_Undialled):
    """By a resolver that fails or is slow, which is not known to be the node's fault."""


class Dialler:
    """The one HTTP client for nodes, whose addresses are looked up by `resolve`, and by `strangers`
    for those that may be none: httpx's transport alone, which follows no redirect, keeps no
    cookie and adds no header, at half of what its client costs. Close it with `aclose`."""

    def __init__(
        self,
        timeouts: Timeouts,
        *,
        allow_private: bool,
        resolve: Resolve,
        strangers: Resolve,
        dial_failed: Callable[[KnownNode], None],
        flight: Callable[[KnownNode, str | None], Flight],
    ) -> None:
        self._timeouts = timeouts
        self._allow_private = allow_private
        self._addresses = Addresses(resolve)
        self._strangers = strangers
        self._dial_failed = dial_failed
        self._flight = flight
        self._transport = Transport(keepalive_s=_KEEPALIVE_S)
        self._patience = _patience(timeouts).as_dict()

    async def aclose(self) -> None:
        await self._addresses.aclose()
        await self._transport.aclose()

    async def begin(
        self,
        nodes: Sequence[KnownNode],
        outgoing: Ask,
        *,
        is_an_answer: Judge | None = None,
    ) -> Beginning:
        """The first answer that one of `nodes`, tried in order, begins; `outgoing` says what to ask
        of each. Without a judge of answers, all that the last one says is one.

        Raises Unavailable if none can be dialled or one was full, NodeFailed if the last one tried
        broke before its first byte, NodeTimedOut if it did not come to that, and NoSocket at once.
        The caller closes the Beginning.
        """
        failure: Exception | None = None
        full: _Full | None = None
        now = asyncio.get_running_loop().time
        limit, began = 0.0, now()
        for position, node in enumerate(nodes):
            if (asked := outgoing(node)) is None:
                continue
            limit = self._timeouts.limit(streams=asked.streams)
            if (seconds := began + limit - now()) <= 0:
                break
            if not (last := position == len(nodes) - 1):
                seconds = min(seconds, self._timeouts.share(streams=asked.streams))
            try:
                return await self._fly(node, asked, is_an_answer, seconds=seconds, last=last)
            except _Undialled as error:
                log.warning("node %s can't be dialled: %s", node.wallet_address, error)
                if not isinstance(error, _Unresolved):
                    self._dial_failed(node)
                failure = failure or error
            except (NodeFailed, httpx.TransportError) as error:
                log.warning("node %s gave no answer: %s", node.wallet_address, told(error))
                failure = error
                full = error if isinstance(error, _Full) else full
        if full:
            after = max(1, math.ceil(full.seconds))
            raise Unavailable("no node has room", retry_after=after) from full
        if isinstance(failure, NodeTimedOut):
            raise NodeTimedOut(f"no node began to answer within {limit:g} s") from failure
        if isinstance(failure, _Locked):
            raise NodeFailed("the node does not let this backend in") from failure
        if isinstance(failure, NodeFailed | httpx.TransportError):
            raise NodeFailed("the node broke off before it answered") from failure
        raise Unavailable("no node could be reached", hint="try again shortly") from failure

    async def exchange(
        self, endpoint_url: str, outgoing: Outgoing, *, limit: int, timeout_s: float
    ) -> bytes:
        """The body of a whole answer 200, at most `limit` bytes, from a node that may not be one.

        Raises NodeFailed with the reason, which quotes nothing that came, and NoSocket.
        """
        try:
            async with asyncio.timeout(timeout_s):
                request = await self._request(endpoint_url, outgoing, self._of_stranger)
                response = await self._transport.handle_async_request(request)
                try:
                    return await _whole(response, limit)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise NodeFailed(f"no answer within {timeout_s:g} s") from error
        except (_Undialled, httpx.TransportError) as error:
            raise NodeFailed("no answer") from error

    async def _fly(
        self,
        node: KnownNode,
        outgoing: Outgoing,
        is_an_answer: Judge | None,
        *,
        seconds: float,
        last: bool,
    ) -> Beginning:
        """As `_ask`, told to the balancer. Raises NodeTimedOut after `seconds`."""
        now, silence_s = asyncio.get_running_loop().time, self._timeouts.silence
        began = now()
        with ExitStack() as until_failed:
            flight = until_failed.enter_context(self._flight(node, outgoing.conversation))
            try:
                async with asyncio.timeout(seconds):
                    found = await self._ask(node, outgoing, flight, is_an_answer, last=last)
            except (httpx.TransportError, TimeoutError, asyncio.CancelledError) as error:
                is_silent = now() - began >= silence_s(streams=outgoing.streams)
                broke = isinstance(error, httpx.TransportError) or is_silent
                if broke and not outgoing.resumes:
                    flight.broke()
                if isinstance(error, TimeoutError):
                    raise NodeTimedOut(f"it did not begin within {seconds:.3g} s") from error
                raise
            until_failed.pop_all()
            return found

    async def _ask(
        self,
        node: KnownNode,
        outgoing: Outgoing,
        flight: Flight,
        is_an_answer: Judge | None,
        *,
        last: bool,
    ) -> Beginning:
        request = await self._request(
            node.endpoint_url, outgoing, self._addresses.of, access_key=node.access_key
        )
        try:
            response = await self._transport.handle_async_request(request)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Undialled(str(error) or type(error).__name__) from error
        status = response.status_code
        is_sound = 200 <= status < 300 or 400 <= status < 500
        try:
            if status in _FULL:
                flight.refused(_retry_after(response))
            elif not is_sound and not outgoing.resumes:
                flight.broke()
            if 300 <= status < 400:
                raise NodeFailed(f"it answered with a redirect ({status})")
            if not 200 <= status < 600:
                raise NodeFailed(f"it answered with status {status}")
            if status in _LOCKED:
                raise _Locked(f"it wants another access key than it registered ({status})")
            if is_an_answer and not is_an_answer(node, response):
                raise NodeFailed(f"it answered {status}, which is no answer here")
            if status in _FULL and not last:
                raise _Full(status, _retry_after(response))
            if status in TRY_ANOTHER and not last:
                raise NodeFailed(f"it answered {status}")
            if status in TRY_ANOTHER:
                refusal = await _refusal(response)
                await response.aclose()
                flight.__exit__()
                return Beginning(node, response, refusal, _nothing_more(), flight)
            rest = response.aiter_raw()
            first = await anext(rest, b"")
            if response.is_success and not first:
                if not outgoing.resumes:
                    flight.broke()
                raise NodeFailed("it answered nothing")
            if response.is_success:
                flight.began(f"{outgoing.path} {response.headers.get('content-type')}")
            return Beginning(node, response, first, rest, flight)
        except BaseException:
            await response.aclose()
            raise

    async def _of_stranger(self, url: httpx.URL) -> str:
        return await public_address(url, self._strangers)

    async def _request(
        self,
        endpoint_url: str,
        outgoing: Outgoing,
        address_of: Callable[[httpx.URL], Awaitable[str]],
        *,
        access_key: str | None = None,
    ) -> httpx.Request:
        """With the headers that are given, and the node's own `access_key`."""
        url = _url(endpoint_url, outgoing.path)
        headers = [*outgoing.headers, *bearer(access_key)]
        extensions: dict[str, Any] = {"timeout": self._patience}
        if not self._allow_private:
            try:
                address = await address_of(url)
            except Unresolved as error:
                raise _Unresolved(error.message) from error
            except BadInput as error:
                raise _Undialled(error.message) from error
            headers = [(b"host", url.netloc), *headers]
            extensions["sni_hostname"] = host_of(url)  # TLS is still checked against the name
            url = url.copy_with(host=address)
        return httpx.Request(
            "POST", url, headers=headers, content=outgoing.body, extensions=extensions
        )


def _retry_after(response: httpx.Response) -> float:
    """Seconds."""
    said = response.headers.get("retry-after", "")
    return float(said[:6]) if said.isdecimal() else 1.0


async def _whole(response: httpx.Response, limit: int) -> bytes:
    if response.status_code != 200:
        raise NodeFailed(f"the answer was {response.status_code}")
    return await _body(response, limit)


async def _refusal(response: httpx.Response) -> bytes:
    try:
        async with asyncio.timeout(_REFUSAL_S):
            return await _body(response, _REFUSAL_BYTES)
    except TimeoutError as error:
        raise NodeFailed(f"what it answered has no end within {_REFUSAL_S:g} s") from error


async def _nothing_more() -> AsyncIterator[bytes]:
    return
    yield  # what makes it an iterator


async def _body(response: httpx.Response, limit: int) -> bytes:
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > limit:
            raise NodeFailed(f"the answer is over {limit} bytes")
    return bytes(body)
