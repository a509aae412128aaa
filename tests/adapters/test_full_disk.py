"""A small disk that the next adapter does not fit on, and others do."""

import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from r3mes_vllm.adapters.store import Damaged, Store
from r3mes_vllm.adapters.supply import Obtained, Supply
from r3mes_vllm.adapters.vetting import WEIGHTS
from r3mes_vllm.errors import StorageFull
from r3mes_vllm.ipfs import tree
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.pack import pack
from tests import tiny
from tests.adapters.mounts import tmpfs
from tests.peers import gateway

NOWHERE = "http://127.0.0.1:9"
DISK = 2 << 20
LARGE, SMALL = 256, 8
"""Ranks: 3 MB and 0.1 MB."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with tmpfs(tmp_path / "disk", f"size={DISK}") as folder:
        yield folder


class Offer:
    """An adapter that a gateway has."""

    def __init__(self, folder: Path, *, seed: int, rank: int) -> None:
        self.folder = tiny.make_adapter(folder, seed=seed, rank=rank)
        self.published = gateway.packed(self.folder)
        self.size = (self.folder / WEIGHTS).stat().st_size

    def is_whole(self, got: Obtained) -> bool:
        with got.lease:
            return (got.path / WEIGHTS).read_bytes() == (self.folder / WEIGHTS).read_bytes()


class Offers:
    """Three adapters, of which a supply onto the disk knows; the first is there."""

    def __init__(self, disk: Path, there: Offer, large: Offer, small: Offer, url: str) -> None:
        self.disk, self.there, self.large, self.small = disk, there, large, small
        self.store = Store(disk)
        self.supply = Supply(self.store, ipfs_api=NOWHERE, gateways=[url])

    def stored(self) -> set[CID]:
        """Each of them hashed."""
        found = list(self.store.fsck())
        assert not any(isinstance(it, Damaged) for it in found)
        return {it.cid for it in found}

    async def the_small_one_comes(self) -> None:
        assert self.small.is_whole(await self.supply.obtain(self.small.published.root))
        assert self.there.is_whole(await self.supply.obtain(self.there.published.root))
        self.store.synchronise()
        assert self.stored() == {self.there.published.root, self.small.published.root}


@pytest.fixture
async def offers(disk: Path, tmp_path: Path) -> AsyncIterator[Offers]:
    there = Offer(tmp_path / "there", seed=1, rank=SMALL)
    large = Offer(tmp_path / "large", seed=2, rank=LARGE)
    small = Offer(tmp_path / "small", seed=3, rank=SMALL)
    assert small.size + there.size < DISK < large.size
    blocks = [block for it in (there, large, small) for block in it.published.blocks]
    kept = gateway.Published(there.published.root, blocks, tmp_path)
    named = gateway.Gateway(kept, lambda found: found[:1])  # no CARs: three roots are in one
    async with gateway.listening(named) as source:
        made = Offers(disk, there, large, small, source.name)
        (await made.supply.obtain(there.published.root)).lease.release()
        made.store.synchronise()
        yield made


async def test_what_does_not_fit_is_refused_with_its_size_before_it_takes_the_room(
    offers: Offers,
) -> None:
    root = offers.large.published.root
    free = os.statvfs(offers.disk).f_bavail * os.statvfs(offers.disk).f_frsize
    with pytest.raises(StorageFull) as caught:
        await offers.supply.obtain(root)
    message = caught.value.message
    assert message.startswith(f"no room left in {offers.disk}/incoming/{root}")
    assert f": {offers.large.size} bytes are needed, " in message
    assert free - 65536 < int(message.split()[-3]) <= free
    assert "free some disk, or point --cache-dir elsewhere" in caught.value.hint
    assert offers.stored() == {offers.there.published.root}
    assert list((offers.disk / "incoming").iterdir()) == []
    await offers.the_small_one_comes()


async def test_when_others_take_the_room_meanwhile_what_came_gives_it_back(
    offers: Offers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "_require_room", lambda file, size: None)
    with pytest.raises(StorageFull, match=f"no room left in {offers.disk}") as caught:
        await offers.supply.obtain(offers.large.published.root)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert offers.stored() == {offers.there.published.root}
    await offers.the_small_one_comes()


async def test_without_giving_it_back_nothing_else_would_fit(
    offers: Offers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "_require_room", lambda file, size: None)
    monkeypatch.setattr(Store, "discard", lambda self, cid: None)
    for it in (offers.large, offers.small):
        with pytest.raises(StorageFull, match="no room left"):
            await offers.supply.obtain(it.published.root)


async def test_an_operators_folder_that_does_not_fit_says_how_much_it_is(offers: Offers) -> None:
    with pytest.raises(StorageFull, match=r"no room left in .*: \d+ bytes are needed") as caught:
        await offers.supply.import_path(offers.large.folder)
    assert int(caught.value.message.split(": ")[1].split()[0]) > offers.large.size
    await offers.the_small_one_comes()


def test_packing_onto_a_full_disk_says_how_much_it_takes(disk: Path, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tmp_path / "large", seed=2, rank=LARGE)
    with pytest.raises(StorageFull, match=rf"no room left in {disk}: \d+ bytes are needed"):
        pack(adapter, disk / "large.car")
    assert list(disk.iterdir()) == []


async def test_what_a_quota_has_no_room_for_is_kept_and_not_fetched_again(tmp_path: Path) -> None:
    """Unlike a disk's, its room is others' only when they ask for it."""
    large = Offer(tmp_path / "large", seed=2, rank=LARGE)
    root = large.published.root
    server = gateway.Gateway(large.published)
    async with gateway.listening(server) as source:

        def supply(quota: int | None) -> Supply:
            store = Store(tmp_path / "cache", quota=quota)
            return Supply(store, ipfs_api=NOWHERE, gateways=[source.name])

        with pytest.raises(StorageFull, match="do not fit"):
            await supply(large.size // 2).obtain(root)
        asked = len(server.asked)
        assert large.is_whole(await supply(None).obtain(root))
        assert len(server.asked) == asked
