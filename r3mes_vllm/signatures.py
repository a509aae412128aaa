"""What a node's key signs, and how that is written down: `docs/protocol.md` in code.

Two texts are signed, each with its own first line, so that no signature of one kind passes for one
of the other: a request to a backend, and the proof that the key answers at the node's public URL.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

TOLERANCE_S = 60
"""Seconds by which the clocks of node and backend may differ."""

KEY = "X-R3MES-Key"
SIGNATURE = "X-R3MES-Signature"
TIME = "X-R3MES-Time"
BOOT = "X-R3MES-Boot"
SEQUENCE = "X-R3MES-Sequence"

NONCE_PATTERN = r"^[0-9a-f]{64}$"
KEY_PATTERN = r"^[0-9a-f]{64}$"
SIGNATURE_PATTERN = r"^[0-9a-f]{128}$"

_REQUEST = "r3mes-request-v1"
_ENDPOINT = "r3mes-endpoint-v1"
_HIGHEST_SEQUENCE = 2**63 - 1
_FORMS = {
    KEY: re.compile(r"[0-9a-f]{64}"),
    SIGNATURE: re.compile(r"[0-9a-f]{128}"),
    TIME: re.compile(r"[0-9]{1,11}"),
    BOOT: re.compile(r"[0-9a-f]{32}"),
    SEQUENCE: re.compile(r"[1-9][0-9]{0,18}"),
}


@dataclass(frozen=True)
class Claim:
    """Who says that they send a request, when, and as which one of theirs."""

    key: bytes
    """Ed25519, 32 bytes."""
    time: int
    """Seconds since the epoch."""
    boot: str
    """See `new_boot`: of two boots of a key the later one is the larger text."""
    sequence: int
    """From 1, rising within a boot; numbers may be left out."""

    @property
    def boot_time(self) -> int:
        """When that boot began, in seconds since the epoch."""
        return int(self.boot[:12], 16) // 1000


def new_boot(now: float) -> str:
    """A name for a process that starts at `now`, in seconds since the epoch: 12 hexadecimal digits
    of milliseconds, 20 of chance."""
    return f"{int(now * 1000):012x}{secrets.token_hex(10)}"


def not_yet(claim: Claim) -> str:
    """The least boot that no backend has taken by the time of `claim`, unless a clock was set back
    since. A claim's time may be `TOLERANCE_S` off, and so may that of the one that brought the
    boot, and the boot from it."""
    return f"{(claim.time + 3 * TOLERANCE_S) * 1000:012x}"


def request_text(claim: Claim, method: str, path: str, body: bytes) -> bytes:
    """What is signed for a request. `path` begins with `/api/`, wherever the backend is mounted."""
    digest = hashlib.sha256(body).hexdigest()
    parts = (_REQUEST, method, path, digest, str(claim.time), claim.boot, str(claim.sequence))
    return "\n".join(parts).encode()


def endpoint_text(nonce: str, url: str) -> bytes:
    """What a node signs that is asked whether it lives at `url`, its public URL."""
    return "\n".join((_ENDPOINT, nonce, url)).encode()


def to_headers(claim: Claim, signature: bytes) -> dict[str, str]:
    return {
        KEY: claim.key.hex(),
        SIGNATURE: signature.hex(),
        TIME: str(claim.time),
        BOOT: claim.boot,
        SEQUENCE: str(claim.sequence),
    }


def from_headers(headers: Mapping[str, str]) -> tuple[Claim, bytes] | None:
    """The claim and its signature, neither of them checked; None if there is no such header.

    `headers` are looked up in any case of letters. Raises ValueError naming the header that is
    missing or wrong.
    """
    if not any(name in headers for name in _FORMS):
        return None
    for name, form in _FORMS.items():
        if not form.fullmatch(headers.get(name, "")):
            raise ValueError(f"{name} is missing or not of the form {form.pattern}")
    if (sequence := int(headers[SEQUENCE])) > _HIGHEST_SEQUENCE:
        raise ValueError(f"{SEQUENCE} is over {_HIGHEST_SEQUENCE}")
    claim = Claim(bytes.fromhex(headers[KEY]), int(headers[TIME]), headers[BOOT], sequence)
    return claim, bytes.fromhex(headers[SIGNATURE])


def is_signed(key: bytes, signature: bytes, text: bytes) -> bool:
    """Whether `key` made `signature` of `text` (RFC 8032)."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True
