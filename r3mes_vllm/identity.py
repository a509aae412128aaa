"""Secrets of a node, made at its first start: its Ed25519 key, from which its wallet address is
derived, and the keys by which its backend may use it and its operator command it."""

import base64
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from r3mes_vllm.errors import ConfigError

_KEY_FILE = "node.key"
_ACCESS_FILE = "access.key"
_OPERATOR_FILE = "operator.key"
_BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"


@dataclass(frozen=True)
class Identity:
    key: Ed25519PrivateKey

    @classmethod
    def load(cls, state_dir: Path, *, make: bool = True) -> "Identity":
        """Read `node.key` (PEM, mode 0600) from `state_dir`, or make it there. Without `make`, one
        that is nowhere kept if no node was started with this folder."""
        path = state_dir / _KEY_FILE
        if not make and not path.exists():
            return cls(Ed25519PrivateKey.generate())
        pem = _kept(path, _new_key)
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(
                f"{path} is not a private key: {error}",
                hint="restore it from a backup, or move it away to get a new wallet",
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path} holds a {type(key).__name__}, not an Ed25519 key")
        return cls(key)

    @property
    def wallet_address(self) -> str:
        return wallet_of(self.public_key)

    @property
    def public_key(self) -> bytes:
        """32 bytes."""
        return self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def sign(self, text: bytes) -> bytes:
        """64 bytes (RFC 8032)."""
        return self.key.sign(text)


def wallet_of(public_key: bytes) -> str:
    """`remes1` and 38 characters of `[a-z2-7]`: base32 of the key's SHA-256, cut."""
    text = base64.b32encode(hashlib.sha256(public_key).digest()).decode().lower()
    return "remes1" + text[:38]


def is_derived(wallet: str) -> bool:
    """Whether `wallet` was made by `wallet_of`. The address of an account may look like that; its
    checksum tells them apart."""
    return bool(re.fullmatch("remes1[a-z2-7]{38}", wallet)) and not _is_bech32(wallet)


def access_key(state_dir: Path) -> str:
    """What opens the client's routes of this node to its backend: in `access.key`, mode 0600."""
    return _token(state_dir / _ACCESS_FILE)


def operator_key(state_dir: Path, *, make: bool = True) -> str:
    """What opens all routes of this node to its operator: in `operator.key`, mode 0600. Without
    `make`, empty if no node was started with this folder."""
    path = state_dir / _OPERATOR_FILE
    return _token(path) if make or path.exists() else ""


def _token(path: Path) -> str:
    key = _kept(path, lambda: secrets.token_urlsafe(32).encode()).decode("latin-1").strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{43}", key):
        raise ConfigError(
            f"{path} is not an access key", hint="move it away, and the node makes another"
        )
    return key


def _is_bech32(address: str) -> bool:
    """BIP 173: whether the last six characters are the checksum of the others."""
    prefix, _, data = address.rpartition("1")
    if not set(data) <= set(_BECH32):
        return False
    high, low = [ord(it) >> 5 for it in prefix], [ord(it) & 31 for it in prefix]
    checksum = 1
    for value in [*high, 0, *low, *map(_BECH32.index, data)]:
        top = checksum >> 25
        checksum = ((checksum & 0x1FFFFFF) << 5) ^ value
        for bit, term in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            if top >> bit & 1:
                checksum ^= term
    return checksum == 1


def _new_key() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )


def _kept(path: Path, make: Callable[[], bytes]) -> bytes:
    """What `path` holds; what `make` gives, kept there, if there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return _create(path, make())
    except OSError as error:
        raise ConfigError(f"can't read the key {path}: {error}") from error


def _create(path: Path, content: bytes) -> bytes:
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)  # fails if another process was first: its key is then ours
        except FileExistsError:
            return path.read_bytes()
        return content
    except OSError as error:
        raise ConfigError(
            f"can't make the key {path}: {error}",
            hint="set R3MES_STATE_DIR to a writable folder",
        ) from error
    finally:
        if aside:
            os.unlink(aside)
