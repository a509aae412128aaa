"""The node's Ed25519 key, made at first start, and the wallet address derived from it."""

import base64
import hashlib
import os
import tempfile
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


@dataclass(frozen=True)
class Identity:
    key: Ed25519PrivateKey

    @classmethod
    def load(cls, state_dir: Path) -> "Identity":
        """Read `node.key` (PEM, mode 0600) from `state_dir`, or make it there."""
        path = state_dir / _KEY_FILE
        try:
            pem = path.read_bytes()
        except FileNotFoundError:
            pem = _create(path)
        except OSError as error:
            raise ConfigError(f"can't read the node key {path}: {error}") from error
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
        """`remes1` and 38 characters of `[a-z0-9]`: base32 of the key's SHA-256, cut."""
        public = self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        text = base64.b32encode(hashlib.sha256(public).digest()).decode().lower()
        return "remes1" + text[:38]


def _create(path: Path) -> bytes:
    pem = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        with open(fd, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)  # fails if another process was first: its key is then ours
        except FileExistsError:
            return path.read_bytes()
        return pem
    except OSError as error:
        raise ConfigError(
            f"can't make the node key {path}: {error}",
            hint="set R3MES_STATE_DIR to a writable folder",
        ) from error
    finally:
        if aside:
            os.unlink(aside)
