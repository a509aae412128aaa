"""The tree under a root, read from a block store: what is missing of it, and its files on disk."""

import os
import shutil
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from r3mes_vllm.errors import BadDAG, ContentTooLarge
from r3mes_vllm.ipfs.blockstore import BlockStore
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.ipfs.unixfs import Kind, Link, Node, read

_LONGEST_NAME = 255
_MOST_SHARDS = 500  # also bounds the recursion


@dataclass(frozen=True)
class Limits:
    """What a fetch may take; none of it is the sender's word."""

    bytes: int = 4 << 30
    files: int = 1000
    depth: int = 16
    """Of directories."""
    blocks: int = 200_000
    total_s: float = 1800.0


@dataclass(frozen=True)
class Survey:
    """What the blocks that are here say of the tree."""

    missing: tuple[CID, ...]
    declared: int
    """Bytes of all files whose first block is here."""


def survey(root: CID, blocks: BlockStore, limits: Limits) -> Survey:
    """Walk as far as the blocks reach. Raises BadDAG, or ContentTooLarge before bytes are spent.

    A block that stands in the tree many times is asked for once.
    """
    missing: dict[CID, None] = {}
    declared = files = 0
    for where, link, node in _walk(root, blocks, limits):
        if node is None:
            missing[link.cid] = None
        elif where is not None:
            files += 1
            declared += node.size
            if files > limits.files:
                raise ContentTooLarge(f"{root} holds more than {limits.files} files and folders")
            if declared > limits.bytes:
                raise ContentTooLarge(f"{root} holds more than {limits.bytes} bytes")
    return Survey(tuple(missing), declared)


def write(root: CID, into: Path, blocks: BlockStore, limits: Limits) -> None:
    """Write the complete tree to `into`, a new directory, or a new file if the root is one.

    It appears whole or not at all. Raises BadDAG and ContentTooLarge.
    """
    aside = into.with_name(f".{into.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.unlink(missing_ok=True)
    try:
        for path, link, node in _walk(root, blocks, limits):
            if path is None or node is None:
                continue  # a part of a file: its file reads it
            target = aside.joinpath(*path)
            if node.kind is Kind.FILE:
                _write_file(target, link.cid, node, blocks)
            else:
                target.mkdir()
        os.rename(aside, into)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


_Step = tuple[tuple[str, ...] | None, Link, Node | None]


def _walk(root: CID, blocks: BlockStore, limits: Limits) -> Iterator[_Step]:
    """Every entry with its path, depth first; the parts of files with None instead of a path.

    A node is None when its block is not here. Parts are visited once each.
    """
    seen: set[CID] = set()
    stack: list[tuple[tuple[str, ...] | None, Link]] = [((), Link(root, "", 0))]
    budget = limits.blocks
    while stack:
        path, link = stack.pop()
        if path is None and (link.cid in seen or link.cid.inline is not None):
            continue
        seen.add(link.cid)
        budget -= 1
        if budget < 0:
            raise ContentTooLarge(f"{root} has more than {limits.blocks} blocks")
        if path is None and link.cid.codec == RAW:
            if not blocks.has(link.cid):
                yield path, link, None
            continue
        block = blocks.get(link.cid)
        if block is None:
            yield path, link, None
            continue
        node = read(link.cid, block)
        yield path, link, node
        if node.kind is Kind.FILE:
            stack += [(None, part) for part in reversed(node.links)]
        elif path is None:
            raise BadDAG(f"{link.cid}: a directory as a part of a file")
        else:
            entries = []
            for entry in _entries(link.cid, node, blocks, set()):
                entries.append(entry)
                if len(entries) > limits.files:
                    raise ContentTooLarge(f"{link.cid} has more than {limits.files} entries")
            if len(path) >= limits.depth:
                raise ContentTooLarge(f"{root} is more than {limits.depth} directories deep")
            _check_names(link.cid, [entry.name for entry in entries if entry.name])
            stack += [
                ((*path, entry.name) if entry.name else None, entry) for entry in reversed(entries)
            ]


def _entries(cid: CID, node: Node, blocks: BlockStore, shards: set[CID]) -> Iterator[Link]:
    """The entries of a directory; a shard of it whose block is not here comes without a name.

    `shards` are those met so far: a hostile tree could lead through one of them for ever.
    """
    if node.kind is Kind.DIRECTORY:
        for link in node.links:
            if not link.name:
                raise BadDAG(f"{cid}: an entry without a name")
        yield from node.links
        return
    if cid in shards or len(shards) > _MOST_SHARDS:
        raise BadDAG(f"{cid}: a shard of a directory stands twice, or there are too many")
    shards.add(cid)
    for link in node.links:
        name = link.name[node.prefix :]
        if name:
            yield Link(link.cid, name, link.size)
            continue
        block = blocks.get(link.cid)
        if block is None:
            yield Link(link.cid, "", link.size)
            continue
        shard = read(link.cid, block)
        if shard.kind is not Kind.SHARD:
            raise BadDAG(f"{link.cid}: it should be a shard of a directory")
        yield from _entries(link.cid, shard, blocks, shards)


def _check_names(cid: CID, names: list[str]) -> None:
    folded: set[str] = set()
    for name in names:
        if name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise BadDAG(f"{cid}: the name {name!r} leads elsewhere")
        if len(name.encode()) > _LONGEST_NAME:
            raise BadDAG(f"{cid}: a name of {len(name.encode())} bytes")
        # Two names for one file on some disks.
        form = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        if form in folded:
            raise BadDAG(f"{cid}: the name {name!r} stands twice")
        folded.add(form)


def _write_file(path: Path, cid: CID, node: Node, blocks: BlockStore) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o644), "wb") as file:
        for part in _contents(cid, node, blocks):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _contents(cid: CID, node: Node, blocks: BlockStore) -> Iterator[bytes]:
    """The bytes of a file, each part as long as its parent says: so never more than declared."""
    stack: list[Iterator[tuple[Link, int]]] = []
    if node.data:
        yield node.data
    stack.append(zip(node.links, node.blocksizes, strict=True))
    while stack:
        step = next(stack[-1], None)
        if step is None:
            stack.pop()
            continue
        link, size = step
        block = blocks.get(link.cid)
        if block is None:
            raise BadDAG(f"{link.cid} is missing from {cid}")
        part = read(link.cid, block)
        if part.kind is not Kind.FILE or part.size != size:
            raise BadDAG(f"{link.cid}: {part.size} bytes stand where {size} were declared")
        if part.data:
            yield part.data
        stack.append(zip(part.links, part.blocksizes, strict=True))
