"""dag-pb nodes and the files and directories in them, read strictly and by hand.

https://ipld.io/specs/codecs/dag-pb/spec/ and https://specs.ipfs.tech/unixfs/
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from r3mes_vllm.errors import BadCID, BadDAG
from r3mes_vllm.ipfs import varint
from r3mes_vllm.ipfs.cid import CID, RAW, Data


class Kind(Enum):
    FILE = "file"
    DIRECTORY = "directory"
    SHARD = "shard"


# UnixFS's own numbers; 0 is the old way to write a leaf
_KINDS = {0: Kind.FILE, 1: Kind.DIRECTORY, 2: Kind.FILE, 5: Kind.SHARD}
_SYMLINK = 4
_FANOUT_LIMIT = 1024


@dataclass(frozen=True, slots=True)
class Link:
    cid: CID
    name: str
    size: int
    """Bytes of the blocks under it, as the sender claims."""


@dataclass(frozen=True, slots=True)
class Node:
    kind: Kind
    data: Data
    links: tuple[Link, ...]
    blocksizes: tuple[int, ...]
    """Of a file: the bytes under each link."""
    size: int
    """Of a file: bytes in all, its own data included."""
    prefix: int = 0
    """Of a shard: how many hexadecimal digits come before a name."""


def read(cid: CID, block: Data) -> Node:
    """The node in the verified `block`, of which a raw one's data are a part. Raises BadDAG."""
    if cid.codec == RAW:
        return Node(Kind.FILE, block, (), (), len(block))
    try:
        links, data = _read_pb_node(bytes(block))
        if data is None:
            raise ValueError("it holds no UnixFS data")
        return _read_unixfs(data, links)
    except (ValueError, BadCID) as error:
        raise BadDAG(f"{cid}: {error}") from error


def _read_pb_node(block: bytes) -> tuple[tuple[Link, ...], bytes | None]:
    links: list[Link] = []
    data: bytes | None = None
    for number, value in _fields(block):
        if number == 2 and isinstance(value, bytes):
            links.append(_read_link(value))
        elif number == 1 and isinstance(value, bytes) and data is None:
            data = value
        else:
            raise ValueError(f"dag-pb field {number} is unknown or repeated")
    return tuple(links), data


def _read_link(message: bytes) -> Link:
    cid, name, size, last = None, "", 0, 0
    for number, value in _fields(message):
        if number <= last:
            raise ValueError("the fields of a link are repeated or out of order")
        last = number
        if number == 1 and isinstance(value, bytes):
            cid = CID.from_bytes(value)
        elif number == 2 and isinstance(value, bytes):
            name = value.decode()
        elif number == 3 and isinstance(value, int):
            size = value
        else:
            raise ValueError(f"field {number} of a link is unknown")
    if cid is None:
        raise ValueError("a link without a CID")
    return Link(cid, name, size)


def _read_unixfs(message: bytes, links: tuple[Link, ...]) -> Node:
    data, size, fanout = b"", None, 256
    number_of_kind: int | None = None
    blocksizes: list[int] = []
    for number, value in _fields(message):
        if number == 1 and isinstance(value, int):
            number_of_kind = value
        elif number == 2 and isinstance(value, bytes):
            data = value
        elif number == 3 and isinstance(value, int):
            size = value
        elif number == 4:
            blocksizes += [value] if isinstance(value, int) else _packed(value)
        elif number == 6 and isinstance(value, int):
            fanout = value
        elif number not in (5, 7, 8):  # hash type, mode and time mean nothing here
            raise ValueError(f"UnixFS field {number} is unknown")
    if number_of_kind == _SYMLINK:
        raise ValueError("it is a symbolic link")
    kind = _KINDS.get(number_of_kind if number_of_kind is not None else -1)
    if kind is None:
        raise ValueError(f"UnixFS type {number_of_kind} is not served")
    if kind is Kind.FILE:
        return _file(data, links, tuple(blocksizes), size)
    if kind is Kind.DIRECTORY:
        return Node(kind, b"", links, (), 0)
    if fanout & (fanout - 1) or not 8 <= fanout <= _FANOUT_LIMIT:
        raise ValueError(f"a fanout of {fanout} is no power of two up to {_FANOUT_LIMIT}")
    return Node(kind, b"", links, (), 0, prefix=len(f"{fanout - 1:x}"))


def _file(
    data: bytes, links: tuple[Link, ...], blocksizes: tuple[int, ...], size: int | None
) -> Node:
    if len(links) != len(blocksizes):
        raise ValueError(f"{len(links)} links and {len(blocksizes)} sizes")
    if any(link.name for link in links):
        raise ValueError("a part of a file has a name")
    total = len(data) + sum(blocksizes)
    if size is not None and size != total:
        raise ValueError(f"a file of {size} bytes has parts of {total} bytes")
    return Node(Kind.FILE, data, links, blocksizes, total)


def _fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """The fields of a protobuf message: numbers and byte strings, the only kinds used here."""
    found: list[tuple[int, int | bytes]] = []
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        value, at = _number(message, at)
        if key & 7 == 2:
            if at + value > len(message):
                raise ValueError("it is cut short")
            found.append((key >> 3, message[at : at + value]))
            at += value
        elif key & 7 == 0:
            found.append((key >> 3, value))
        else:
            raise ValueError(f"protobuf wire type {key & 7}")
    return found


def _packed(data: bytes) -> list[int]:
    numbers, at = [], 0
    while at < len(data):
        number, at = _number(data, at)
        numbers.append(number)
    return numbers


def _number(data: bytes, at: int) -> tuple[int, int]:
    found = varint.decode(data, at)
    if found is None:
        raise ValueError("it is cut short")
    return found


def encode_file(parts: list[Link], blocksizes: list[int]) -> bytes:
    """The dag-pb block of a file made of `parts`, as Kubo writes it."""
    sizes = b"".join(b"\x20" + varint.encode(size) for size in blocksizes)
    data = b"\x08\x02\x18" + varint.encode(sum(blocksizes)) + sizes
    return _encode_node(parts, data)


def encode_directory(entries: list[Link]) -> bytes:
    """The dag-pb block of a directory; `entries` in any order."""
    return _encode_node(sorted(entries, key=lambda link: link.name.encode()), b"\x08\x01")


def encode_leaves(content: bytes) -> Iterator[bytes]:
    """The dag-pb leaves in which implementations wrap `content` where leaves are not raw."""
    size = b"\x18" + varint.encode(len(content))
    data = b"\x12" + _prefixed(content) if content else b""
    for kind in (b"\x08\x02", b"\x08\x00"):
        yield b"\x0a" + _prefixed(kind + data + size)


def _encode_node(links: list[Link], data: bytes) -> bytes:
    encoded = b"".join(b"\x12" + _prefixed(_encode_link(link)) for link in links)
    return encoded + b"\x0a" + _prefixed(data)


def _encode_link(link: Link) -> bytes:
    return (
        b"\x0a"
        + _prefixed(bytes(link.cid))
        + b"\x12"
        + _prefixed(link.name.encode())
        + b"\x18"
        + varint.encode(link.size)
    )


def _prefixed(data: bytes) -> bytes:
    return varint.encode(len(data)) + data
