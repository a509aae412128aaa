"""Vetted adapters on disk, by CID. What is in the store is complete, verified and never changed.

    DIR/adapters/CID/    an adapter: its two files and `manifest.json`
    DIR/incoming/CID/    a fetch under way, with what came so far
    DIR/locks/CID        held shared by each lease; its time is that of the last use
    DIR/paths.json       where paths below CIDs lead

Several processes may share one store: the kernel's file locks end with their process, however
that dies, and everything appears and goes by a rename.

What lies in a store that may only be read is served as well; its times stay as they are.
"""

import asyncio
import fcntl
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from r3mes_vllm.adapters import manifest
from r3mes_vllm.adapters.paths import Paths
from r3mes_vllm.errors import AdapterError, BadCID, StorageFull
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.disk import READ_ONLY, bytes_in, disk_errors_are_said

_POLL_S = 0.05
_PROBES_S = 2.0
"""Waited for those who only look whether an adapter is here."""

_MAKING_ROOM_S = 30.0
"""Waited for another who makes room in the same store."""

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
        """Once; leaving the `with` block does it too."""
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
    """One adapter whose files are not what they were when they came."""

    cid: CID
    problem: str
    dropped: bool
    """False when a lease holds it."""


class Store:
    """`quota` in bytes, for all that lies in it; adapters in use may hold more.

    Every method raises StorageFull for a disk without room, and AdapterError for one that fails
    otherwise or may only be read.
    """

    def __init__(self, directory: Path, *, quota: int | None = None) -> None:
        self.quota = quota
        self.directory = directory
        self._adapters = directory / "adapters"
        self._incoming = directory / "incoming"
        self._locks = directory / "locks"
        self.paths = Paths(directory / "paths.json")
        self._synchronising: dict[CID, threading.Thread] = {}
        self._beginning = threading.Lock()
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
        path = self._adapters / str(cid)
        if not os.path.exists(path):  # where nothing can be written its lock isn't there either
            return None
        fd = self._open_lock(cid)
        fcntl.flock(fd, fcntl.LOCK_SH)
        told = manifest.read(path)
        if told is None or not manifest.sizes_are_right(path, told):
            os.close(fd)
            return None
        if manifest.power_went(told) and (problem := manifest.problem(path)):
            os.close(fd)
            self._drop_damaged(cid, problem)
            return None
        if not manifest.is_on_disk(told):
            self._begin_synchronising(cid)
        with suppress(OSError):
            os.utime(fd)
        return Lease(path, tuple(told["notes"]), fd)

    @asynccontextmanager
    async def incoming(self, cid: CID) -> AsyncIterator[Path]:
        """A folder for fetching `cid`, one fetch at a time; it stays until `commit` or `discard`.

        Waits while another process fetches the same adapter. Of a fetch that got nothing nothing
        stays.
        """
        folder = self._incoming / str(cid)
        while (fd := self._taken(_fetch_lock(cid))) is None:  # noqa: ASYNC110 - the kernel wakes nobody here
            await asyncio.sleep(_POLL_S)
        try:
            with disk_errors_are_said(self.directory):
                folder.mkdir(exist_ok=True)
            yield folder
        finally:
            if not _has_bytes(folder):
                shutil.rmtree(folder, ignore_errors=True)
            self._end_fetch(cid)
            os.close(fd)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder that goes away; one of the system's where this store may only be read."""
        with disk_errors_are_said(self.directory):
            try:
                scratch = tempfile.TemporaryDirectory(dir=self._incoming, prefix=".scratch-")
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise
                scratch = tempfile.TemporaryDirectory()
        with scratch as folder:
            yield Path(folder)

    def commit(self, cid: CID, vetted: Path, notes: Sequence[str] = ()) -> Lease:
        """Move the two files of the vetted adapter in, held; whatever else came is dropped.

        After a crash the adapter is there as a whole or not at all; after a power cut too, which
        may take one that came in the last seconds. Raises StorageFull when the quota leaves no
        room.
        """
        incoming = self._incoming / str(cid)
        aside = incoming / "commit"
        with disk_errors_are_said(self.directory):
            self.make_room(sum((vetted / name).stat().st_size for name in manifest.FILES), keep=cid)
            (self._locks / str(cid)).touch()
            damaged = (self._adapters / str(cid)).exists()
            if damaged and not self._drop_adapter(cid, wait_s=_PROBES_S):
                raise AdapterError(
                    f"{cid} is damaged on disk and in use",
                    hint="stop the node that serves it, and fetch it again",
                )
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            for name in manifest.FILES:
                os.rename(vetted / name, aside / name)
            manifest.write(aside, str(cid), notes)
            fd = self._open_lock(cid)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)  # else it may go before anybody can lease it
                os.rename(aside, self._adapters / str(cid))
            except BaseException:
                os.close(fd)
                raise
        self._begin_synchronising(cid)
        shutil.rmtree(incoming, ignore_errors=True)
        return Lease(self._adapters / str(cid), tuple(notes), fd)

    def discard(self, cid: CID) -> None:
        """Forget a fetch: nothing of it is kept."""
        shutil.rmtree(self._incoming / str(cid), ignore_errors=True)

    def stored(self) -> list[Stored]:
        """All adapters, the last used first."""
        found = []
        with disk_errors_are_said(self.directory):
            for path in self._adapters.iterdir():
                with suppress(BadCID, FileNotFoundError):  # not ours, or gone meanwhile
                    found.append(self._describe(CID.parse(path.name), path))
        return sorted(found, key=lambda it: -it.used_at)

    def used(self) -> int:
        """Bytes on disk, with fetches under way."""
        return bytes_in(self._adapters) + bytes_in(self._incoming)

    def make_room(self, wanted: int, *, keep: CID | None = None) -> int:
        """Drop what was not used for longest until `wanted` more bytes fit; the bytes dropped.

        What is leased or being fetched stays, and so does the fetch of `keep`. Raises StorageFull,
        before anything is dropped when all of it would not do.
        """
        if self.quota is None:
            return 0
        with self._locked("room", wait_s=_MAKING_ROOM_S):  # two would take each other for users
            return self._make_room(wanted, self.quota, keep)

    def _make_room(self, wanted: int, quota: int, keep: CID | None) -> int:
        mine = bytes_in(self._incoming / str(keep)) if keep else 0
        over = self.used() - mine + wanted - quota
        others = [other for other in self._least_recently_used() if other != keep]
        enough = sum(map(self._droppable, others)) >= over
        dropped = 0
        for other in others if enough or not wanted else ():
            if dropped >= over:
                break
            dropped += self._drop(other)
        if dropped < over and wanted:
            raise StorageFull(
                f"{wanted} bytes more do not fit: the cache {self.directory} may hold "
                f"{quota}, and what is in use leaves too little of it",
                hint="raise --cache-size, or serve fewer adapters",
            )
        return dropped

    def collect(self) -> int:
        """Drop what crashes left, and adapters over the quota; the bytes dropped. Paths to what is
        not here are forgotten."""
        dropped = 0
        for path in self._incoming.glob(".*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _RUBBISH_S:
                    dropped += bytes_in(path)
                    shutil.rmtree(path, ignore_errors=True)
        dropped += self.make_room(0)
        self.paths.collect(lambda cid: (self._adapters / cid).exists())
        return dropped

    def drop_unused(self) -> int:
        """Drop every adapter and partial fetch that nobody uses; the bytes dropped."""
        return sum(map(self._drop, self._least_recently_used()))

    def fsck(self, cid: CID | None = None) -> Iterator[Damaged | Stored]:
        """Hash the files of every adapter, or of one; what is damaged and not in use is dropped."""
        for it in self.stored():
            if cid is not None and it.cid != cid:
                continue
            problem = manifest.problem(it.path)
            yield Damaged(it.cid, problem, self._drop_damaged(it.cid, problem)) if problem else it

    def synchronise(self) -> None:
        """Wait until the disk has what was committed or leased here."""
        with self._beginning:
            threads = tuple(self._synchronising.values())
        for thread in threads:
            thread.join()

    def _begin_synchronising(self, cid: CID) -> None:
        with self._beginning:  # who waits for it finds it started
            if cid not in self._synchronising:
                thread = threading.Thread(target=self._synchronise, args=(cid,), name="r3mes-sync")
                self._synchronising[cid] = thread
                thread.start()

    def _synchronise(self, cid: CID) -> None:
        try:
            manifest.synchronise(self._adapters / str(cid))
        except FileNotFoundError:
            pass  # dropped meanwhile
        except OSError as error:
            if error.errno not in READ_ONLY:
                with suppress(AdapterError):  # a disk that failed may only be read from then on
                    self._drop_adapter(cid, wait_s=_PROBES_S)
        finally:
            self._synchronising.pop(cid, None)

    def _describe(self, cid: CID, path: Path) -> Stored:
        told = manifest.read(path) or {"fetched_at": 0.0, "notes": []}
        with self._locked(cid) as free:
            used_at = (self._locks / str(cid)).stat().st_mtime
        return Stored(
            cid,
            path,
            bytes_in(path),
            told["fetched_at"],
            used_at,
            not free,
            tuple(told["notes"]),
        )

    def _least_recently_used(self) -> list[CID]:
        """Of adapters and of partial fetches."""
        found: dict[CID, float] = {}
        for folder in (self._adapters, self._incoming):
            for path in folder.iterdir():
                with suppress(BadCID, FileNotFoundError):
                    cid = CID.parse(path.name)
                    lock = self._locks / str(cid)
                    used = (lock if lock.exists() else path).stat().st_mtime
                    found[cid] = max(used, found.get(cid, 0.0))
        return sorted(found, key=lambda cid: found[cid])

    def _droppable(self, cid: CID) -> int:
        """The bytes that `_drop` would remove."""
        return sum(map(bytes_in, self._unused(cid)))

    def _drop(self, cid: CID) -> int:
        """Remove of an adapter, and of a fetch of it, what nobody is using; the bytes removed."""
        return sum(map(self._remove, self._unused(cid)))

    def _drop_adapter(self, cid: CID, *, wait_s: float = 0.0) -> bool:
        """False if somebody is using it."""
        with self._locked(cid, wait_s=wait_s) as mine:
            if mine:
                self._remove(self._adapters / str(cid))
            return mine

    def _drop_damaged(self, cid: CID, problem: str) -> bool:
        """As `_drop_adapter`."""
        try:
            return self._drop_adapter(cid)
        except AdapterError as error:
            raise AdapterError(f"{cid} is damaged: {problem}; {error}", hint=error.hint) from error

    def _unused(self, cid: CID) -> Iterator[Path]:
        """What lies here of an adapter and of a fetch of it, each while nobody may use it."""
        fetch = self._incoming / str(cid)
        if fetch.exists():  # a full disk has no room for the lock of one that has ended
            with self._locked(_fetch_lock(cid)) as mine:
                if mine:
                    yield fetch
                    self._end_fetch(cid)
        with self._locked(cid) as mine:
            if mine:
                yield self._adapters / str(cid)

    def _end_fetch(self, cid: CID) -> None:
        """Remove its lock, which is held, where nothing is left of it; who waits looks whether the
        file is still the lock."""
        if not (self._incoming / str(cid)).exists():
            with suppress(OSError):
                os.unlink(self._locks / _fetch_lock(cid))

    def _remove(self, folder: Path) -> int:
        """As a whole or not at all, whatever ends this process; the bytes removed."""
        if not (before := bytes_in(folder)):
            return 0
        gone = self._incoming / f".gone-{secrets.token_hex(8)}"
        with disk_errors_are_said(self.directory):
            try:
                os.rename(folder, gone)
            except OSError as error:
                if error.errno in READ_ONLY:
                    raise
                gone = folder  # perhaps a disk so full that it has no room for another name
        shutil.rmtree(gone, ignore_errors=True)
        return before - bytes_in(gone)

    @contextmanager
    def _locked(self, name: CID | str, *, wait_s: float = 0.0) -> Iterator[bool]:
        """Whether nobody else holds the lock `name`; nobody will meanwhile."""
        until = time.monotonic() + wait_s
        while (fd := self._taken(name)) is None and time.monotonic() < until:
            time.sleep(_POLL_S)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                os.close(fd)

    def _taken(self, name: CID | str) -> int | None:
        """The lock `name`, held until it is closed; None while somebody else has it."""
        while True:
            fd = self._open_lock(name)
            if not _try_lock(fd):
                os.close(fd)
                return None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self._locks / str(name))):
                    return fd
            os.close(fd)  # its holder ended a fetch, and removed it

    def _open_lock(self, name: CID | str) -> int:
        """An adapter's may be held by who may only read the store, the others not."""
        path = self._locks / str(name)
        mode = 0o644 if isinstance(name, CID) else 0o600
        with disk_errors_are_said(self.directory):
            try:
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
            except OSError as error:
                if error.errno not in READ_ONLY or not os.path.exists(path):
                    raise
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _fetch_lock(cid: CID) -> str:
    return f"{cid}.fetch"


def _has_bytes(folder: Path) -> bool:
    files = (os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)
    return any(map(os.path.getsize, files))


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
