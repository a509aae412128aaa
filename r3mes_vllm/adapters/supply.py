"""From a CID to a vetted adapter in the store: fetch, verify, vet, commit."""

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from r3mes_vllm.adapters import shipped
from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.adapters.store import Lease, Store
from r3mes_vllm.adapters.vetting import HEADER_RULES, LARGEST_RANK, RULES, Adapter, Rule, vet
from r3mes_vllm.errors import AdapterRefused
from r3mes_vllm.ipfs import car
from r3mes_vllm.ipfs.blockstore import BlockStore
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.fetch import Progress, fetch
from r3mes_vllm.ipfs.pack import pack
from r3mes_vllm.ipfs.sources import CarSource, GatewaySource, KuboSource, Source
from r3mes_vllm.ipfs.tree import Limits


@dataclass(frozen=True)
class Obtained:
    """An adapter in the store, held by `lease`."""

    cid: CID
    lease: Lease
    facts: Adapter
    fetched: bool
    """False when it was in the store already."""

    @property
    def path(self) -> Path:
        return self.lease.path


class Supply:
    """Adapters by CID, from IPFS, from the shipped CARs, or from files of the operator's."""

    def __init__(
        self,
        store: Store,
        *,
        ipfs_api: str,
        gateways: Sequence[str],
        base: ModelShape | None = None,
        max_rank: int = LARGEST_RANK,
        limits: Limits | None = None,
    ) -> None:
        self._store = store
        self._ipfs_api = ipfs_api
        self._gateways = gateways
        self._base = base
        self._max_rank = max_rank
        self._limits = limits or Limits()

    async def obtain(
        self, cid: CID, *, progress: Callable[[Progress], None] | None = None
    ) -> Obtained:
        """The adapter `cid`, fetched if need be.

        Raises IpfsError when it can't be had and AdapterRefused when it may not be used.
        """
        if (held := await self._held(cid)) is not None:
            return held
        await self._fetch(cid, self._sources(cid), progress)
        return await self._held_now(cid, fetched=True)

    async def import_path(self, path: Path) -> Obtained:
        """The adapter in the operator's directory or CAR file at `path`, under its CID."""
        if path.is_dir():  # noqa: ASYNC240 - a local file, asked once
            with self._store.scratch() as scratch:
                packed = scratch / "packed.car"
                cid = await asyncio.to_thread(pack, path, packed)
                return await self._import_car(cid, packed)
        return await self._import_car(await asyncio.to_thread(car.root_of, path), path)

    async def _import_car(self, cid: CID, path: Path) -> Obtained:
        if (held := await self._held(cid)) is not None:
            return held
        await self._fetch(cid, [CarSource(path)], None)
        return await self._held_now(cid, fetched=True)

    def _sources(self, cid: CID) -> list[Source]:
        return [
            *(CarSource(it.car) for it in shipped.adapters() if CID.parse(it.cid) == cid),
            KuboSource(self._ipfs_api),
            *(GatewaySource(url) for url in self._gateways),
        ]

    async def _held(self, cid: CID) -> Obtained | None:
        lease = await asyncio.to_thread(self._store.lease, cid)
        if lease is None:
            return None
        try:
            return Obtained(cid, lease, await self._vet(lease.path, HEADER_RULES), fetched=False)
        except BaseException:
            lease.release()
            raise

    async def _held_now(self, cid: CID, *, fetched: bool) -> Obtained:
        held = await self._held(cid)
        if held is None:
            raise AdapterRefused("store", f"{cid} was removed from the store while it was fetched")
        return Obtained(held.cid, held.lease, held.facts, fetched)

    async def _fetch(
        self,
        cid: CID,
        sources: Sequence[Source],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        async with self._store.incoming(cid) as folder:
            if await asyncio.to_thread(self._store.has, cid):
                return
            files = folder / "files"
            shutil.rmtree(files, ignore_errors=True)
            await fetch(
                cid,
                files,
                blocks=BlockStore(folder / "blocks"),
                sources=sources,
                limits=self._limits,
                progress=progress,
            )
            if not files.is_dir():
                self._store.discard(cid)
                raise AdapterRefused(
                    "files_are_there",
                    f"{cid} is a file, not a directory",
                    hint="publish the adapter's folder: r3mes-vllm adapter pack DIR",
                )
            try:
                await self._vet(files, RULES)
            except AdapterRefused:
                self._store.discard(cid)
                raise
            self._store.commit(cid, files)

    async def _vet(self, directory: Path, rules: Sequence[Rule]) -> Adapter:
        return await asyncio.to_thread(
            vet, directory, base=self._base, max_rank=self._max_rank, rules=rules
        )
