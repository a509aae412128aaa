"""Getting an answer's beginning out of one of several nodes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import httpx

from r3mes_vllm.backend.endpoints import Resolve, public_address
from r3mes_vllm.backend.headers import RawHeaders
from r3mes_vllm.backend.refusals import BadInput, NodeFailed, NodeTimedOut, Unavailable
from r3mes_vllm.wire import Node

log = logging.getLogger(__name__)

# "Not now" from a node: nothing was generated, so another may try. 508 is a backend's own loop.
_TRY_ANOTHER = {503, 508}


@dataclass(frozen=True)
class Timeouts:
    """Seconds."""

    connect: float = 5.0
    first_byte: float = 120.0
    """From the first dial to the first byte of an answer's body, whichever node gives it."""
    between_bytes: float = 60.0
    """Also how long a client may leave what it was sent unread."""


@dataclass(frozen=True)
class Outgoing:
    """A request on its way to whichever node takes it."""

    path: str
    headers: RawHeaders
    body: bytes


@dataclass(frozen=True)
class Beginning:
    """A node's status and headers, the first bytes of its body, and the rest to come."""

    node: Node
    response: httpx.Response
    first: bytes
    rest: AsyncIterator[bytes]


class _Undialled(Exception):
    """No connection: the node saw nothing of the request."""


class Dialler:
    """The one HTTP client of the backend. Close it with `aclose`."""

    def __init__(
        self,
        timeouts: Timeouts,
        *,
        allow_private: bool,
        resolve: Resolve,
        dial_failed: Callable[[Node], None],
    ) -> None:
        self._timeouts = timeouts
        self._allow_private = allow_private
        self._resolve = resolve
        self._dial_failed = dial_failed
        self._client = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(None, connect=timeouts.connect, write=timeouts.between_bytes),
            # Shorter than any server keeps an idle connection, so that none is reused as it dies.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def begin(self, nodes: Sequence[Node], outgoing: Outgoing) -> Beginning:
        """The first answer that one of `nodes`, tried in order, begins.

        Raises Unavailable if none can be dialled, NodeFailed if the last one tried broke before
        its first byte, NodeTimedOut. The caller closes `Beginning.response`.
        """
        failure: Exception | None = None
        try:
            async with asyncio.timeout(self._timeouts.first_byte):
                for position, node in enumerate(nodes):
                    try:
                        return await self._ask(node, outgoing, last=position == len(nodes) - 1)
                    except _Undialled as error:
                        log.warning("node %s can't be dialled: %s", node.wallet_address, error)
                        self._dial_failed(node)
                        failure = failure or error
                    except (NodeFailed, httpx.TransportError) as error:
                        log.warning("node %s gave no answer: %r", node.wallet_address, error)
                        failure = error
        except TimeoutError as error:
            limit = self._timeouts.first_byte
            raise NodeTimedOut(f"no node began to answer within {limit:g} s") from error
        if isinstance(failure, NodeFailed | httpx.TransportError):
            raise NodeFailed("the node broke off before it answered") from failure
        raise Unavailable("no node could be reached", hint="try again shortly") from failure

    async def _ask(self, node: Node, outgoing: Outgoing, *, last: bool) -> Beginning:
        request = await self._request(node, outgoing)
        try:
            response = await self._client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Undialled(str(error) or type(error).__name__) from error
        try:
            if 300 <= response.status_code < 400:
                raise NodeFailed(f"it answered with a redirect ({response.status_code})")
            if response.status_code in _TRY_ANOTHER and not last:
                raise NodeFailed(f"it answered {response.status_code}")
            rest = response.aiter_raw()
            return Beginning(node, response, await anext(rest, b""), rest)
        except BaseException:
            await response.aclose()
            raise

    async def _request(self, node: Node, outgoing: Outgoing) -> httpx.Request:
        """Built without the client's defaults: no cookie of another user, no header added."""
        url = httpx.URL(node.endpoint_url.rstrip("/") + outgoing.path)
        headers, extensions = outgoing.headers, {}
        if not self._allow_private:
            try:
                address = await public_address(url, self._resolve)
            except BadInput as error:
                raise _Undialled(error.message) from error
            headers = [(b"host", url.netloc), *headers]
            extensions = {"sni_hostname": url.host}  # TLS is still checked against the name
            url = url.copy_with(host=address)
        return httpx.Request(
            "POST", url, headers=headers, content=outgoing.body, extensions=extensions
        )
