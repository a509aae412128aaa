"""The files and directories under a root, built in place from verified blocks in any order.

A leaf is written where it belongs in its file as soon as it comes; only the nodes that link to
others are kept beside. So the files are their own record: after a crash, what lies on disk is
hashed again, and what is not right is asked for again.
"""

import os
import shutil
import stat
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from r3mes_vllm.errors import BadDAG, ContentTooLarge, DiskFull, IpfsError
from r3mes_vllm.ipfs import names
from r3mes_vllm.ipfs.blockstore import Aside, BlockStore
from r3mes_vllm.ipfs.car import BLOCK_LIMIT, LentBlock
from r3mes_vllm.ipfs.cid import CID, RAW, Data
from r3mes_vllm.ipfs.disk import no_room
from r3mes_vllm.ipfs.unixfs import Kind, Node, encode_leaves, read
from r3mes_vllm.ipfs.writer import Writer

_MOST_SHARDS = 500


@dataclass(frozen=True)
class Limits:
    """What a fetch may take; none of it is the sender's word."""

    bytes: int = 4 << 30
    files: int = 1000
    """With directories."""
    depth: int = 16
    """Of directories."""
    name_length: int = 255
    """Bytes of UTF-8."""
    blocks: int = 200_000
    stall_s: float = 30.0
    """Without a byte for so long, or under 1 KiB a second, a source has failed."""
    total_s: float = 1800.0


