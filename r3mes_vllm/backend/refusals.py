"""The answers "no" that only the backend gives.

R3mesError
├── BadInput            the client's mistake; `field` says where
│   ├── Malformed       the body is not what its content type promises
│   ├── Unresolved      a host's name that can't be looked up now: it may be right
│   ├── Encoded         a body that is packed
│   ├── TooLarge        more bytes than a body may have
│   └── TooSlow         a body that takes too long to come
├── Unauthorized        no key, or a wrong one
│   └── BadSignature    no signature, or one that is not of this request and now
├── WrongKey            the wallet or the adapter's name belongs to another key
├── Replayed            that request, or a later one of the same node, was here before
├── Deactivated         the admin has taken that adapter out
├── UnknownNode         nobody registered that wallet
├── RateLimited         more requests than a minute allows
├── Unavailable         try again after `retry_after` seconds
│   ├── DatabaseDown
│   ├── NoRoom          for a long body, beside others that are on their way
│   └── NoSocket        this backend can open no connection, to whomever
└── NodeFailed          a node was reached and broke before it answered
    ├── NodeTimedOut
    └── RoutingLoop     the request has been through this backend already
"""

from typing import ClassVar

from r3mes_vllm import content_encoding
from r3mes_vllm.errors import R3mesError


class BadInput(R3mesError):
    """`field` is the name of the JSON field, query parameter or header that is wrong."""

    code = "bad_input"
    status = 422

    def __init__(self, message: str, *, field: str | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.field = field


class Malformed(BadInput):
    code = "malformed"
    status = 400


class Encoded(BadInput):
    code = content_encoding.CODE
    status = 415


class Unresolved(BadInput):
    pass


class TooLarge(BadInput):
    code = "too_large"
    status = 413


class TooSlow(BadInput):
    code = "too_slow"
    status = 408


class Unauthorized(R3mesError):
    code = "unauthorized"
    status = 401
    scheme: ClassVar[str] = "Bearer"


class BadSignature(Unauthorized):
    code = "bad_signature"
    scheme = "R3MES-Signature"


class WrongKey(R3mesError):
    code = "wrong_key"
    status = 403


class Replayed(R3mesError):
    code = "replayed"
    status = 403


class Deactivated(R3mesError):
    code = "deactivated"
    status = 403


class UnknownNode(R3mesError):
    code = "unknown_node"
    status = 404


class RateLimited(R3mesError):
    code = "rate_limit_exceeded"
    status = 429

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(R3mesError):
    code = "unavailable"
    status = 503

    def __init__(self, message: str, *, retry_after: int = 10, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class DatabaseDown(Unavailable):
    code = "database_down"


class NoRoom(Unavailable):
    code = "busy"


class NoSocket(Unavailable):
    code = "no_socket"


class NodeFailed(R3mesError):
    code = "node_failed"
    status = 502


class NodeTimedOut(NodeFailed):
    code = "node_timed_out"
    status = 504


class RoutingLoop(NodeFailed):
    code = "routing_loop"
    status = 508
