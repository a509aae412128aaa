"""CARv1: reading a stream of blocks and writing one.

https://ipld.io/specs/transport/car/carv1/
"""

from collections import deque
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
_LONGEST_CID = 160  # bytes: an identity of 128 and its four numbers

Block = tuple[CID, bytes]


class CarReader:
    """Takes the bytes of a CAR as they come and gives the blocks that are complete, unchecked.

    `source` is named in errors. Memory: one block and the bytes fed last.
    """

    def __init__(self, source: str) -> None:
        self.roots: tuple[CID, ...] | None = None
        """None until the header has been read. Roots are the sender's claim, nothing more."""
        self._source = source
        self._pieces: deque[memoryview] = deque()
        self._have = 0
        self._section = 0
        """Bytes of the section that is coming; 0 before its length is known."""

    def feed(self, data: bytes) -> list[Block]:
        """The blocks completed by `data`. Raises BadCAR."""
        if data:
            self._pieces.append(memoryview(data))
            self._have += len(data)
        blocks: list[Block] = []
        while self._section or self._begin_section():
            if self._have < self._section:
                break
            if self.roots is None:
                self.roots = _read_header(self._pull(self._section), self._source)
            else:
                blocks.append(self._read_block())
            self._section = 0
        return blocks

    def close(self) -> None:
        """Raises BadCAR if the stream ended within a section, or before its header."""
        if self._have or self._section or self.roots is None:
            raise BadCAR(f"{self._source}: the CAR is cut short")

    def _begin_section(self) -> bool:
        try:
            found = varint.decode(self._peek(varint.LONGEST))
        except ValueError as error:
            raise BadCAR(f"{self._source}: {error}") from error
        if found is None:
            return False
        length, end = found
        limit = _HEADER_LIMIT if self.roots is None else _SECTION_LIMIT
        if not 0 < length <= limit:
            raise BadCAR(f"{self._source}: a section of {length} bytes (at most {limit})")
        self._pull(end)
        self._section = length
        return True

    def _read_block(self) -> Block:
        try:
            cid, end = CID.read(self._peek(min(self._section, _LONGEST_CID)))
        except BadCID as error:
            raise BadCAR(f"{self._source}: a block's CID: {error}") from error
        length = self._section - end
        if length > BLOCK_LIMIT:
            raise BadCAR(f"{self._source}: a block of {length} bytes (at most {BLOCK_LIMIT})")
        self._pull(end)
        return cid, self._pull(length)

    def _peek(self, length: int) -> bytes:
        """The next bytes, `length` of them at most."""
        found = b""
        for piece in self._pieces:
            found += piece[: length - len(found)]
            if len(found) == length:
                break
        return found

    def _pull(self, length: int) -> bytes:
        """Exactly the next `length` bytes, which are here: copied once."""
        self._have -= length
        parts = []
        while length:
            piece = self._pieces[0]
            parts.append(piece[:length])
            if length < len(piece):
                self._pieces[0] = piece[length:]
                break
            length -= len(self._pieces.popleft())
        return b"".join(parts)


def read_file(path: Path) -> Iterator[Block]:
    """The verified blocks of the CAR file at `path`. Raises OSError, BadCAR or BlockMismatch."""
    reader = CarReader(str(path))
    with path.open("rb") as file:
        while data := file.read(_READ):
            for cid, block in reader.feed(data):
                cid.check(block, str(path))
                yield cid, block
    reader.close()


class CarFile:
    """The blocks of the CAR file at `path` by CID, found in one pass over its sections."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or BadCAR; what stands before the damage of a damaged file is found."""
        self._path = path
        self._places: dict[CID, tuple[int, int]] = {}
        with path.open("rb") as file:
            try:
                for cid, at, length in _sections(file, str(path)):
                    self._places.setdefault(cid, (at, length))
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


def _sections(file: BinaryIO, source: str) -> Iterator[tuple[CID, int, int]]:
    """The CID of each block, where its data begin, and their length."""
    reader = CarReader(source)
    at = 0
    while reader.roots is None and (data := file.read(64)):
        reader.feed(data)
    file.seek(0)
    head = varint.decode(file.read(10)) if reader.roots is not None else None
    if head is None:
        raise BadCAR(f"{source}: the CAR is cut short")
    at = head[1] + head[0]
    while True:
        file.seek(at)
        start = file.read(10 + _LONGEST_CID)
        if not start:
            return
        try:
            found = varint.decode(start)
            if found is None:
                raise BadCAR(f"{source}: the CAR is cut short")
            length, after = found
            cid, end = CID.read(start[after:])
        except (ValueError, BadCID) as error:
            raise BadCAR(f"{source}: {error}") from error
        yield cid, at + after + end, min(length - end, BLOCK_LIMIT + 1)
        at += after + max(length, 1)


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
