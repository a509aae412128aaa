"""CARv1: reading a stream of blocks, each checked against its CID, and writing one.

https://ipld.io/specs/transport/car/carv1/
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from r3mes_vllm.errors import BadCAR, BadCID
from r3mes_vllm.ipfs import varint
from r3mes_vllm.ipfs.cid import CID

BLOCK_LIMIT = 2 << 20
"""Bytes; what the network carries at most (https://specs.ipfs.tech/bitswap-protocol/)."""

_SECTION_LIMIT = BLOCK_LIMIT + 256
_HEADER_LIMIT = 1 << 16
_READ = 1 << 18

Block = tuple[CID, bytes]


class CarReader:
    """Takes the bytes of a CAR as they come and gives the blocks that are complete.

    `source` is named in errors. Memory: one block and the bytes fed last.
    """

    def __init__(self, source: str) -> None:
        self.roots: tuple[CID, ...] | None = None
        """None until the header has been read. Roots are the sender's claim, nothing more."""
        self._source = source
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Block]:
        """The blocks completed by `data`. Raises BadCAR or BlockMismatch."""
        self._buffer += data
        blocks: list[Block] = []
        at = 0
        while (section := self._section(at)) is not None:
            start, at = section
            body = bytes(memoryview(self._buffer)[start:at])
            if self.roots is None:
                self.roots = _read_header(body, self._source)
            else:
                blocks.append(self._read_block(body))
        del self._buffer[:at]
        return blocks

    def close(self) -> None:
        """Raises BadCAR if the stream ended within a section, or before its header."""
        if self._buffer or self.roots is None:
            raise BadCAR(f"{self._source}: the CAR is cut short")

    def _section(self, at: int) -> tuple[int, int] | None:
        try:
            found = varint.decode(self._buffer, at)
        except ValueError as error:
            raise BadCAR(f"{self._source}: {error}") from error
        if found is None:
            return None
        length, start = found
        limit = _HEADER_LIMIT if self.roots is None else _SECTION_LIMIT
        if not 0 < length <= limit:
            raise BadCAR(f"{self._source}: a section of {length} bytes (at most {limit})")
        return (start, start + length) if len(self._buffer) >= start + length else None

    def _read_block(self, section: bytes) -> Block:
        try:
            cid, end = CID.read(section)
        except BadCID as error:
            raise BadCAR(f"{self._source}: a block's CID: {error}") from error
        data = section[end:]
        if len(data) > BLOCK_LIMIT:
            raise BadCAR(f"{self._source}: a block of {len(data)} bytes (at most {BLOCK_LIMIT})")
        cid.check(data, self._source)
        return cid, data


def read_file(path: Path) -> Iterator[Block]:
    """The verified blocks of the CAR file at `path`. Raises OSError, BadCAR or BlockMismatch."""
    reader = CarReader(str(path))
    with path.open("rb") as file:
        while data := file.read(_READ):
            yield from reader.feed(data)
    reader.close()


def root_of(path: Path) -> CID:
    """The one root that the CAR file at `path` names. Raises BadCAR."""
    reader = CarReader(str(path))
    try:
        with path.open("rb") as file:
            while reader.roots is None and (data := file.read(_READ)):
                reader.feed(data)
    except OSError as error:
        raise BadCAR(f"can't read {path}: {error.strerror}") from error
    if reader.roots is None or len(reader.roots) != 1:
        raise BadCAR(f"{path} is no CAR file with one root")
    return reader.roots[0]


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


def _read_header(data: bytes, source: str) -> tuple[CID, ...]:
    try:
        header, end = _cbor(data, 0, depth=0)
    except (ValueError, IndexError, BadCID) as error:
        raise BadCAR(f"{source}: the header of the CAR can't be read: {error}") from error
    if end != len(data) or not isinstance(header, dict) or header.get("version") != 1:
        raise BadCAR(f"{source}: this is no CAR of version 1")
    roots = header.get("roots")
    if not isinstance(roots, list) or not all(isinstance(root, CID) for root in roots):
        raise BadCAR(f"{source}: the header of the CAR has no roots")
    return tuple(roots)


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
        return CID.from_bytes(link[1:]), at
    if kind == 0:
        return info, at
    raise ValueError(f"there is CBOR of kind {kind} in it")
