"""API keys, known by their SHA-256 only; those in a file follow it while the program runs."""

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from r3mes_vllm import report
from r3mes_vllm.errors import ConfigError

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_OF_NOTHING = f"sha256:{hashlib.sha256().hexdigest()}"

_Stamp = tuple[int, int, int]


class Keys:
    """`given` keys and those in `file`: one a line, as itself or as `sha256:` and 64 hex digits.

    Lines that begin with `#` are notes. Raises ConfigError if the file can't be read at first;
    one that can't be read later changes nothing.
    """

    def __init__(self, given: Iterable[str] = (), file: Path | None = None) -> None:
        self._given = [_digest(key.encode()) for key in given if key]
        self._file = file
        self._from_file: list[bytes] = []
        self._stamp: _Stamp | None = None
        if file:
            self._stamp = _stamp(file)
            self._from_file = _read(file)

    @property
    def needed(self) -> bool:
        """Also while the file has none: to take out the last key opens no door."""
        return bool(self._given or self._file)

    def __len__(self) -> int:
        return len(self._digests())

    def accept(self, key: bytes) -> bool:
        given = _digest(key)
        # Every digest is compared, in constant time, so that timing tells nothing.
        return any([hmac.compare_digest(given, digest) for digest in self._digests()])

    def _digests(self) -> list[bytes]:
        if self._file and (stamp := _stamp(self._file)) != self._stamp:
            self._stamp = stamp
            try:
                self._from_file = _read(self._file)
            except ConfigError as error:
                report.warn(f"{error}; the keys it had before are valid still")
        return [*self._given, *self._from_file]


def presented(headers: Mapping[str, str]) -> bytes:
    """The key in a request's headers, as it came; their names are in small letters."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    key = bearer or headers.get("x-api-key", "")
    return key.encode("latin-1")


def _read(file: Path) -> list[bytes]:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read the keys in {file}: {error}") from error
    found = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if not line.startswith("sha256:"):
            found.append(_digest(line.encode()))
        elif line == _OF_NOTHING:
            raise ConfigError(
                f"{file}, line {number}: that is the SHA-256 of an empty key",
                hint="printf %s KEY | sha256sum",
            )
        elif hashed := _HASHED.fullmatch(line):
            found.append(bytes.fromhex(hashed[1]))
        else:
            raise ConfigError(
                f"{file}, line {number}: after sha256: come 64 digits of 0-9a-f",
                hint="printf %s KEY | sha256sum",
            )
    return found


def _stamp(file: Path) -> _Stamp | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
