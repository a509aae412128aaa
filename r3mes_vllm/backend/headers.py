"""Which headers cross the backend.

Nodes are run by strangers, so both ways are lists of what passes. A client's `Authorization` and
cookies are the backend's business and stay here; a node sets no cookie and no policy on the
backend's own origin. Hop-by-hop headers (RFC 9110 section 7.6.1) are on neither list.
"""

import re
import uuid
from collections.abc import Iterable

from fastapi import Request

from r3mes_vllm.backend.refusals import BadInput, RoutingLoop

RawHeaders = list[tuple[bytes, bytes]]

VIA = "x-r3mes-via"
"""Names each backend a request has been through."""

_TO_NODE = {b"accept", b"content-type", b"traceparent", b"tracestate", b"x-wallet-address"}
_TO_CLIENT = {b"content-type", b"content-length", b"content-encoding", b"retry-after"}
_TO_CLIENT_PREFIXES = (b"x-r3mes-", b"x-ratelimit-", b"openai-")
_NAME = re.compile(r"[0-9a-f]{32}")
_HOPS = 16
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_FIELD_VALUE = re.compile(rb"[\t\x20-\x7e]{0,4096}")


def request_id(request: Request) -> str:
    """The client's `X-Request-Id` if it is a tame one, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def to_node(request: Request, *, name: str, adapter: str | None, request_id: str) -> RawHeaders:
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
        (b"accept-encoding", b"identity"),  # a compressor would hold tokens back
        (b"x-request-id", request_id.encode()),
        (VIA.encode(), ",".join([*seen[-_HOPS:], name]).encode()),
    ]


def to_client(node: Iterable[tuple[bytes, bytes]], *, wallet: str, request_id: str) -> RawHeaders:
    """The headers of the answer to the client."""
    ours = {
        b"x-r3mes-node": wallet.encode(),
        b"x-request-id": request_id.encode(),
        b"cache-control": b"no-store",
        b"x-accel-buffering": b"no",  # nginx would hold tokens back
        # A node's bytes must not become a page of the backend's origin.
        b"x-content-type-options": b"nosniff",
        b"content-security-policy": b"default-src 'none'; sandbox",
    }
    theirs = [
        (key, value)
        for key, value in ((key.lower(), value) for key, value in node)
        if (key in _TO_CLIENT or key.startswith(_TO_CLIENT_PREFIXES)) and key not in ours
    ]
    return theirs + list(ours.items())
