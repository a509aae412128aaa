"""CARs: reading a stream of blocks, of version 1 or within version 2, and writing one of version 1.

https://ipld.io/specs/transport/car/carv1/ and https://ipld.io/specs/transport/car/carv2/
"""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from r3mes_vllm.errors import BadCAR, BadCID, SourceFailed
from r3mes_vllm.ipfs import varint
from r3mes_vllm.ipfs.cid import CID, Data, split

BLOCK_LIMIT = 2 << 20
"""Bytes; what the network carries at most (https://specs.ipfs.tech/bitswap-protocol/)."""

_SECTION_LIMIT = BLOCK_LIMIT + 256
_HEADER_LIMIT = 1 << 16
_LONGEST_CID = 160  # bytes: an identity of 128 and its four numbers
_FOREIGN_LIMIT = 256 << 20
"""Bytes in all of blocks that are skipped, for whose CIDs nobody can ask."""

_V2_HEADER = 40
_V2_START = 11 + _V2_HEADER
_PADDING_LIMIT = 1 << 20
_SKIPPED = 1 << 16

Block = tuple[CID, bytes]
LentBlock = tuple[CID, Data]
"""Its data may be part of a buffer that is used again."""


class Body(Protocol):
    """Bytes that come, from a file or over a connection."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Wait for bytes, into `buffer` from its start; how many came, 0 at the end."""


@dataclass(frozen=True, slots=True)
class _Head:
    """What stands before a block's data, and the first of these."""

    cid: CID
    length: int
    """Of the data."""
    data: bytes


