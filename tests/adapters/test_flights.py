"""Many who want one adapter make one fetch of it, and each gets a lease or its reason."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r3mes_vllm.adapters import supply
from r3mes_vllm.adapters.store import Lease, Store
from r3mes_vllm.adapters.supply import Obtained, Supply
from r3mes_vllm.adapters.vetting import CONFIG
from r3mes_vllm.errors import AdapterNotReady, AdapterRefused, ContentNotFound
from r3mes_vllm.ipfs import fetch as ipfs_fetch
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.ipfs.pack import pack
from tests import tiny
from tests.adapters.test_supply import BASE, NOWHERE, files, supplied
from tests.peers import gateway


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


class Counted:
    """The fetch, counted, and held until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fetches: list[CID] = []
        self.cancelled = 0
        self.go_on = asyncio.Event()
        self._real = ipfs_fetch.fetch
        monkeypatch.setattr(supply, "fetch", self)

    async def __call__(self, cid: CID, *args: object, **kwargs: object) -> Path:
        self.fetches.append(cid)
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await self._real(cid, *args, **kwargs)  # type: ignore[arg-type]


async def test_a_hundred_who_want_one_adapter_make_one_fetch_whoever_leaves(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = gateway.packed(tiny.make_adapter(tmp_path / "mine", seed=3))
    counted = Counted(monkeypatch)
    async with gateway.listening(gateway.Gateway(published)) as source:
        one = Supply(store, ipfs_api=NOWHERE, gateways=[source.name], base=BASE)
        wanted = [asyncio.create_task(one.obtain(published.root)) for _ in range(100)]
        await until(lambda: bool(counted.fetches))
        for task in wanted[::2]:
            task.cancel()
        counted.go_on.set()
        got = await asyncio.gather(*wanted, return_exceptions=True)
    assert all(isinstance(it, asyncio.CancelledError) for it in got[::2])
    assert len({it.path for it in got[1::2] if isinstance(it, Obtained)}) == 1
    assert counted.fetches == [published.root]
    assert counted.cancelled == 0


async def test_when_the_last_who_wanted_it_leaves_the_fetch_ends(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, one = Counted(monkeypatch), supplied(store)
    cid = CID.of(RAW, b"x")
    wanted = [asyncio.create_task(one.obtain(cid)) for _ in range(3)]
    await until(lambda: bool(counted.fetches))
    for task in wanted:
        task.cancel()
    await asyncio.gather(*wanted, return_exceptions=True)
    assert counted.cancelled == 1


async def test_only_so_many_fetches_run_and_only_so_many_wait(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    one = Supply(store, ipfs_api=NOWHERE, gateways=[], at_once=2, waiting=3)
    cids = [CID.of(RAW, bytes([number])) for number in range(4)]
    wanted = [asyncio.create_task(one.obtain(cid)) for cid in cids[:3]]
    await until(lambda: len(counted.fetches) == 2)
    with pytest.raises(AdapterNotReady, match="3 adapters are being fetched"):
        await one.obtain(cids[3])
    assert len(counted.fetches) == 2
    for task in wanted:
        task.cancel()
    await asyncio.gather(*wanted, return_exceptions=True)


async def test_who_fetches_for_long_keeps_nobody_waiting(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    monkeypatch.setattr(supply, "TURN_S", 0.1)
    one = Supply(store, ipfs_api=NOWHERE, gateways=[], at_once=1)
    wanted = [asyncio.create_task(one.obtain(CID.of(RAW, bytes([it])))) for it in range(3)]
    await until(lambda: len(counted.fetches) == 3)
    for task in wanted:
        task.cancel()
    await asyncio.gather(*wanted, return_exceptions=True)
    assert one._gate._value == 1, "each place is given back once"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_who_comes_while_a_cancelled_fetch_ends_shares_the_next(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetches: list[asyncio.Event] = []
    ended = asyncio.Event()

    async def fetch(*_: object, **__: object) -> Path:
        fetches.append(asyncio.Event())
        try:
            await fetches[-1].wait()
        except asyncio.CancelledError:
            await ended.wait()
            raise
        raise ContentNotFound("nobody has it")

    monkeypatch.setattr(supply, "fetch", fetch)
    one, cid = supplied(store), CID.of(RAW, b"x")
    first = asyncio.create_task(one.obtain(cid))
    await until(lambda: len(fetches) == 1)
    first.cancel()
    await until(lambda: not one._flights)
    second = asyncio.create_task(one.obtain(cid))
    await until(lambda: len(one._flights) == 1)
    ended.set()
    await asyncio.wait({first})
    await until(lambda: len(fetches) == 2)
    third = asyncio.create_task(one.obtain(cid))
    await until(lambda: sum(flight.waiting for flight in one._flights.values()) == 2)
    fetches[1].set()
    for task in (second, third):
        with pytest.raises(ContentNotFound):
            await task
    assert len(fetches) == 2
    assert not one._flights


async def test_a_file_at_hand_is_imported_where_the_network_fails(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who imports it has joined the fetch from the network, and the other way round."""
    cid = pack(tiny.make_adapter(tmp_path / "mine", seed=3), tmp_path / "mine.car")
    counted, one = Counted(monkeypatch), supplied(store)
    wanted = [asyncio.create_task(one.obtain(cid)) for _ in range(2)]
    await until(lambda: len(counted.fetches) == 1)
    imports = [asyncio.create_task(one.import_path(tmp_path / "mine.car")) for _ in range(2)]
    await until(lambda: one._flights[cid].waiting == 4)
    counted.go_on.set()
    for got in await asyncio.gather(*imports):
        assert got.cid == cid
    for task in wanted:
        with pytest.raises(ContentNotFound):
            await task
    assert len(counted.fetches) == 2


async def test_what_is_wrong_with_the_content_is_not_fetched_once_more(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3)
    (adapter / CONFIG).write_text("{}")
    published = gateway.packed(adapter)
    counted = Counted(monkeypatch)
    async with gateway.listening(gateway.Gateway(published)) as source:
        one = Supply(store, ipfs_api=NOWHERE, gateways=[source.name])
        wanted = asyncio.create_task(one.obtain(published.root))
        await until(lambda: len(counted.fetches) == 1)
        imported = asyncio.create_task(one.import_path(tmp_path / "mine.car"))
        await until(lambda: one._flights[published.root].waiting == 2)
        counted.go_on.set()
        for task in (wanted, imported):
            with pytest.raises(AdapterRefused):
                await task
    assert len(counted.fetches) == 1


async def test_what_was_just_fetched_is_not_dropped_before_it_is_leased(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process, at the worst moments."""
    adapter, other = tiny.make_adapter(tmp_path / "mine", seed=3), Store(store.directory)
    commit, lease = Store.commit, Store.lease

    def committed(self: Store, *given: Any) -> Lease:
        taken = commit(self, *given)
        other.drop_unused()
        return taken

    def leased(self: Store, cid: CID) -> Lease | None:
        other.drop_unused()
        return lease(self, cid)

    monkeypatch.setattr(Store, "commit", committed)
    monkeypatch.setattr(Store, "lease", leased)
    one = supplied(store)
    got = await asyncio.gather(*(one.import_path(adapter) for _ in range(3)))
    assert all(files(it.path) for it in got)
    for it in got:
        assert store.stored()[0].in_use
        it.lease.release()
    assert not store.stored()[0].in_use


async def test_a_lease_that_nobody_waits_for_any_more_is_released(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = await supplied(store).import_path(tiny.make_adapter(tmp_path / "mine", seed=3))
    got.lease.release()
    asked, go_on, taken = (threading.Event() for _ in range(3))
    lease = Store.lease

    def leased(self: Store, cid: CID) -> Lease | None:
        asked.set()
        go_on.wait(10)
        held = lease(self, cid)
        taken.set()
        return held

    monkeypatch.setattr(Store, "lease", leased)
    other = Supply(Store(store.directory), ipfs_api=NOWHERE, gateways=[])
    wanted = asyncio.create_task(other.obtain(got.cid))
    await until(asked.is_set)
    wanted.cancel()
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await wanted
    await until(taken.is_set)
    assert store.drop_unused() > 0
