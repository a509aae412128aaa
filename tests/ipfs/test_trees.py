"""Trees as they may be, and trees whose every block is verified and that are still hostile."""

import os
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from r3mes_vllm.errors import BadDAG, ContentTooLarge, IpfsError
from r3mes_vllm.ipfs import car, unixfs, varint
from r3mes_vllm.ipfs.cid import CID, DAG_PB, RAW
from r3mes_vllm.ipfs.fetch import fetch
from r3mes_vllm.ipfs.pack import CHUNK, pack
from r3mes_vllm.ipfs.sources import CarSource
from r3mes_vllm.ipfs.tree import Limits
from r3mes_vllm.ipfs.unixfs import Link

Blocks = list[car.Block]


async def fetched(folder: Path, blocks: Blocks, limits: Limits | None = None) -> Path:
    """The tree of which the first block is the root."""
    path = folder / "blocks.car"
    with path.open("wb") as file:
        car.write(file, blocks[0][0], blocks)
    return await fetch(blocks[0][0], folder / "fetch", sources=[CarSource(path)], limits=limits)


def node(links: list[Link], data: bytes) -> car.Block:
    block = unixfs._encode_node(links, data)
    return CID.of(DAG_PB, block), block


def raw(data: bytes) -> car.Block:
    return CID.of(RAW, data), data


def directory(*entries: tuple[str, CID]) -> car.Block:
    return node([Link(cid, name, 0) for name, cid in entries], b"\x08\x01")


LEAF = raw(b"leaf")
FILE_OF_4 = b"\x08\x02\x18\x04\x20\x04"


def bombs() -> Iterable[tuple[str, type[IpfsError], Blocks]]:
    for name in ("..", ".", "a/b", "a\\b", "a\0b", "", "x" * 256):
        yield f"name {name[:5]!r}", BadDAG, [directory((name, LEAF[0])), LEAF]
    for twins in (("a", "a"), ("a", "A"), ("\u00e9", "e\u0301"), ("\u212b", "\u00e5")):
        yield f"twins {twins}", BadDAG, [directory(*((name, LEAF[0]) for name in twins)), LEAF]
    yield "symlink", BadDAG, [node([], b"\x08\x04\x12\x0b/etc/passwd")]
    yield "no unixfs", BadDAG, [node([], b"")]
    yield "metadata", BadDAG, [node([], b"\x08\x03")]
    yield "more sizes than links", BadDAG, [node([], FILE_OF_4)]
    yield "named part", BadDAG, [node([Link(LEAF[0], "x", 4)], FILE_OF_4), LEAF]
    yield (
        "wrong filesize",
        BadDAG,
        [node([Link(LEAF[0], "", 4)], b"\x08\x02\x18\x05\x20\x04"), LEAF],
    )
    yield (
        "wrong blocksize",
        BadDAG,
        [node([Link(LEAF[0], "", 4)], b"\x08\x02\x18\x05\x20\x05"), LEAF],
    )
    yield (
        "a directory in a file",
        BadDAG,
        [
            node([Link(directory()[0], "", 4)], FILE_OF_4),
            directory(),
        ],
    )
    yield "bad fanout", BadDAG, [node([], b"\x08\x05\x30\x07")]
    shards = [node([], b"\x08\x05\x30\x80\x02")]
    for _ in range(20):
        shards.append(
            node([Link(shards[-1][0], f"{i:02X}", 0) for i in range(3)], b"\x08\x05\x30\x80\x02")
        )
    yield "shards of shards", BadDAG, shards[::-1]
    huge = varint.encode(1 << 40)
    yield (
        "a terabyte",
        ContentTooLarge,
        [
            node([Link(LEAF[0], "", 4)], b"\x08\x02\x18" + huge + b"\x20" + huge),
            LEAF,
        ],
    )
    deep = [directory()]
    for _ in range(40):
        deep.append(directory(("d", deep[-1][0])))
    yield "too deep", ContentTooLarge, deep[::-1]
    wide = [LEAF]
    for _ in range(20):
        wide.append(directory(*((str(i), wide[-1][0]) for i in range(10))))
    yield "a tree of trees", ContentTooLarge, wide[::-1]
    doubled = [raw(b"x" * 1024)]
    size = 1024
    for _ in range(40):
        part = varint.encode(size)
        size *= 2
        data = b"\x08\x02\x18" + varint.encode(size) + b"\x20" + part + b"\x20" + part
        doubled.append(node([Link(doubled[-1][0], "", 0)] * 2, data))
    yield "one leaf a billion times", ContentTooLarge, doubled[::-1]


@pytest.mark.parametrize(
    ("error", "blocks"), [it[1:] for it in bombs()], ids=[it[0] for it in bombs()]
)
async def test_a_hostile_tree_is_refused(
    tmp_path: Path, error: type[IpfsError], blocks: Blocks
) -> None:
    path = tmp_path / "hostile.car"
    with path.open("wb") as file:
        car.write(file, blocks[0][0], blocks)
    with pytest.raises(error):
        await fetch(
            blocks[0][0],
            tmp_path / "fetch",
            sources=[CarSource(path)],
            limits=Limits(bytes=64 << 20, files=200, total_s=20),
        )
    assert not (tmp_path / "into").exists()


@pytest.mark.parametrize(
    ("twins", "said"),
    [
        (("a", "a"), "'a' stands twice"),
        (("README.md", "readme.md"), r"'readme\.md' differs only by case .* from 'README\.md'"),
    ],
)
async def test_which_two_names_clash_is_said(
    tmp_path: Path, twins: tuple[str, str], said: str
) -> None:
    with pytest.raises(BadDAG, match=said):
        await fetched(tmp_path, [directory(*((name, LEAF[0]) for name in twins)), LEAF])