class CarReader:
    """Reads the CAR in `body`, waiting for what has not come; the blocks are unchecked.

    `source` is named in errors. Every method raises BadCAR, and what `body` raises.
    """

    def __init__(self, body: Body, source: str) -> None:
        self._body = body
        self._source = source
        self._roots: tuple[CID | None, ...] | None = None
        self._left: int | None = None
        """Bytes of the CARv1 within a CARv2."""
        self._foreign = 0
        self._head: _Head | None = None
        """Of the block that did not fit into the last buffer."""
        self._failure: BadCAR | SourceFailed | None = None

    @property
    def roots(self) -> tuple[CID | None, ...]:
        """The sender's claim, nothing more; None for a CID of a kind that is not supported."""
        if self._roots is None:
            header = self._header()
            if header == {"version": 2}:
                self._enter()
                header = self._header()
            if header.get("version") != 1:
                raise BadCAR(f"{self._source}: this is no CAR of version 1 or 2")
            self._roots = _roots_of(header, self._source)
        return self._roots

    def fill(self, buffer: memoryview, patience_s: float) -> list[LentBlock]:
        """The next blocks, their data in `buffer`, of at least `BLOCK_LIMIT` bytes: what fits and
        came within the time, but one block if there is one. An error is raised by the call after
        the one that gave the blocks before it."""
        until = time.monotonic() + patience_s
        blocks: list[LentBlock] = []
        try:
            if self._failure is not None:
                raise self._failure
            while head := self._head or self.head():
                self._head = head
                if head.length > len(buffer):
                    break
                data, buffer = buffer[: head.length], buffer[head.length :]
                self.data(head, data)
                blocks.append((head.cid, data))
                self._head = None
                if time.monotonic() > until:
                    break
        except (BadCAR, SourceFailed) as error:
            if not blocks:
                raise
            self._failure = error
        return blocks

    def head(self) -> _Head | None:
        """Of the next block; None at the end. Its data are to be read, or skipped, next."""
        if self.roots is None:
            return None
        while (section := self._section(_SECTION_LIMIT)) is not None:
            start = self._exactly(min(section, _LONGEST_CID))
            try:
                cid, end = CID.read(start)
            except BadCID as error:
                self._skip_foreign(start, section, error)
                continue
            length = section - end
            if length > BLOCK_LIMIT:
                raise BadCAR(f"{self._source}: a block of {length} bytes (at most {BLOCK_LIMIT})")
            return _Head(cid, length, start[end:])
        return None

    def data(self, head: _Head, into: memoryview) -> None:
        """Fill `into`, which is as long as the block's data."""
        came = len(head.data)
        into[:came] = head.data
        self._fill(into[came:])

    def skip(self, head: _Head, file: BinaryIO) -> None:
        """Go on after the block's data in `file`, which is the body."""
        rest = head.length - len(head.data)
        file.seek(rest, os.SEEK_CUR)
        self._count(rest)

    def _skip_foreign(self, start: bytes, section: int, error: BadCID) -> None:
        """Pass over a section whose CID is sound, but of a codec or hash that is not supported."""
        try:
            split(start)
        except BadCID:
            raise BadCAR(f"{self._source}: a block's CID: {error}") from error
        self._foreign += section
        if self._foreign > _FOREIGN_LIMIT:
            raise BadCAR(f"{self._source}: over {_FOREIGN_LIMIT} bytes of other kinds of blocks")
        self._pass(section - len(start))

    def _header(self) -> dict[object, object]:
        length = self._section(_HEADER_LIMIT)
        if length is None:
            raise self._cut_short()
        return _read_header(self._exactly(length), self._source)

    def _enter(self) -> None:
        """Of a CARv2, whose pragma was read: go to the CARv1 in it."""
        head = self._exactly(_V2_HEADER)
        offset, size = (int.from_bytes(head[at : at + 8], "little") for at in (16, 24))
        if not _V2_START <= offset <= _V2_START + _PADDING_LIMIT or not size:
            raise BadCAR(
                f"{self._source}: a CAR of version 2 with {size} bytes of blocks at {offset}",
                hint="perhaps its writing was cut short: write it anew",
            )
        self._pass(offset - _V2_START)
        self._left = size

    def _section(self, limit: int) -> int | None:
        """The length of the next; None at the end."""
        prefix, found = b"", None
        while found is None:
            byte = bytearray(1)
            if not self._readinto(memoryview(byte)):
                if prefix or self._left:
                    raise self._cut_short()
                return None
            prefix += byte
            try:
                found = varint.decode(prefix)
            except ValueError as error:
                raise BadCAR(f"{self._source}: {error}") from error
        if not 0 < found[0] <= limit:
            raise BadCAR(f"{self._source}: a section of {found[0]} bytes (at most {limit})")
        return found[0]

    def _exactly(self, length: int) -> bytes:
        data = bytearray(length)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, view: memoryview) -> None:
        while view:
            came = self._readinto(view)
            if not came:
                raise self._cut_short()
            view = view[came:]

    def _pass(self, length: int) -> None:
        while length:
            part = min(length, _SKIPPED)
            self._exactly(part)
            length -= part

    def _readinto(self, view: memoryview) -> int:
        if self._left is not None:
            view = view[: self._left]
        came = (self._body.readinto(view) or 0) if view else 0
        self._count(came)
        return came

    def _count(self, came: int) -> None:
        if self._left is not None:
            self._left = max(self._left - came, 0)

    def _cut_short(self) -> BadCAR:
        return BadCAR(f"{self._source}: the CAR is cut short")


def read_file(path: Path) -> Iterator[Block]:
    """The verified blocks of the CAR file at `path`. Raises OSError, BadCAR or BlockMismatch."""
    with path.open("rb") as file:
        reader = CarReader(file, str(path))
        while head := reader.head():
            data = bytearray(head.length)
            reader.data(head, memoryview(data))
            head.cid.check(data, str(path))
            yield head.cid, bytes(data)


class CarFile:
    """The blocks of the CAR file at `path` by CID, found in one pass over its sections."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or BadCAR; what stands before the damage of a damaged file is found."""
        self._path = path
        self._places: dict[CID, tuple[int, int]] = {}
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            reader = CarReader(file, str(path))
            try:
                while head := reader.head():
                    at = file.tell() - len(head.data)
                    if at + head.length > size:
                        break
                    self._places.setdefault(head.cid, (at, head.length))
                    reader.skip(head, file)
            except BadCAR:
                if not self._places:
                    raise

    def block(self, cid: CID) -> bytes | None:
        """Unchecked. Raises OSError."""
        if cid not in self._places:
            return None
        at, length = self._places[cid]
        with self._path.open("rb") as file:
            file.seek(at)
            return file.read(length)


