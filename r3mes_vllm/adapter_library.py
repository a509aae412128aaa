"""Adapters for a program: bring one here, judge one, and look after the cache.

The defaults are the settings of the environment (`R3MES_CACHE_DIR`, `R3MES_IPFS_GATEWAYS`, …), so
that a program and the nodes beside it use the same cache and the same sources.
"""

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from r3mes_vllm import settings
from r3mes_vllm.adapters import inspection
from r3mes_vllm.adapters.inspection import Finding, Inspection
from r3mes_vllm.adapters.store import Damaged, Lease, Store, Stored
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import CONFIG, LARGEST_RANK, WEIGHTS
from r3mes_vllm.engine.model import served_name, shape_of
from r3mes_vllm.errors import AdapterError, AdapterRefused, BadCID, IpfsError
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.path import IpfsPath

T = TypeVar("T")


def fetch(
    cid: str,
    *,
    dest: Path | str | None = None,
    gateways: Sequence[str] | None = None,
    ipfs_api: str | None = None,
    cache_dir: Path | str | None = None,
    max_bytes: int | None = None,
    stall_s: float | None = None,
    timeout_s: float | None = None,
) -> Path:
    """Fetch the adapter `cid` (or `CID/path`), and return the folder with its two files.

    Every block is hashed and every safety rule holds, or this raises. It comes from the cache, the
    adapters of this package, the IPFS daemon at `ipfs_api` and the `gateways` (trustless ones, by
    URL); without these two, from those of the environment. An interrupted fetch goes on where it
    was. At most `max_bytes` are taken; a source that is silent for `stall_s` seconds has failed,
    and the whole may take `timeout_s`.

    Without `dest` the folder is the cache's, where it may be evicted later: hold it with
    `AdapterStore.lease`. With it, the two files are copied to that new or empty folder.

    Blocks until it is done; `afetch` is for async programs. Raises BadCID, ContentNotFound and
    other IpfsError when it can't be had, AdapterRefused with the rule when no node would serve it,
    StorageFull, and AdapterError when `dest` can't be used.
    """
    return _run(
        lambda: afetch(
            cid,
            dest=dest,
            gateways=gateways,
            ipfs_api=ipfs_api,
            cache_dir=cache_dir,
            max_bytes=max_bytes,
            stall_s=stall_s,
            timeout_s=timeout_s,
        )
    )


async def afetch(
    cid: str,
    *,
    dest: Path | str | None = None,
    gateways: Sequence[str] | None = None,
    ipfs_api: str | None = None,
    cache_dir: Path | str | None = None,
    max_bytes: int | None = None,
    stall_s: float | None = None,
    timeout_s: float | None = None,
) -> Path:
    """As `fetch`; cancelling it ends the fetch, and keeps what came."""
    given = settings.load(
        {
            "ipfs_gateways": None if gateways is None else list(gateways),
            "ipfs_api_url": ipfs_api,
            "cache_dir": cache_dir,
            "adapter_bytes": max_bytes,
            "fetch_stall": stall_s,
            "fetch_timeout": timeout_s,
        }
    )
    where = IpfsPath.parse(cid)
    folder = None if dest is None else _new_folder(Path(dest))
    supply = Supply.of(given)
    obtained = await supply.obtain(where)
    with obtained.lease:
        await supply.pins.wait()
        if folder is None:
            return obtained.path
        await asyncio.to_thread(_copy, obtained.path, folder)
        return folder


def vet(
    path: Path | str, *, base: Path | str | None = None, max_rank: int = LARGEST_RANK
) -> Inspection:
    """The verdict of every safety rule on the adapter at `path`: a folder, an archive, a lone
    `.safetensors`, or a CAR file.

    A bad adapter raises nothing: `report.accepted` is False, and the findings that are `refused`
    say why and what to do. `base`, a base model's directory or hub name, has names and shapes
    compared with it; without it that rule is `not checked`. A rank over `max_rank` is refused.
    Nothing of the adapter is executed or deserialised. Raises ConfigError for a `base` that is no
    model, and StorageFull.
    """
    shape = None if base is None else shape_of(str(base), served_name(str(base)))
    place = Path(path).expanduser().absolute()
    with tempfile.TemporaryDirectory() as scratch:

        async def look() -> Inspection:
            supply = Supply(Store(Path(scratch)), ipfs_api="http://127.0.0.1:9", gateways=[])
            async with supply.peek(place) as fetched:
                return await asyncio.to_thread(
                    inspection.inspect,
                    fetched,
                    base=shape,
                    max_rank=max_rank,
                    follow_links=fetched == place,
                )

        try:
            if not place.exists():
                raise AdapterRefused("files_are_there", f"there is nothing at {place}")
            return _run(look)
        except (AdapterRefused, IpfsError) as error:
            rule = error.rule if isinstance(error, AdapterRefused) else "files_can_be_read"
            finding = Finding(rule, "refused", str(error), error.hint)
            return Inspection((finding,), None, None, (), None, None, ())


class AdapterStore:
    """The cache of verified adapters, as nodes and `r3mes-vllm adapter` keep it.

    Several processes may use one at a time. A CID may be given in any of its text forms.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def open(cls, directory: Path | str | None = None, *, quota: int | None = None) -> Self:
        """The store in `directory`, made if need be; without it, that of the environment
        (`R3MES_CACHE_DIR`). `quota` is in bytes, or else `R3MES_CACHE_SIZE`. Raises AdapterError if
        the folder can't be used."""
        given = settings.load({"cache_dir": directory, "cache_size": quota})
        return cls(Store(given.cache_dir, quota=given.cache_size))

    def lease(self, cid: str) -> Lease | None:
        """The adapter, held: until `release`, or the end of the `with` block, no process removes
        what is in `lease.path`. None if it is not here. Raises BadCID."""
        return self._store.lease(CID.parse(cid))

    def __contains__(self, cid: str) -> bool:
        """Whether it is here, whole."""
        try:
            lease = self.lease(cid)
        except BadCID:
            return False
        if lease is None:
            return False
        lease.release()
        return True

    def __iter__(self) -> Iterator[Stored]:
        return iter(self._store.stored())

    def verify(self, cid: str | None = None) -> tuple[Damaged | Stored, ...]:
        """Hash the files of every adapter, or of one; what is damaged and not in use is dropped."""
        return tuple(self._store.fsck(None if cid is None else CID.parse(cid)))

    def gc(self, *, everything: bool = False) -> int:
        """Free what crashes left and what was not used for longest over the quota; with
        `everything`, all that no process holds. The bytes freed."""
        freed = self._store.collect()
        return freed + (self._store.drop_unused() if everything else 0)

    def list(self) -> tuple[Stored, ...]:
        """All adapters here, the last used first."""
        return tuple(self._store.stored())


def _run(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Its result, also where this thread has an event loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(make())
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(lambda: asyncio.run(make())).result()


def _new_folder(path: Path) -> Path:
    """Raises AdapterError."""
    folder = path.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise AdapterError(f"{folder} is not empty", hint="give a folder that is new")
    except OSError as error:
        raise AdapterError(f"can't write to {folder}: {error.strerror}") from error
    return folder


def _copy(adapter: Path, folder: Path) -> None:
    try:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(adapter / name, folder / name)
    except OSError as error:
        raise AdapterError(f"can't write to {folder}: {error.strerror}") from error