async def test_inline_data_shards_and_empty_files_are_read(tmp_path: Path) -> None:
    inline = CID(RAW, 0, b"inside the CID")
    empty, in_file = raw(b""), node([], b"\x08\x02\x12\x02hi\x18\x02")
    names = [Link(inline, "0Finline", 0), Link(empty[0], "A0empty", 0)]
    shard = node([*names, Link(in_file[0], "B1a..b", 0)], b"\x08\x05\x30\x80\x02")
    inner = node([Link(shard[0], "1C", 0)], b"\x08\x05\x30\x80\x02")
    into = await fetched(tmp_path, [inner, shard, empty, in_file])
    found = {path.name: path.read_bytes() for path in into.iterdir()}
    assert found == {"inline": b"inside the CID", "empty": b"", "a..b": b"hi"}


async def test_a_lone_file_is_written_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x" * (CHUNK + 1))
    root = pack(tmp_path / "one", tmp_path / "one.car")
    into = await fetch(root, tmp_path / "fetch", sources=[CarSource(tmp_path / "one.car")])
    assert into.read_bytes() == b"x" * (CHUNK + 1)


def of_leaves(leaves: list[bytes], kind: bytes) -> Blocks:
    """A file whose leaves are dag-pb, as CIDs of version 0 have them, with data of its own."""
    own = b"first "
    made = [
        node([], kind + b"\x12" + unixfs._prefixed(leaf) + b"\x18" + varint.encode(len(leaf)))
        for leaf in leaves
    ]
    sizes = b"".join(b"\x20" + varint.encode(len(leaf)) for leaf in leaves)
    total = len(own) + sum(map(len, leaves))
    data = b"\x08\x02\x12" + unixfs._prefixed(own) + b"\x18" + varint.encode(total) + sizes
    return [node([Link(cid, "", 0) for cid, _ in made], data), *made]


@pytest.mark.parametrize("kind", [b"\x08\x02", b"\x08\x00"], ids=["file", "raw"])
async def test_leaves_that_are_not_raw_are_resumed_too(tmp_path: Path, kind: bytes) -> None:
    leaves = [os.urandom(1000) for _ in range(4)]
    blocks = of_leaves(leaves, kind)
    with pytest.raises(IpfsError):
        await fetched(tmp_path, blocks[:4])
    into = await fetched(tmp_path, [blocks[0], blocks[4]])
    assert into.read_bytes() == b"first " + b"".join(leaves)


async def test_the_same_block_in_many_places_is_needed_once(tmp_path: Path) -> None:
    leaf = raw(b"\0" * 5000)
    sizes = b"\x20" + varint.encode(5000)
    data = b"\x08\x02\x18" + varint.encode(20000) + sizes * 4
    file = node([Link(leaf[0], "", 0)] * 4, data)
    inner = directory(("again", file[0]), ("leaf", leaf[0]))
    root = directory(("a", file[0]), ("b", inner[0]), ("c", inner[0]))
    into = await fetched(tmp_path, [root, file, leaf, inner])
    found = {str(path.relative_to(into)): path.stat().st_size for path in into.rglob("*.*")}
    found = {
        str(path.relative_to(into)): path.stat().st_size
        for path in into.rglob("*")
        if path.is_file()
    }
    assert found == {"a": 20000, "b/again": 20000, "b/leaf": 5000, "c/again": 20000, "c/leaf": 5000}


@pytest.mark.parametrize("seed", range(5))
async def test_blocks_may_come_in_any_order(tmp_path: Path, seed: int) -> None:
    source = tmp_path / "source"
    (source / "a" / "b").mkdir(parents=True)
    chance = random.Random(seed)
    for number in range(20):
        folder = chance.choice([source, source / "a", source / "a" / "b"])
        size = chance.choice([0, 1, 100, CHUNK, CHUNK * 3 + 5])
        (folder / str(number)).write_bytes(chance.randbytes(size))
    pack(source, tmp_path / "source.car")
    blocks = list(car.read_file(tmp_path / "source.car"))
    rest = blocks[1:]
    chance.shuffle(rest)
    (tmp_path / "x").mkdir()
    shuffled = [*rest, blocks[0]] if seed % 2 else [blocks[0], *rest]
    path = tmp_path / "x.car"
    with path.open("wb") as file:
        car.write(file, blocks[0][0], shuffled)
    into = await fetch(blocks[0][0], tmp_path / "fetch", sources=[CarSource(path)])
    for one in source.rglob("*"):
        there = into / one.relative_to(source)
        assert there.is_dir() if one.is_dir() else there.read_bytes() == one.read_bytes()


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        (Limits(bytes=1000), "1000 bytes"),
        (Limits(files=2), "2 files"),
        (Limits(depth=1), "1 directories deep"),
        (Limits(name_length=3), "name"),
        (Limits(blocks=3), "3 blocks"),
    ],
)
async def test_each_limit_can_be_set(tmp_path: Path, limits: Limits, error: str) -> None:
    leaf = raw(b"x" * 600)
    inner = directory(("long name", leaf[0]), ("two", raw(b"y" * 600)[0]))
    root = directory(("d", inner[0]))
    blocks = [root, inner, leaf, raw(b"y" * 600)]
    assert await fetched(tmp_path, blocks)
    (tmp_path / "again").mkdir()
    with pytest.raises(IpfsError, match=error):
        await fetched(tmp_path / "again", blocks, limits)