def root_of(path: Path) -> CID:
    """The one root that the CAR file at `path` names. Raises BadCAR, also for one of a kind that is
    not supported."""
    try:
        with path.open("rb") as file:
            roots = CarReader(file, str(path)).roots
    except OSError as error:
        raise BadCAR(f"can't read {path}: {error.strerror}") from error
    if len(roots) != 1 or roots[0] is None:
        raise BadCAR(
            f"{path} is no CAR file with one root of raw or dag-pb",
            hint="write one: r3mes-vllm adapter pack DIR -o FILE.car",
        )
    return roots[0]


def write(file: BinaryIO, root: CID, blocks: Iterable[Block]) -> None:
    """One root, the blocks in the order given: the same bytes for the same blocks."""
    link = b"\x00" + bytes(root)
    header = b"\xa2eroots\x81\xd8\x2a" + _cbor_bytes(link) + b"gversion\x01"
    file.write(varint.encode(len(header)) + header)
    for cid, data in blocks:
        name = bytes(cid)
        file.write(varint.encode(len(name) + len(data)) + name)
        file.write(data)


def _cbor_bytes(data: bytes) -> bytes:
    head = bytes([0x40 | len(data)]) if len(data) < 24 else bytes([0x58, len(data)])
    return head + data


def _read_header(data: bytes, source: str) -> dict[object, object]:
    try:
        header, end = _cbor(data, 0, depth=0)
    except (ValueError, IndexError, BadCID) as error:
        raise BadCAR(f"{source}: the header of the CAR can't be read: {error}") from error
    if end != len(data) or not isinstance(header, dict):
        raise BadCAR(f"{source}: this is no CAR of version 1 or 2")
    return header


def _roots_of(header: dict[object, object], source: str) -> tuple[CID | None, ...]:
    """Some senders write null where there is none."""
    found = header.get("roots", 0)
    found = [] if found is None else found
    if not isinstance(found, list) or not all(isinstance(it, CID | None) for it in found):
        raise BadCAR(f"{source}: the header of the CAR has no roots")
    return tuple(found)


def _link(data: bytes) -> CID | None:
    """None for a CID of a kind that is not supported. Raises BadCID."""
    try:
        return CID.from_bytes(data)
    except BadCID:
        if split(data)[3] != len(data):
            raise
        return None


def _cbor(data: bytes, at: int, depth: int) -> tuple[object, int]:
    """The few kinds of DAG-CBOR that a header is made of (RFC 8949)."""
    if depth > 3:
        raise ValueError("it is nested too deep")
    kind, info = data[at] >> 5, data[at] & 0x1F
    at += 1
    if info >= 24:
        size = {24: 1, 25: 2, 26: 4, 27: 8}.get(info)
        if size is None or at + size > len(data):
            raise ValueError("it is cut short or of indefinite length")
        info, at = int.from_bytes(data[at : at + size], "big"), at + size
    if kind in (2, 3):
        if at + info > len(data):
            raise ValueError("it is cut short")
        body = data[at : at + info]
        return (body if kind == 2 else body.decode()), at + info
    if kind == 4:
        items = []
        for _ in range(min(info, len(data))):
            item, at = _cbor(data, at, depth + 1)
            items.append(item)
        return items, at
    if kind == 5:
        pairs: dict[object, object] = {}
        for _ in range(min(info, len(data))):
            key, at = _cbor(data, at, depth + 1)
            value, at = _cbor(data, at, depth + 1)
            if not isinstance(key, str) or key in pairs:
                raise ValueError("a key is no text or stands twice")
            pairs[key] = value
        return pairs, at
    if kind == 6 and info == 42:
        link, at = _cbor(data, at, depth + 1)
        if not isinstance(link, bytes) or link[:1] != b"\x00":
            raise ValueError("a link is no CID")
        return _link(link[1:]), at
    if kind == 0:
        return info, at
    if (kind, info) == (7, 22):
        return None, at
    raise ValueError(f"there is CBOR of kind {kind} in it")
