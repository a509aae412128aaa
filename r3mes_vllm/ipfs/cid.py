"""Content identifiers, and the check that bytes are what a CID names.

https://github.com/multiformats/cid. Text goes through py-multibase (under py-multiformats-cid);
the binary form is read here: py-multiformats-cid refuses valid identity CIDs, takes CIDv0 over
other hashes, and its equal CIDs hash differently.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import base58
import multibase
from blake3 import blake3

from r3mes_vllm.errors import BadCID, BlockMismatch
from r3mes_vllm.ipfs import varint

RAW, DAG_PB = 0x55, 0x70
SHA2_256 = 0x12
IDENTITY = 0x00
_CODECS = {RAW: "raw", DAG_PB: "dag-pb"}
_IDENTITY_LIMIT = 128
_LONGEST_TEXT = 512
_BASES = {"b": "base32", "k": "base36", "z": "base58btc", "u": "base64url"}

Data = bytes | bytearray | memoryview

# multihash code → (digest length in bytes, function)
_HASHES: dict[int, tuple[int, Callable[[Data], bytes]]] = {
    SHA2_256: (32, lambda data: hashlib.sha256(data).digest()),
    0x13: (64, lambda data: hashlib.sha512(data).digest()),
    0xB220: (32, lambda data: hashlib.blake2b(data, digest_size=32).digest()),
    0x1E: (32, lambda data: blake3(data).digest()),
}


@dataclass(frozen=True, slots=True)
class CID:
    """Equal for every spelling of one CID: version 0 is read as the version 1 it stands for."""

    codec: int
    hash_code: int
    digest: bytes

    @classmethod
    def parse(cls, text: str) -> "CID":
        """Version 0, or version 1 in base32, base36, base58btc or base64url. Raises BadCID."""
        try:
            return cls.from_bytes(_decode_text(text))
        except (ValueError, BadCID) as error:
            shown = text if len(text) <= 100 else f"{text[:97]}..."
            raise BadCID(f"{shown!r} is no CID that can be used: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> "CID":
        """Exactly one binary CID. Raises BadCID."""
        cid, end = cls.read(data)
        if end != len(data):
            raise BadCID(f"{len(data) - end} bytes follow the CID")
        return cid

    @classmethod
    def read(cls, data: bytes | memoryview) -> tuple["CID", int]:
        """The binary CID that `data` begins with, and where it ends. Raises BadCID."""
        codec, hash_code, digest, end = split(data)
        if codec not in _CODECS:
            raise BadCID(f"codec {codec:#x} is not raw or dag-pb")
        if hash_code == IDENTITY:
            if len(digest) > _IDENTITY_LIMIT:
                raise BadCID(f"an identity digest of {len(digest)} bytes is over {_IDENTITY_LIMIT}")
        elif hash_code not in _HASHES:
            raise BadCID(f"hash {hash_code:#x} is not supported")
        elif len(digest) != _HASHES[hash_code][0]:
            raise BadCID(f"a digest of {len(digest)} bytes is not {_HASHES[hash_code][0]} bytes")
        return cls(codec, hash_code, digest), end

    @classmethod
    def of(cls, codec: int, data: bytes) -> "CID":
        """Of `data`, by sha2-256."""
        return cls(codec, SHA2_256, hashlib.sha256(data).digest())

    @property
    def inline(self) -> bytes | None:
        """The data itself, of an identity CID."""
        return self.digest if self.hash_code == IDENTITY else None

    def matches(self, data: Data) -> bool:
        if self.hash_code == IDENTITY:
            return data == self.digest
        return _HASHES[self.hash_code][1](data) == self.digest

    def check(self, data: Data, source: str) -> None:
        """Raises BlockMismatch naming `source`, which gave `data` as this CID's."""
        if not self.matches(data):
            raise BlockMismatch(f"{source} gave bytes that are not those of {self}")

    def __bytes__(self) -> bytes:
        return varint.encode(1) + varint.encode(self.codec) + self.multihash

    @property
    def multihash(self) -> bytes:
        return varint.encode(self.hash_code) + varint.encode(len(self.digest)) + self.digest

    def __str__(self) -> str:
        """Version 1 in base32."""
        return str(multibase.encode("base32", bytes(self)).decode())


def split(data: bytes | memoryview) -> tuple[int, int, bytes, int]:
    """Codec, hash and digest of the binary CID that `data` begins with, also of those that are not
    supported, and where it ends. Raises BadCID."""
    if bytes(data[:2]) == b"\x12\x20":
        codec, hash_code, length, at = DAG_PB, SHA2_256, 32, 2
    else:
        version, at = _number(data, 0)
        if version != 1:
            raise BadCID(f"version {version} is not 0 or 1")
        codec, at = _number(data, at)
        hash_code, at = _number(data, at)
        length, at = _number(data, at)
    if len(data) < at + length:
        raise BadCID("it is cut short")
    return codec, hash_code, bytes(data[at : at + length]), at + length


def _decode_text(text: str) -> bytes:
    if not text or len(text) > _LONGEST_TEXT or not text.isascii():
        raise BadCID("it is empty, too long or not ASCII")
    if len(text) == 46 and text.startswith("Qm"):
        data = base58.b58decode(text)
        if len(data) != 34 or data[:2] != b"\x12\x20":
            raise BadCID("a CID of version 0 is over sha2-256")
        return bytes(data)
    base = _BASES.get(text[0])
    if base is None:
        raise BadCID(f"{text[0]!r} is not the sign of base32, base36, base58btc or base64url")
    try:
        data = multibase.decode(text)
        spelled_so = multibase.encode(base, data).decode() == text
    except Exception as error:
        raise BadCID(f"it is not {base}") from error
    if not spelled_so:
        raise BadCID(f"it is not minimal {base}")
    if data[:1] != b"\x01":
        raise BadCID("only version 1 is written in a base")
    return bytes(data)


def _number(data: bytes | memoryview, at: int) -> tuple[int, int]:
    try:
        found = varint.decode(data, at)
    except ValueError as error:
        raise BadCID(str(error)) from error
    if found is None:
        raise BadCID("it is cut short")
    return found
