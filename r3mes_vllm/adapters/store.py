"""Vetted adapters on disk, by CID. What is in the store is complete, verified and never changed.

    DIR/adapters/CID/    an adapter: its two files and `manifest.json`
    DIR/incoming/CID/    a fetch under way, with what came so far
    DIR/locks/CID        held shared by each lease; its time is that of the last use

Several processes may share one store: the kernel's file locks end with their process, however
that dies, and everything appears and goes by a rename.
"""

import asyncio
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from blake3 import blake3

from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS
from r3mes_vllm.errors import AdapterError, BadCID, StorageFull
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.disk import full_disk_is_said

MANIFEST = "manifest.json"
_FILES = (CONFIG, WEIGHTS)
_POLL_S = 0.05
_RUBBISH_S = 86_400.0
"""Of a process that died; younger ones may be another process's at work."""


@dataclass
class Lease:
    """While it is held, in this process or another, the adapter at `path` is not removed."""

    path: Path
    notes: tuple[str, ...]
    """What was noted when it came."""
    _fd: int

    def release(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.release()


@dataclass(frozen=True)
class Stored:
    """One adapter in the store. Times are seconds since 1970."""

    cid: CID
    path: Path
    bytes: int
    fetched_at: float
    used_at: float
    in_use: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Damaged:
    cid: CID
    problem: str
    dropped: bool
    """False when a lease holds it."""


class Store:
    """`quota` in bytes, for all that lies in it; adapters in use may hold more."""

    def __init__(self, directory: Path, *, quota: int | None = None) -> None:
        self.quota = quota
        self._directory = directory
        self._adapters = directory / "adapters"
        self._incoming = directory / "incoming"
        self._locks = directory / "locks"
        try:
            for folder in (self._adapters, self._incoming, self._locks):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdapterError(
                f"can't use the cache {directory}: {error.strerror}",
                hint="set --cache-dir to a writable folder",
            ) from error

    def lease(self, cid: CID) -> Lease | None:
        """The adapter's directory, held; None if it is not here or not whole."""
        fd = os.open(self._locks / str(cid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        path = self._adapters / str(cid)
        manifest = _manifest(path)
        if manifest is None or not _sizes_are_right(path, manifest):
            os.close(fd)
            return None
        os.utime(fd)
        return Lease(path, tuple(manifest["notes"]), fd)

    @asynccontextmanager
    async def incoming(self, cid: CID) -> AsyncIterator[Path]:
        """A folder for fetching `cid`, one fetch at a time; it stays until `commit` or `discard`.

        Waits while another process fetches the same adapter.
        """
        fd = os.open(self._locks / f"{cid}.fetch", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not _try_lock(fd):  # noqa: ASYNC110 - the kernel wakes nobody here
                await asyncio.sleep(_POLL_S)
            folder = self._incoming / str(cid)
            folder.mkdir(exist_ok=True)
            yield folder
        finally:
            os.close(fd)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder that goes away."""
        with tempfile.TemporaryDirectory(dir=self._incoming, prefix=".scratch-") as folder:
            yield Path(folder)

    def commit(self, cid: CID, vetted: Path, notes: Sequence[str] = ()) -> None:
        """Move the two files of the vetted adapter in; whatever else came with it is dropped.

        After a crash the adapter is there as a whole or not at all. Raises StorageFull when the
        quota leaves no room.
        """
        incoming = self._incoming / str(cid)
        aside = incoming / "commit"
        with full_disk_is_said(self._directory):
            self.make_room(sum((vetted / name).stat().st_size for name in _FILES), keep=cid)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            for name in _FILES:
                os.rename(vetted / name, aside / name)
            manifest = {
                "cid": str(cid),
                "fetched_at": time.time(),
                "notes": list(notes),
                "files": {name: _measured(aside / name) for name in _FILES},
            }
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for name in (*_FILES, MANIFEST, "."):
                _fsync(aside / name)
            if not self._drop_adapter(cid):  # a damaged one was there
                raise AdapterError(
                    f"{cid} is damaged on disk and in use",
                    hint="stop the node that serves it, and fetch it again",
                )
            os.rename(aside, self._adapters / str(cid))
            _fsync(self._adapters)
        shutil.rmtree(incoming, ignore_errors=True)

    def discard(self, cid: CID) -> None:
        """Forget a fetch: nothing of it is kept."""
        shutil.rmtree(self._incoming / str(cid), ignore_errors=True)

    def stored(self) -> list[Stored]:
        """All adapters, the last used first."""
        found = []
        for path in self._adapters.iterdir():
            with suppress(BadCID, FileNotFoundError):  # not ours, or gone meanwhile
                found.append(self._describe(CID.parse(path.name), path))
        return sorted(found, key=lambda it: -it.used_at)

    def used(self) -> int:
        """Bytes on disk, with fetches under way."""
        return _bytes(self._adapters) + _bytes(self._incoming)

    def make_room(self, wanted: int, *, keep: CID | None = None) -> int:
        """Drop what was not used for longest until `wanted` more bytes fit; the bytes dropped.

        What is leased or being fetched stays, and so does the fetch of `keep`. Raises StorageFull.
        """
        if self.quota is None:
            return 0
        mine = _bytes(self._incoming / str(keep)) if keep else 0
        over = self.used() - mine + wanted - self.quota
        dropped = 0
        for cid, size in self._least_recently_used():
            if dropped >= over:
                break
            if cid != keep and self._drop(cid):
                dropped += size
        if dropped < over and wanted:
            raise StorageFull(
                f"{wanted} bytes more do not fit: the cache {self._directory} may hold "
                f"{self.quota} and the adapters in use fill it",
                hint="raise --cache-size, or serve fewer adapters",
            )
        return dropped

    def collect(self) -> int:
        """Drop what crashes left, and adapters over the quota; the bytes dropped."""
        dropped = 0
        for path in self._incoming.glob(".*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _RUBBISH_S:
                    dropped += _bytes(path)
                    shutil.rmtree(path, ignore_errors=True)
        return dropped + self.make_room(0)

    def drop_unused(self) -> int:
        """Drop every adapter and partial fetch that nobody uses; the bytes dropped."""
        sizes = list(self._least_recently_used())
        return sum(size for cid, size in sizes if self._drop(cid))

    def fsck(self, cid: CID | None = None) -> Iterator[Damaged | Stored]:
        """Hash the files of every adapter, or of one; what is damaged and not in use is dropped."""
        for it in self.stored():
            if cid is not None and it.cid != cid:
                continue
            problem = _problem(it.path)
            yield Damaged(it.cid, problem, self._drop(it.cid)) if problem else it

    def _describe(self, cid: CID, path: Path) -> Stored:
        manifest = _manifest(path) or {"fetched_at": 0.0, "notes": []}
        with self._locked(str(cid)) as free:
            used_at = (self._locks / str(cid)).stat().st_mtime
        return Stored(
            cid,
            path,
            _bytes(path),
            manifest["fetched_at"],
            used_at,
            not free,
            tuple(manifest["notes"]),
        )

    def _least_recently_used(self) -> Iterator[tuple[CID, int]]:
        """CIDs of adapters and of partial fetches, with their bytes."""
        found: dict[CID, tuple[float, int]] = {}
        for folder in (self._adapters, self._incoming):
            for path in folder.iterdir():
                with suppress(BadCID, FileNotFoundError):
                    cid = CID.parse(path.name)
                    lock = self._locks / str(cid)
                    used = (lock if lock.exists() else path).stat().st_mtime
                    before = found.get(cid, (0.0, 0))
                    found[cid] = max(used, before[0]), before[1] + _bytes(path)
        for cid, (_, size) in sorted(found.items(), key=lambda item: item[1][0]):
            yield cid, size

    def _drop(self, cid: CID) -> bool:
        """Remove an adapter and what came of a fetch of it; False if somebody is using it."""
        with self._locked(f"{cid}.fetch") as mine:
            if mine:
                shutil.rmtree(self._incoming / str(cid), ignore_errors=True)
        return self._drop_adapter(cid)

    def _drop_adapter(self, cid: CID) -> bool:
        with self._locked(str(cid)) as mine:
            if not mine:
                return False
            gone = Path(tempfile.mkdtemp(dir=self._incoming, prefix=".gone-"))
            with suppress(FileNotFoundError):
                os.rename(self._adapters / str(cid), gone / "adapter")
            shutil.rmtree(gone, ignore_errors=True)
        return True

    @contextmanager
    def _locked(self, name: str) -> Iterator[bool]:
        """Whether nobody else holds the lock `name`; nobody will meanwhile."""
        fd = os.open(self._locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield _try_lock(fd)
        finally:
            os.close(fd)


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        complete = set(manifest["files"]) == set(_FILES) and isinstance(manifest["notes"], list)
        return manifest if complete and isinstance(manifest["fetched_at"], float) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sizes_are_right(path: Path, manifest: dict[str, Any]) -> bool:
    try:
        return all(
            (path / name).stat().st_size == manifest["files"][name]["bytes"] for name in _FILES
        )
    except (OSError, KeyError, TypeError):
        return False


def _problem(path: Path) -> str:
    """What is wrong with the adapter at `path`, or nothing."""
    manifest = _manifest(path)
    if manifest is None:
        return f"its {MANIFEST} can't be read"
    for name in _FILES:
        try:
            if _measured(path / name) != manifest["files"][name]:
                return f"{name} is not what was fetched"
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
    return ""


def _measured(path: Path) -> dict[str, object]:
    # One thread: blake3's pool of them does not survive a fork, and one does gigabytes a second.
    digest = blake3().update_mmap(path).hexdigest()
    return {"bytes": path.stat().st_size, "blake3": digest}


def _bytes(folder: Path) -> int:
    """On disk, as far as it doesn't go away meanwhile."""
    total = 0
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError, NotADirectoryError):
            total += path.lstat().st_blocks * 512
    return total


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
