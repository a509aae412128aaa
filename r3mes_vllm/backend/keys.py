"""Who may: a bearer token or `X-API-Key` out of a set of keys."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from fastapi import Request

from r3mes_vllm.backend.refusals import Unauthorized
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.settings import Settings


class Keys:
    """A set of keys, held as SHA-256 digests. Empty means: everyone may."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys if key]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def demand(self, request: Request) -> None:
        """Raise Unauthorized unless `request` carries one of the keys."""
        if not self._digests:
            return
        given = _digest(_presented(request))
        # Every digest is compared, in constant time, so that timing tells nothing.
        if not sum([hmac.compare_digest(given, digest) for digest in self._digests]):
            raise Unauthorized(
                "a valid key is needed", hint="send Authorization: Bearer KEY, or X-API-Key: KEY"
            )


def client_keys(settings: Settings) -> Keys:
    """`api_keys` and the lines of `api_keys_file`. Raises ConfigError if that can't be read."""
    keys = list(settings.api_keys)
    if settings.api_keys_file:
        keys += _lines(settings.api_keys_file)
        if not any(keys):
            raise ConfigError(f"{settings.api_keys_file} holds no key", hint="one key a line")
    return Keys(keys)


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read the key file {path}: {error}") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _presented(request: Request) -> bytes:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    return key.encode("latin-1")  # as the header came


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