@dataclass
class _Directory:
    path: Path
    depth: int
    names: dict[str, str] = field(default_factory=dict)
    """By their folded form."""
    shards: set[CID] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file or a directory is to stand at `path`."""

    path: Path
    depth: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """More entries of a directory."""

    of: _Directory


@dataclass(frozen=True, slots=True)
class _Part:
    """`size` bytes of the file at `path`, which has `of` in all, from `offset` on."""

    path: Path
    offset: int
    size: int
    of: int


_Place = _Entry | _Shard | _Part


class Tree:
    """Grows in `folder`, which keeps what is needed to go on after a crash. Used by one thread.

    Every method raises BadDAG and ContentTooLarge for content that is not worth having,
    DiskFull for a file that does not fit, and OSError when the disk fails.
    """

    def __init__(self, root: CID, folder: Path, limits: Limits) -> None:
        self.root = root
        self.wanted: dict[CID, list[_Place]] = {}
        """What is known to be missing, in the order of the files."""
        self.declared = 0
        """Bytes of the files whose first block is here."""
        self.placed = 0
        """Bytes of files that are here."""
        self.complete = False
        self._failure: IpfsError | DiskFull | OSError | None = None
        self._limits = limits
        self._files = folder / "files"
        self._nodes = BlockStore(folder / "nodes")
        self._spare = Aside(folder)
        """Blocks that came before the node that links to them."""
        self._resuming = os.path.lexists(self._files)
        self._leaves: dict[CID, tuple[Path, int, int]] = {}
        self._linking: set[CID] = set()
        self._places = self._entries = self._node_bytes = 0
        self._writer = Writer()
        self._todo: deque[tuple[CID, _Place]] = deque()
        folder.mkdir(parents=True, exist_ok=True)
        self._want(root, _Entry(self._files, 0))
        self._settle()
        self._writer.flush()
        self.complete = not self.wanted

    def offer(self, blocks: Iterable[LentBlock]) -> int:
        """Take verified blocks, whose data are not kept; how many were of use. What nothing links
        to yet is kept aside, within limits, and dropped at the end."""
        self._require_sound()
        used = 0
        try:
            for cid, data in blocks:
                if cid in self.wanted:
                    used += 1
                    self._came(cid, data)
                    self._settle()
                elif cid not in self._leaves and cid not in self._linking:
                    self._spare_block(cid, data)
            self._writer.flush()
        except (IpfsError, DiskFull, OSError) as error:
            self._failure = error  # what was half done is neither wanted nor here
            raise
        self.complete = not self.wanted
        return used

    def finish(self) -> Path:
        """The complete tree, a directory or a file; the kernel writes it to the disk later."""
        self._require_sound()
        return self._files

    def _require_sound(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _spare_block(self, cid: CID, data: Data) -> None:
        if cid in self._spare or cid.inline is not None:
            return
        fits = self._spare.bytes + len(data) <= self._limits.bytes
        if fits and len(self._spare) < self._limits.blocks:
            self._spare.keep(cid, data)

    def close(self) -> None:
        self._writer.close()
        self._spare.close()

    def _want(self, cid: CID, place: _Place) -> None:
        self._places += 1
        if self._places > self._limits.blocks:
            raise ContentTooLarge(f"{self.root} has more than {self._limits.blocks} blocks")
        self._todo.append((cid, place))

    def _settle(self) -> None:
        """Fill what can be filled from this machine; the rest is wanted."""
        while self._todo:
            cid, place = self._todo.popleft()
            if cid in self.wanted:
                self.wanted[cid].append(place)
                continue
            self.wanted[cid] = [place]
            if (data := self._on_disk(cid, place)) is not None:
                self._came(cid, data, lies_at=place)
            elif (data := self._here(cid)) is not None:
                self._came(cid, data)

    def _came(self, cid: CID, data: Data, *, lies_at: _Place | None = None) -> None:
        places = self.wanted.pop(cid)
        node = read(cid, data)
        if node.links or node.kind is not Kind.FILE:
            self._node_bytes += len(data)
            if self._node_bytes > (self._limits.bytes >> 4) + (1 << 20):
                raise ContentTooLarge(f"{self.root}: too many bytes of links and names")
            if cid not in self._linking and lies_at is None and cid.inline is None:
                self._nodes.keep(cid, data)
            self._linking.add(cid)
        for place in places:
            self._place(place, cid, node, written=place is lies_at)

    def _here(self, cid: CID) -> bytes | None:
        """The block, from the CID itself, from what came before, or from an earlier run."""
        if cid.inline is not None:
            return cid.inline
        if (leaf := self._leaves.get(cid)) is not None:
            return self._as_block(cid, self._segment(*leaf))
        if (spare := self._spare.take(cid)) is not None:
            return spare
        return None if cid.codec == RAW else self._nodes.get(cid)

    def _on_disk(self, cid: CID, place: _Place) -> bytes | None:
        """The block, if an earlier run wrote it to its place."""
        if not self._resuming or cid.inline is not None:
            return None
        if isinstance(place, _Part):
            if place.size > BLOCK_LIMIT:
                return None
            return self._as_block(cid, self._segment(place.path, place.offset, place.size))
        if isinstance(place, _Entry):
            with suppress(OSError):
                found = place.path.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_size <= BLOCK_LIMIT:
                    return self._as_block(cid, self._segment(place.path, 0, found.st_size))
        return None

    def _as_block(self, cid: CID, content: bytes | None) -> bytes | None:
        """The block that holds `content` and nothing else, if that is the one `cid` names."""
        if content is None:
            return None
        forms = [content] if cid.codec == RAW else encode_leaves(content)
        return next((block for block in forms if cid.matches(block)), None)

    def _segment(self, path: Path, offset: int, size: int) -> bytes | None:
        self._writer.flush()
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            data = os.pread(fd, size, offset)
        finally:
            os.close(fd)
        return data if len(data) == size else None

    def _place(self, place: _Place, cid: CID, node: Node, *, written: bool) -> None:
        match place:
            case _Entry():
                self._place_entry(place, cid, node, written=written)
            case _Shard(directory):
                if node.kind is not Kind.SHARD:
                    raise BadDAG(f"{cid}: it should be a shard of a directory")
                self._add_entries(directory, cid, node)
            case _Part(path, offset, size, of):
                if node.kind is not Kind.FILE:
                    raise BadDAG(f"{cid}: a directory as a part of a file")
                if node.size != size:
                    raise BadDAG(f"{cid}: {node.size} bytes stand where {size} were declared")
                self._fill(path, offset, of, cid, node, written=written)

    def _place_entry(self, place: _Entry, cid: CID, node: Node, *, written: bool) -> None:
        if node.kind is Kind.FILE:
            self.declared += node.size
            if self.declared > self._limits.bytes:
                raise ContentTooLarge(f"{self.root} holds more than {self._limits.bytes} bytes")
            if not written:
                _require_room(place.path, node.size)
                self._writer.write(place.path, 0, b"", size=node.size)
                os.truncate(place.path, min(place.path.stat().st_size, node.size))
            self._fill(place.path, 0, node.size, cid, node, written=written)
            return
        if place.depth >= self._limits.depth:
            raise ContentTooLarge(f"{self.root} is more than {self._limits.depth} directories deep")
        if not place.path.is_dir():
            place.path.mkdir()
        self._add_entries(_Directory(place.path, place.depth), cid, node)

    def _add_entries(self, directory: _Directory, cid: CID, node: Node) -> None:
        if node.kind is Kind.SHARD:
            # A hostile tree could lead through one shard for ever.
            if cid in directory.shards or len(directory.shards) > _MOST_SHARDS:
                raise BadDAG(f"{cid}: a shard of a directory stands twice, or there are too many")
            directory.shards.add(cid)
        for link in node.links:
            name = link.name[node.prefix :]
            if node.kind is Kind.SHARD and not name:
                self._want(link.cid, _Shard(directory))
                continue
            self._entries += 1
            if self._entries > self._limits.files:
                raise ContentTooLarge(
                    f"{self.root} holds more than {self._limits.files} files and folders"
                )
            try:
                names.check_name(name, longest=self._limits.name_length)
            except ValueError as error:
                raise BadDAG(f"{cid}: {error}") from error
            if (folded := names.folded(name)) in directory.names:
                raise BadDAG(f"{cid}: {names.clash(name, directory.names[folded])}")
            directory.names[folded] = name
            self._want(link.cid, _Entry(directory.path / name, directory.depth + 1))

    def _fill(
        self, path: Path, offset: int, of: int, cid: CID, node: Node, *, written: bool
    ) -> None:
        if node.data and not written:
            self._writer.write(path, offset, node.data, size=of)
        if not node.links and cid.inline is None:
            self._leaves.setdefault(cid, (path, offset, node.size))
        self.placed += len(node.data)
        offset += len(node.data)
        for link, size in zip(node.links, node.blocksizes, strict=True):
            self._want(link.cid, _Part(path, offset, size, of))
            offset += size


class Way(Tree):
    """Only what leads from the root along `names`; `end` is the CID that they lead to."""

    def __init__(self, root: CID, names: tuple[str, ...], folder: Path, limits: Limits) -> None:
        self.end: CID | None = None
        self._names = names
        super().__init__(root, folder, limits)

    def _place_entry(self, place: _Entry, cid: CID, node: Node, *, written: bool) -> None:
        if node.kind is Kind.FILE:
            raise BadDAG(f"{self.root}/{'/'.join(self._names[: place.depth])} is a file")
        self._add_entries(_Directory(place.path, place.depth), cid, node)

    def _add_entries(self, directory: _Directory, cid: CID, node: Node) -> None:
        for link in node.links:
            name = link.name[node.prefix :]
            if node.kind is Kind.SHARD and not name:
                self._want(link.cid, _Shard(directory))
            elif name == self._names[directory.depth] and self.end is None:
                depth = directory.depth + 1
                if depth == len(self._names):
                    self.end = link.cid
                else:
                    self._want(link.cid, _Entry(directory.path, depth))

    def found(self) -> CID:
        """`end`, now that all that leads there is here."""
        self._require_sound()
        if self.end is None:
            raise BadDAG(f"there is no {'/'.join(self._names)} in {self.root}")
        return self.end


def _require_room(file: Path, size: int) -> None:
    """Before any of it comes: a fetch that can't end would leave no room to all others."""
    needed = size - (file.lstat().st_blocks * 512 if file.exists() else 0)
    disk = shutil.disk_usage(file.parent)
    if needed > disk.free and disk.total:  # some file systems don't say
        raise no_room(file.parent, needed)
