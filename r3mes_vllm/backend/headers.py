"""Which headers cross the backend.

Nodes are run by strangers, so both ways are lists of what passes. A client's `Authorization` and
cookies are the backend's business and stay here; a node sets no cookie and no policy on the
backend's own origin. Hop-by-hop headers (RFC 9110 section 7.6.1) are on neither list.
"""

import re
from collections.abc import Iterable

from fastapi import Request

from r3mes_vllm import carry
from r3mes_vllm.backend.refusals import BadInput, NodeFailed, RoutingLoop
from r3mes_vllm.request_id import HEADER

RawHeaders = list[tuple[bytes, bytes]]

VIA = "x-r3mes-via"
"""Names each backend a request has been through."""

_TO_NODE = {b"accept", b"content-type", HEADER.encode(), b"x-wallet-address"}
_TRACE = {
    b"traceparent": re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"),
    b"tracestate": re.compile(rb"[\t\x20-\x7e]{1,512}"),
}
"""Of https://www.w3.org/TR/trace-context/. What is not of that form is left out: the request does
not depend on it."""

_TO_CLIENT = {b"content-type", b"content-length", b"content-encoding", b"retry-after"}
_TO_CLIENT_PREFIXES = (b"x-r3mes-", b"x-ratelimit-", b"openai-")
FALLBACK, FALLBACK_MODEL = b"x-r3mes-fallback", b"x-r3mes-fallback-model"
_NO_NODES = {carry.HEADER.encode(), FALLBACK, FALLBACK_MODEL}
_ALWAYS = {
    b"cache-control": b"no-store",
    b"x-accel-buffering": b"no",  # nginx would hold tokens back
    # A node's bytes must not become a page of the backend's origin.
    b"x-content-type-options": b"nosniff",
    b"content-security-policy": b"default-src 'none'; sandbox",
}
_TO_FALLBACK = {HEADER.encode(), b"accept-encoding", VIA.encode(), *_TRACE}
_INVISIBLE = re.compile(r"[^\x21-\x7e]")
_LONGEST_MODEL = 300
_NAME = re.compile(r"[0-9a-f]{32}")
_HOPS = 16
_FIELD_VALUE = re.compile(rb"[\t\x20-\x7e]{0,4096}")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_ANOTHER_LENGTH = {b"transfer-encoding", carry.HEADER.encode()}
"""With these `Content-Length` is not that of what the client gets."""


def to_node(request: Request, *, name: str, adapter: str | None) -> RawHeaders:
    """The headers of the request to a node. `name` is this backend's own.

    Raises RoutingLoop if the request has passed here before, and BadInput for a header that a
    strict HTTP client could not send.
    """
    seen = [each for each in request.headers.get(VIA, "").split(",") if _NAME.fullmatch(each)]
    if name in seen:
        raise RoutingLoop("a registered node leads back to this backend")
    headers = [(key, value) for key, value in request.headers.raw if key in _TO_NODE]
    for key, value in headers:
        if not _FIELD_VALUE.fullmatch(value):
            header = key.decode()
            raise BadInput(f"header {header}: only visible ASCII is allowed", field=header)
    if adapter is not None:
        headers.append((b"x-adapter", adapter.encode()))
    return [
        *headers,
        *_trace(request),
        (b"accept-encoding", b"identity"),  # a compressor would hold tokens back
        (VIA.encode(), ",".join([*seen[-_HOPS:], name]).encode()),
    ]


def _trace(request: Request) -> RawHeaders:
    found = [(key, value) for key, value in request.headers.raw if key in _TRACE]
    names = [key for key, _ in found]
    sound = [it for it in found if names.count(it[0]) == 1 and _TRACE[it[0]].fullmatch(it[1])]
    return sound if b"traceparent" in dict(sound) else []


def to_client(node: Iterable[tuple[bytes, bytes]], *, wallet: str) -> RawHeaders:
    """The headers of the answer to the client. Raises NodeFailed for one that can't be sent."""
    node = [(key.lower(), value) for key, value in node]
    names = {key for key, _ in node}
    ours = {b"x-r3mes-node": wallet.encode(), **_ALWAYS}
    theirs = [
        (key, value)
        for key, value in node
        if (key in _TO_CLIENT or key.startswith(_TO_CLIENT_PREFIXES))
        and key not in ours
        and key not in _NO_NODES
        and not (key == b"content-length" and names & _ANOTHER_LENGTH)
    ]
    for key, value in theirs:
        if _CONTROL.search(value):
            raise NodeFailed(f"its header {key.decode()} has a control character")
    return theirs + list(ours.items())


def to_fallback(asked: RawHeaders, *, key: str | None) -> RawHeaders:
    """The headers of a request to a server that is no node, from those `to_node`."""
    kept = [it for it in asked if it[0] in _TO_FALLBACK]
    json = (b"content-type", b"application/json")
    return [*kept, json, *bearer(key)]


def bearer(key: str | None) -> RawHeaders:
    """Of the request to who wants `key`."""
    return [(b"authorization", f"Bearer {key}".encode())] if key else []


def of_fallback(kind: str, model: str, media_type: str) -> RawHeaders:
    """The headers of its answer to the client: all are ours."""
    return [
        (b"content-type", media_type.encode()),
        (FALLBACK, kind.encode()),
        (FALLBACK_MODEL, _INVISIBLE.sub("?", model)[:_LONGEST_MODEL].encode()),
        *_ALWAYS.items(),
    ]
