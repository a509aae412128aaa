"""Vetted adapters on disk, by CID. What is in the store is complete, verified and never changed."""

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS
from r3mes_vllm.errors import AdapterError
from r3mes_vllm.ipfs.cid import CID

_POLL_S = 0.05


@dataclass
class Lease:
    """While it is held, in this process or another, the adapter at `path` is not removed.

    The kernel ends it with the process, however that dies.
    """

    path: Path
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


class Store:
    """`DIR/adapters/CID/` for each adapter; several processes may share one.

    `DIR/incoming/CID/` holds a fetch under way, with the blocks verified so far.
    """

    def __init__(self, directory: Path) -> None:
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
        """The adapter's directory, held; None if it is not here."""
        fd = self._open_lock(cid)
        fcntl.flock(fd, fcntl.LOCK_SH)
        path = self._adapters / str(cid)
        if not path.is_dir():
            os.close(fd)
            return None
        return Lease(path, fd)

    def has(self, cid: CID) -> bool:
        return (self._adapters / str(cid)).is_dir()

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

    def commit(self, cid: CID, vetted: Path) -> None:
        """Move the two files of the vetted adapter in; whatever else came with it is dropped.

        After a crash the adapter is there as a whole or not at all.
        """
        aside = vetted.with_name("commit")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name in (CONFIG, WEIGHTS):
            os.rename(vetted / name, aside / name)
        _fsync(aside)
        with suppress(FileExistsError):
            os.rename(aside, self._adapters / str(cid))
        _fsync(self._adapters)
        shutil.rmtree(self._incoming / str(cid), ignore_errors=True)

    def discard(self, cid: CID) -> None:
        """Forget a fetch: nothing of it is kept."""
        shutil.rmtree(self._incoming / str(cid), ignore_errors=True)

    def cids(self) -> list[str]:
        return sorted(path.name for path in self._adapters.iterdir())

    def _open_lock(self, cid: CID) -> int:
        return os.open(self._locks / str(cid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _fsync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
