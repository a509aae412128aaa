"""A directory as a deterministic CAR, with the CID that Kubo gives it.

`ipfs add -r --cid-version=1 --raw-leaves --chunker=size-262144`: sha2-256, leaves of 256 KiB,
balanced trees of 174 links a node; names that begin with a dot are left out.

A link is followed that leads to a file of the directory itself, or of the cache of a model hub in
which the directory lies (`snapshots/…` into `blobs`): all others would publish what lies elsewhere.
"""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from r3mes_vllm.errors import AdapterError, ConfigError
from r3mes_vllm.ipfs import car
from r3mes_vllm.ipfs.cid import CID, DAG_PB, RAW
from r3mes_vllm.ipfs.disk import FULL, no_room
from r3mes_vllm.ipfs.unixfs import Link, encode_directory, encode_file

CHUNK = 262144
_WIDTH = 174


@dataclass
class _Tree:
    """A block to be written: a dag-pb block, or `length` bytes at `offset` of `path`."""

    cid: CID
    size: int
    """Bytes of the content under it."""
    total: int
    """Bytes of the blocks under it, with its own."""
    block: bytes | None = None
    path: Path = Path()
    offset: int = 0
    children: list["_Tree"] = field(default_factory=list)


def pack(source: Path, destination: Path, *, linked: Collection[str] = ()) -> CID:
    """Write the CAR of the directory or file `source` to `destination`; its root CID.

    Links of a name in `linked` are followed to any file. The CAR appears whole or not at all.
    Raises AdapterError for other links, devices and files that change meanwhile, ConfigError when
    `destination` is a directory, StorageFull.
    """
    if destination.is_dir():
        raise ConfigError(
            f"{destination} is a directory", hint="name the file to write: my-adapter.car"
        )
    aside = destination.with_name(f".{destination.name}.{os.getpid()}")
    try:
        top = Path(os.path.realpath(source))
        tree = _Reader(top, linked).read(top)
        with aside.open("wb") as file:
            car.write(file, tree.cid, _blocks(tree, set()))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(destination)
    except OSError as error:
        if error.errno in FULL:
            aside.unlink(missing_ok=True)
            hint = "free some disk there, or choose another: -o FILE, --cache-dir DIRECTORY"
            raise no_room(destination.parent, tree.total, hint=hint) from error
        raise AdapterError(f"can't pack {source}: {error}") from error
    finally:
        aside.unlink(missing_ok=True)
    return tree.cid


class _Reader:
    """Reads what is to be packed, and decides which links are followed."""

    def __init__(self, top: Path, linked: Collection[str]) -> None:
        self._top = top
        self._linked = linked
        self._homes = [top]
        for parent in top.parents:
            if parent.name == "snapshots":
                self._homes.append(Path(os.path.realpath(parent.parent / "blobs")))

    def read(self, path: Path) -> _Tree:
        if path.is_symlink():
            path = self._followed(path)
        if path.is_file():
            return _read_file(path)
        if not path.is_dir():
            raise AdapterError(f"{path} is neither a file nor a directory")
        entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
        for entry in entries:
            if any(0xD800 <= ord(char) <= 0xDFFF for char in entry.name):
                raise AdapterError(
                    f"the name {entry.name!r} in {path} is not UTF-8", hint="rename it"
                )
        children = {entry.name: self.read(entry) for entry in entries}
        links = [Link(child.cid, name, child.total) for name, child in children.items()]
        block = encode_directory(links)
        # Children in the order of the links, so that a reader meets them depth first.
        ordered = [children[name] for name in sorted(children, key=str.encode)]
        return _node(block, ordered)

    def _followed(self, link: Path) -> Path:
        target = Path(os.path.realpath(link))
        if not target.is_file():
            raise AdapterError(
                f"{link} is a symbolic link that leads to no file",
                hint="put in its place what it stands for, or remove it",
            )
        if link.name not in self._linked and not any(map(target.is_relative_to, self._homes)):
            raise AdapterError(
                f"{link} is a symbolic link to {target}, outside of {self._top}",
                hint="put the file itself in its place, or remove it",
            )
        return target


def _read_file(path: Path) -> _Tree:
    leaves: list[_Tree] = []
    with path.open("rb") as file:
        while (data := file.read(CHUNK)) or not leaves:
            cid, length = CID.of(RAW, data), len(data)
            offset = len(leaves) * CHUNK
            leaves.append(_Tree(cid, length, length, path=path, offset=offset))
    level = leaves
    while len(level) > 1:
        level = [_join(level[at : at + _WIDTH]) for at in range(0, len(level), _WIDTH)]
    return level[0]


def _join(parts: list[_Tree]) -> _Tree:
    links = [Link(part.cid, "", part.total) for part in parts]
    return _node(encode_file(links, [part.size for part in parts]), parts)


def _node(block: bytes, children: list[_Tree]) -> _Tree:
    return _Tree(
        CID.of(DAG_PB, block),
        sum(child.size for child in children),
        len(block) + sum(child.total for child in children),
        block=block,
        children=children,
    )


def _blocks(tree: _Tree, written: set[CID]) -> Iterator[car.Block]:
    if tree.cid in written:
        return
    written.add(tree.cid)
    if tree.block is not None:
        yield tree.cid, tree.block
        for child in tree.children:
            yield from _blocks(child, written)
        return
    with tree.path.open("rb") as file:
        file.seek(tree.offset)
        data = file.read(tree.size)
    if not tree.cid.matches(data):
        raise AdapterError(f"{tree.path} changed while it was packed", hint="pack it again")
    yield tree.cid, data
