"""Pieces of files: joined, in any order, with room made ahead of them but not too far."""

import errno
import os
import random
from pathlib import Path

import pytest

from r3mes_vllm.ipfs import writer as writing
from r3mes_vllm.ipfs.writer import Writer

MIB = 1 << 20


@pytest.mark.parametrize("seed", range(5))
def test_pieces_in_any_order_make_the_files(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    whole = {tmp_path / name: os.urandom(chance.randrange(1, 3 * MIB)) for name in "abc"}
    pieces = []
    for path, data in whole.items():
        at = 0
        while at < len(data):
            length = chance.randrange(1, MIB)
            pieces.append((path, at, data[at : at + length]))
            at += length
    if seed:
        chance.shuffle(pieces)
    writer = Writer()
    for path, at, piece in pieces:
        lent = bytearray(piece)
        writer.write(path, at, lent, size=len(whole[path]))
        if chance.random() < 0.3:
            writer.flush()
            lent[:] = bytes(len(lent))
    writer.flush()
    writer.close()
    assert {path: path.read_bytes() for path in whole} == whole


def test_no_more_is_allocated_than_a_little_ahead_of_what_came(tmp_path: Path) -> None:
    """However large the sender says that the file is, and wherever its pieces are."""
    writer, path, size = Writer(), tmp_path / "x", 4 << 30
    for turn in range(50):
        writer.write(path, turn * 80 * MIB, b"x" * 4096, size=size)
        writer.flush()
        assert path.stat().st_blocks * 512 <= writing._AHEAD + (turn + 2) * 4096 * 4
    writer.close()


def test_all_of_a_file_that_comes_in_order_is_allocated_ahead(tmp_path: Path) -> None:
    writer, path, size = Writer(), tmp_path / "x", 200 * MIB
    for at in range(0, size, MIB):
        writer.write(path, at, bytes(MIB), size=size)
        writer.flush()
        allocated = path.stat().st_blocks * 512
        assert min(at + MIB, size) <= allocated <= min(at + MIB + writing._AHEAD, size) + MIB
    writer.close()
    assert path.stat().st_size == size


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSPC])
def test_where_nothing_can_be_allocated_it_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def cannot(fd: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    writer = Writer()
    for at in range(3):
        writer.write(tmp_path / "x", at * 5, b"12345", size=15)
    writer.flush()
    writer.close()
    assert (tmp_path / "x").read_bytes() == b"12345" * 3


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        Writer().write(tmp_path / "x", 0, b"x", size=1)
