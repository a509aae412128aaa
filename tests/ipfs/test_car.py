"""The CAR reader against `ipfsspec` as oracle, and against broken streams."""

import contextlib
import io
from pathlib import Path

import ipfsspec.car
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3mes_vllm.errors import BadCAR, BlockMismatch
from r3mes_vllm.ipfs import car, varint
from r3mes_vllm.ipfs.car import CarReader
from r3mes_vllm.ipfs.cid import CID, RAW

BLOCKS = [(CID.of(RAW, data), data) for data in (b"", b"one", b"two" * 1000, b"\x00" * 70000)]
ROOT = BLOCKS[1][0]


def written(blocks: list[car.Block] = BLOCKS) -> bytes:
    file = io.BytesIO()
    car.write(file, ROOT, blocks)
    return file.getvalue()


CAR = written()
HEADER = len(written([]))


class InParts(io.RawIOBase):
    """A stream that gives so many bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self._file = io.BytesIO(data)
        self._step = step

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        return self._file.readinto(buffer[: self._step])


def read(data: bytes, step: int = 1 << 16, room: int = car.BLOCK_LIMIT) -> list[car.Block]:
    reader = CarReader(InParts(data, step), "sender")
    found: list[car.Block] = []
    while blocks := reader.fill(memoryview(bytearray(room)), patience_s=60):
        found += [(cid, bytes(block)) for cid, block in blocks]
    for cid, block in found:
        cid.check(block, "sender")
    assert reader.roots == (ROOT,)
    return found


def test_another_reader_reads_what_is_written() -> None:
    roots, blocks = ipfsspec.car.read_car(io.BytesIO(CAR))
    assert [bytes(root) for root in roots] == [bytes(ROOT)]
    assert [(bytes(cid), data) for cid, data, _ in blocks] == [(bytes(c), d) for c, d in BLOCKS]


@pytest.mark.parametrize("step", [1, 2, 7, 1000, 1 << 20])
def test_the_stream_may_be_cut_anywhere_into_parts(step: int) -> None:
    assert read(CAR, step) == BLOCKS


@pytest.mark.parametrize("room", [70000, 70001, 76003, 76004])
def test_a_block_that_does_not_fit_any_more_comes_with_the_next(room: int) -> None:
    assert read(CAR, room=room) == BLOCKS


def test_without_patience_each_block_is_given_at_once() -> None:
    reader = CarReader(io.BytesIO(CAR), "sender")
    buffer = memoryview(bytearray(car.BLOCK_LIMIT))
    for block in BLOCKS:
        assert reader.fill(buffer, patience_s=0) == [block]
    assert reader.fill(buffer, patience_s=0) == []


def test_the_blocks_before_an_error_are_given_before_it_is_raised() -> None:
    reader = CarReader(io.BytesIO(CAR[:-1]), "sender")
    buffer = memoryview(bytearray(car.BLOCK_LIMIT))
    assert reader.fill(buffer, patience_s=60) == BLOCKS[:-1]
    for _ in range(2):
        with pytest.raises(BadCAR, match="cut short"):
            reader.fill(buffer, patience_s=60)


@settings(deadline=None)
@given(st.integers(0, 200))
def test_a_stream_that_ends_early_is_an_error(kept: int) -> None:
    whole = written(BLOCKS[:2])
    ends = {HEADER, len(written(BLOCKS[:1])), len(whole)}
    kept = min(kept, len(whole))
    if kept in ends:
        read(whole[:kept])  # cleanly cut between blocks: only the walk from the root can tell
    else:
        with pytest.raises(BadCAR, match="sender"):
            read(whole[:kept])


@given(st.integers(0, len(written(BLOCKS[:3])) * 8 - 1))
def test_a_flipped_bit_is_never_taken_for_the_block(bit: int) -> None:
    data = bytearray(written(BLOCKS[:3]))
    data[bit // 8] ^= 1 << bit % 8
    try:
        found = read(bytes(data))
    except (BadCAR, BlockMismatch, AssertionError):
        return
    assert all(cid.matches(block) for cid, block in found)


def test_with_the_check_off_a_flipped_bit_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CID, "matches", lambda self, data: True)
    assert read(CAR[:-1] + b"\x01")[-1][1] != BLOCKS[-1][1]


@pytest.mark.parametrize(
    "section",
    [
        b"\x00",  # of no length
        varint.encode((2 << 20) + 1000),
        b"\xff" * 9,
        varint.encode(3) + b"\x01\x55\x12",  # a CID cut short
        varint.encode(38) + b"\x01\x71\x12\x7f" + b"a" * 34,  # of dag-cbor, cut short
        varint.encode(38) + b"\x02\x71\x12\x20" + b"a" * 34,  # of no known version
    ],
)
def test_a_section_that_breaks_the_rules_is_refused(section: bytes) -> None:
    with pytest.raises(BadCAR, match="sender"):
        read(CAR[:HEADER] + section)


FOREIGN = [
    b"\x01\x71\x12\x20" + b"a" * 32,  # dag-cbor
    b"\x01\x55\x16\x20" + b"a" * 32,  # sha3-256
    b"\x01\x55\x12\x14" + b"a" * 20,  # sha2-256, cut
]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("size", [0, 3, 200_000])
def test_a_block_of_another_kind_is_skipped(tmp_path: Path, name: bytes, size: int) -> None:
    section = varint.encode(len(name) + size) + name + b"x" * size
    data = CAR[:HEADER] + section + CAR[HEADER:] + section
    assert read(data) == BLOCKS
    (tmp_path / "x.car").write_bytes(data)
    assert list(car.read_file(tmp_path / "x.car")) == BLOCKS
    file = car.CarFile(tmp_path / "x.car")
    assert [file.block(cid) for cid, _ in BLOCKS] == [data for _, data in BLOCKS]
    with pytest.raises(BadCAR, match="cut short"):
        read(data[:-1])


def test_a_sender_of_nothing_but_blocks_of_another_kind_is_not_read_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(car, "_FOREIGN_LIMIT", 1000)
    section = varint.encode(136) + FOREIGN[0] + b"x" * 100
    read(CAR + section * 7)
    with pytest.raises(BadCAR, match="1000 bytes of other kinds"):
        read(CAR + section * 8)


@pytest.mark.parametrize(
    ("roots", "expected"),
    [
        (b"\xf6", ()),
        (b"\x80", ()),
        (b"\x81\xd8\x2a\x58\x25\x00" + FOREIGN[0], (None,)),
        (
            b"\x82\xd8\x2a\x58\x25\x00" + FOREIGN[0] + b"\xd8\x2a\x58\x25\x00" + bytes(ROOT),
            (None, ROOT),
        ),
    ],
)
def test_what_the_header_says_of_roots_is_not_needed_where_the_root_is_known(
    tmp_path: Path, roots: bytes, expected: tuple[CID | None, ...]
) -> None:
    header = b"\xa2eroots" + roots + b"gversion\x01"
    path = tmp_path / "x.car"
    path.write_bytes(varint.encode(len(header)) + header + CAR[HEADER:])
    assert list(car.read_file(path)) == BLOCKS
    with path.open("rb") as file:
        assert CarReader(file, "sender").roots == expected
    with pytest.raises(BadCAR, match="one root"):
        car.root_of(path)


def version_2(inner: bytes, *, padding: int = 0, size: int | None = None) -> bytes:
    """As go-car writes it, with an index after the blocks."""
    size = len(inner) if size is None else size
    numbers = (51 + padding, size, 51 + padding + size)
    pragma = bytes.fromhex("0aa16776657273696f6e02") + bytes(16)
    head = pragma + b"".join(it.to_bytes(8, "little") for it in numbers)
    return head + bytes(padding) + inner + b"\x80\x08 an index"


@pytest.mark.parametrize("padding", [0, 1, 70_000])
def test_the_blocks_within_a_car_of_version_2(tmp_path: Path, padding: int) -> None:
    data = version_2(CAR, padding=padding)
    assert read(data) == BLOCKS
    assert read(data, step=7, room=76003) == BLOCKS
    path = tmp_path / "x.car"
    path.write_bytes(data)
    assert car.root_of(path) == ROOT
    assert list(car.read_file(path)) == BLOCKS
    file = car.CarFile(path)
    assert [file.block(cid) for cid, _ in BLOCKS] == [data for _, data in BLOCKS]


@pytest.mark.parametrize(
    "data",
    [
        version_2(CAR)[:40],
        version_2(CAR, size=0),  # it was never finished
        version_2(CAR, size=len(CAR) - 1),
        version_2(CAR)[:-20],
        version_2(CAR, size=1 << 63)[: 51 + len(CAR)],
        version_2(version_2(CAR)),
        version_2(CAR, padding=(1 << 20) + 1),
        version_2(CAR)[:27] + bytes(8) + version_2(CAR)[35:],
    ],
    ids=range(8),
)
def test_a_car_of_version_2_that_breaks_the_rules_is_refused(data: bytes) -> None:
    with pytest.raises(BadCAR, match="sender"):
        read(data)


def test_bytes_that_are_another_blocks_are_refused() -> None:
    swapped = [(BLOCKS[1][0], BLOCKS[2][1])]
    with pytest.raises(BlockMismatch, match=f"sender.*{BLOCKS[1][0]}"):
        read(written(swapped))


@pytest.mark.parametrize(
    "header",
    [
        b"\xa0",
        b"\xa1gversion\x01",
        b"\xa2eroots\x80gversion\x02",
        b"\xa2eroots\x81\x01gversion\x01",
        b"\xa1" * 60,
        b"\x81" * 60,
        b"\x9b" + b"\xff" * 8,
        b"\x5f",
        b"<!DOCTYPE html>",
    ],
)
def test_a_header_that_is_no_cars_is_refused(header: bytes) -> None:
    with pytest.raises(BadCAR):
        read(varint.encode(len(header)) + header)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_car_or_refused(data: bytes) -> None:
    with contextlib.suppress(BadCAR, BlockMismatch):
        read(data)


def test_a_file_that_ends_within_a_block_holds_those_before_it(tmp_path: Path) -> None:
    path = tmp_path / "x.car"
    path.write_bytes(CAR[:-1])
    file = car.CarFile(path)
    assert [file.block(cid) for cid, _ in BLOCKS] == [*(data for _, data in BLOCKS[:-1]), None]


@pytest.mark.parametrize(
    "section",
    [
        varint.encode((1 << 63) - 1) + bytes(ROOT),
        b"\x01" + bytes(ROOT),  # its CID is longer than it
        varint.encode(len(bytes(ROOT)) - 1) + bytes(ROOT) + b"\x00" * 1000,
        b"\x00",
    ],
)
def test_a_file_with_a_section_that_breaks_the_rules_holds_the_blocks_before_it(
    tmp_path: Path, section: bytes
) -> None:
    path = tmp_path / "x.car"
    path.write_bytes(CAR + section + CAR[HEADER:])
    file = car.CarFile(path)
    assert [file.block(cid) for cid, _ in BLOCKS] == [data for _, data in BLOCKS]
    path.write_bytes(CAR[:HEADER] + section)
    with pytest.raises(BadCAR):
        car.CarFile(path)


def test_the_root_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.car"
    path.write_bytes(CAR)
    assert car.root_of(path) == ROOT
    assert list(car.read_file(path)) == BLOCKS
    for broken in (b"", b"not a car", CAR[:10]):
        path.write_bytes(broken)
        with pytest.raises(BadCAR):
            car.root_of(path)
