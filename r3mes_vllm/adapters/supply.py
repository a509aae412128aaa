"""From a CID to a vetted adapter in the store: fetch, verify, vet, commit."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from r3mes_vllm.adapters import shipped
from r3mes_vllm.adapters.manifest import FILES
from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.adapters.pins import Pins
from r3mes_vllm.adapters.store import Lease, Store
from r3mes_vllm.adapters.unwrap import unwrap
from r3mes_vllm.adapters.vetting import HEADER_RULES, LARGEST_RANK, RULES, Adapter, Rule, vet
from r3mes_vllm.errors import (
    AdapterError,
    AdapterNotReady,
    AdapterRefused,
    BadArchive,
    BadCAR,
    BadDAG,
    BlockMismatch,
    ContentNotFound,
    ContentTooLarge,
    DiskFull,
    SourceFailed,
)
from r3mes_vllm.ipfs import archive, car
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.disk import disk_errors_are_said
from r3mes_vllm.ipfs.fetch import fetch, resolve
from r3mes_vllm.ipfs.pack import pack
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.ipfs.race import Progress
from r3mes_vllm.ipfs.sources import BlocksSource, CarSource, GatewaySource, KuboSource, Source
from r3mes_vllm.ipfs.tree import Limits
from r3mes_vllm.settings import Settings

LeaseT = TypeVar("LeaseT", Lease, Lease | None)
ProgressCall = Callable[[Progress], None]

TURN_S = 60.0
"""A source that sends a kilobyte a second could else hold a place for `fetch_timeout`."""

_OF_THE_SOURCES = (ContentNotFound, BlockMismatch, BadCAR, SourceFailed)
"""What others may not fail of."""

_KINDS = {BlocksSource: "blocks", KuboSource: "daemon", GatewaySource: "gateway"}


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


@dataclass
class _Flight:
    """One fetch, and how many wait for it."""

    task: asyncio.Task[Lease]
    """What it gives is released when the last of them has a lease of its own."""
    sources: Sequence[str]
    """Their names."""
    watchers: list[ProgressCall]
    waiting: int = 0


class Supply:
    """Adapters by CID, from IPFS, from the shipped CARs, or from files of the operator's.

    `at_once` fetches run at a time, `waiting` more may wait. With `pin`, what is obtained is pinned
    on the daemon meanwhile: `pins.aclose` ends that. Used in one event loop.
    """

    def __init__(
        self,
        store: Store,
        *,
        ipfs_api: str,
        gateways: Sequence[str],
        blocks: Sequence[Path] = (),
        pin: bool = False,
        base: ModelShape | None = None,
        max_rank: int = LARGEST_RANK,
        limits: Limits | None = None,
        at_once: int = 4,
        waiting: int = 256,
    ) -> None:
        self._store = store
        self._limits = limits or Limits()
        daemon = KuboSource(ipfs_api)
        self.pins = Pins(daemon, self._limits)
        self._sources: list[Source] = [
            *map(BlocksSource, blocks),
            daemon,
            *map(GatewaySource, gateways),
        ]
        self._pin = pin
        self._base = base
        self._max_rank = max_rank
        self._gate = asyncio.Semaphore(at_once)
        self._waiting = waiting
        self._flights: dict[CID, _Flight] = {}
        self._car_bytes = 0
        self.refusals: Counter[str] = Counter()
        """By rule."""
        self.timed: Callable[[str, float], None] = lambda phase, seconds: None
        """Called with the seconds of each `fetch` and each `vet` of what was fetched."""

    @classmethod
    def of(
        cls, settings: Settings, *, base: ModelShape | None = None, max_rank: int = LARGEST_RANK
    ) -> "Supply":
        """The supply that the settings describe. Raises AdapterError if the cache can't be used."""
        return cls(
            Store(settings.cache_dir, quota=settings.cache_size),
            ipfs_api=settings.ipfs_api_url,
            gateways=settings.ipfs_gateways,
            blocks=settings.ipfs_blocks,
            pin=settings.ipfs_pin,
            base=base,
            max_rank=max_rank,
            limits=Limits(
                bytes=settings.adapter_bytes,
                files=settings.adapter_files,
                depth=settings.adapter_depth,
                name_length=settings.adapter_name_length,
                stall_s=settings.fetch_stall,
                total_s=settings.fetch_timeout,
            ),
            at_once=settings.fetches_at_once,
            waiting=settings.fetches_waiting,
        )

    async def obtain(
        self, where: IpfsPath | CID, *, progress: ProgressCall | None = None
    ) -> Obtained:
        """The adapter at `where`, fetched if need be; many callers make one fetch of it.

        Raises IpfsError when it can't be had, AdapterRefused when it may not be used,
        AdapterNotReady when too many wait, StorageFull.
        """
        cid = await self.resolve(where) if isinstance(where, IpfsPath) else where
        held = await self._held(cid)
        if held is None:
            held = await self._fetched_once(cid, self._sources_of(cid), progress)
        if self._pin:
            self.pins.begin(cid)
        return held

    async def import_path(self, path: Path) -> Obtained:
        """The adapter in the operator's directory, CAR, archive or weights at `path`, under the
        CID that it has in IPFS."""
        if path.is_dir() or _is_content(path):  # noqa: ASYNC240 - a local file, asked once
            with self._store.scratch() as scratch:
                packed = scratch / "packed.car"
                cid = await asyncio.to_thread(pack, path, packed, linked=FILES)
                return await self._import_car(cid, CarSource(packed, name=str(path)))
        return await self._import_car(
            await asyncio.to_thread(car.root_of, path), CarSource(path, name=str(path))
        )

    @asynccontextmanager
    async def peek(
        self, where: IpfsPath | Path, progress: ProgressCall | None = None
    ) -> AsyncIterator[Path]:
        """What is there, fetched and verified but not vetted, for as long as the context lasts."""
        with self._store.scratch() as scratch:
            if isinstance(where, IpfsPath):
                cid = await self.resolve(where)
                sources = self._sources_of(cid)
            elif where.is_dir() or _is_content(where):  # noqa: ASYNC240 - asked once
                yield where
                return
            else:
                cid = await asyncio.to_thread(car.root_of, where)
                sources = [CarSource(where, name=str(where))]
            yield await fetch(
                cid, scratch / "peek", sources=sources, limits=self._limits, progress=progress
            )

    async def _import_car(self, cid: CID, source: Source) -> Obtained:
        if (held := await self._held(cid)) is not None:
            return held
        return await self._fetched_once(cid, [source], None)

    async def resolve(self, path: IpfsPath) -> CID:
        """The CID that `path` leads to. Raises IpfsError."""
        if not path.names:
            return path.root
        if (known := await asyncio.to_thread(self._store.paths.get, path)) is not None:
            return known
        with self._store.scratch() as scratch:
            sources = self._sources_of(path.root)
            found = await resolve(path, scratch, sources=sources, limits=self._limits)
        await asyncio.to_thread(self._store.paths.remember, path, found)
        return found

    def fetched_bytes(self) -> dict[tuple[str, str], int]:
        """Of verified blocks, by kind of source and, of those that the operator named, host."""
        found: Counter[tuple[str, str]] = Counter({("car", ""): self._car_bytes})
        for it in self._sources:
            found[_KINDS[type(it)], urlsplit(it.name).hostname or ""] += it.standing.bytes
        return dict(found)

    def _sources_of(self, cid: CID) -> list[Source]:
        known = (CarSource(it.car) for it in shipped.adapters() if CID.parse(it.cid) == cid)
        return [*known, *self._sources]

    async def _held(self, cid: CID) -> Obtained | None:
        lease = await _taken(self._store.lease, cid)
        if lease is None:
            return None
        try:
            with disk_errors_are_said(self._store.directory):
                facts = await self._vet(lease.path, HEADER_RULES)
        except BaseException:
            lease.release()
            raise
        noted = replace(facts, notes=lease.notes)
        return Obtained(cid, lease, noted, fetched=False)

    async def _fetched_once(
        self, cid: CID, sources: Sequence[Source], progress: ProgressCall | None
    ) -> Obtained:
        """With who has begun to; if that fails, from these sources, if they are others."""
        mine = [it.name for it in sources]
        while (flight := self._flights.get(cid)) is not None and flight.sources != mine:
            try:
                return await self._aboard(cid, flight, progress)
            except _OF_THE_SOURCES:
                continue
        return await self._aboard(cid, flight or self._take_off(cid, sources), progress)

    async def _aboard(self, cid: CID, flight: _Flight, progress: ProgressCall | None) -> Obtained:
        """One caller's cancellation is its own; the last one's ends the fetch."""
        if progress:
            flight.watchers.append(progress)
        flight.waiting += 1
        try:
            await asyncio.shield(flight.task)
            held = await self._held(cid)
        finally:
            flight.waiting -= 1
            if progress:
                flight.watchers.remove(progress)
            if not flight.waiting:
                self._land(cid, flight)
                if flight.task.done():
                    _give_back(flight.task)
                else:
                    flight.task.add_done_callback(_give_back)
                    flight.task.cancel()
                    await asyncio.wait({flight.task})
        if held is None:
            raise AdapterError(
                f"{cid} is not whole in the store right after it was fetched",
                hint="is the disk sound? r3mes-vllm adapter verify",
            )
        return replace(held, fetched=True)

    def _take_off(self, cid: CID, sources: Sequence[Source]) -> _Flight:
        if len(self._flights) >= self._waiting:
            raise AdapterNotReady(
                f"{len(self._flights)} adapters are being fetched already", hint="try again later"
            )
        watchers: list[ProgressCall] = []
        task = asyncio.create_task(self._fetch(cid, sources, watchers))
        self._flights[cid] = flight = _Flight(task, [it.name for it in sources], watchers)
        task.add_done_callback(lambda _: self._land(cid, flight))
        return flight

    def _land(self, cid: CID, flight: _Flight) -> None:
        """Nobody joins it any more. Another may be under way while a cancelled one ends."""
        if self._flights.get(cid) is flight:
            del self._flights[cid]

    async def _fetch(
        self, cid: CID, sources: Sequence[Source], watchers: Sequence[ProgressCall]
    ) -> Lease:
        def tell(progress: Progress) -> None:
            for watcher in tuple(watchers):
                watcher(progress)

        async with self._turn(), self._store.incoming(cid) as folder:
            if (lease := await _taken(self._store.lease, cid)) is not None:
                return lease  # another process was quicker
            try:
                fetched = await self._fetch_into(folder, cid, sources, tell)
                began = time.monotonic()
                with disk_errors_are_said(self._store.directory), self._store.scratch() as work:
                    adapter, notes = await asyncio.to_thread(unwrap, fetched, work, self._limits)
                    facts = await self._vet(adapter, RULES)
                    self.timed("vet", time.monotonic() - began)
                    noted = (*notes, *facts.notes)
                    return await _taken(self._store.commit, cid, adapter, noted)
            except (AdapterRefused, BadArchive, BadDAG, ContentTooLarge, DiskFull):
                # What came of one that the disk has no room for would leave none to others.
                await asyncio.to_thread(self._store.discard, cid)
                raise

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One of the places for fetches; who still fetches after `TURN_S` goes on without one."""
        await self._gate.acquire()
        with ExitStack() as place:
            place.callback(self._gate.release)
            over = asyncio.get_running_loop().call_later(TURN_S, place.close)
            try:
                yield
            finally:
                over.cancel()

    async def _fetch_into(
        self, folder: Path, cid: CID, sources: Sequence[Source], tell: ProgressCall
    ) -> Path:
        began = time.monotonic()
        try:
            return await fetch(cid, folder, sources=sources, limits=self._limits, progress=tell)
        finally:
            self.timed("fetch", time.monotonic() - began)
            cars = (it for it in sources if isinstance(it, CarSource))
            self._car_bytes += sum(it.standing.bytes for it in cars)

    async def _vet(self, directory: Path, rules: Sequence[Rule]) -> Adapter:
        try:
            return await asyncio.to_thread(
                vet, directory, base=self._base, max_rank=self._max_rank, rules=rules
            )
        except AdapterRefused as error:
            self.refusals[error.rule] += 1
            raise


def _is_content(path: Path) -> bool:
    return path.is_file() and (archive.kind(path) is not None or path.name.endswith(".safetensors"))


async def _taken(take: Callable[..., LeaseT], *args: object) -> LeaseT:
    """What is leased on a thread; released if nobody waits for it any more."""
    taking = asyncio.ensure_future(asyncio.to_thread(take, *args))
    try:
        return await asyncio.shield(taking)
    except asyncio.CancelledError:
        taking.add_done_callback(_give_back)
        await asyncio.wait({taking})
        raise


def _give_back(taking: asyncio.Future[Any]) -> None:
    if not taking.cancelled() and taking.exception() is None and (lease := taking.result()):
        lease.release()
