"""The store short of room: nothing goes in vain, a full disk can be freed, a probe does no harm."""

import asyncio
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from r3mes_vllm.adapters import store as storing
from r3mes_vllm.adapters.store import Store
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS
from r3mes_vllm.errors import AdapterError, StorageFull
from tests.adapters.mounts import tmpfs
from tests.adapters.test_store import MIB, cid, held, here, put, used_long_ago


def test_what_can_not_fit_is_refused_before_anything_is_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path, quota=4 * MIB)
    put(store, 1)
    put(store, 2)
    with pytest.raises(StorageFull, match="do not fit"):
        put(store, 3, size=5 * MIB)
    with held(store, cid(1)), pytest.raises(StorageFull, match="do not fit"):
        put(store, 4, size=3 * MIB + MIB // 2)
    assert here(store) == {cid(1), cid(2)}


def test_a_fetch_under_way_is_not_counted_as_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, 1)

    async def run() -> None:
        async with store.incoming(cid(2)) as folder:
            (folder / "files").write_bytes(os.urandom(3 * MIB))
            before = store.used()
            bounded = Store(tmp_path, quota=before)
            with pytest.raises(StorageFull):
                bounded.make_room(2 * MIB)
            assert here(store) == {cid(1)}
            used_long_ago(store, tmp_path, cid(1), -100)  # last, after the fetch
            dropped = bounded.make_room(MIB // 2)
            assert dropped == before - store.used() >= MIB
            assert store.drop_unused() == 0
        assert store.drop_unused() >= 3 * MIB

    asyncio.run(run())


@contextmanager
def probed(tmp_path: Path) -> Iterator[None]:
    """As while `lease` looks whether the adapter is here."""
    fd = os.open(tmp_path / "locks" / str(cid(1)), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    try:
        yield
    finally:
        os.close(fd)


def damaged(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    put(store, 1)
    os.truncate(tmp_path / "adapters" / str(cid(1)) / WEIGHTS, 100)
    return store


def test_a_probe_does_not_keep_an_adapter_from_coming_in(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with probed(tmp_path):
        put(store, 1)
    assert here(store) == {cid(1)}


def test_a_damaged_adapter_is_replaced_once_a_probe_of_it_ends(tmp_path: Path) -> None:
    store = damaged(tmp_path)
    with probed(tmp_path):
        putting = threading.Thread(target=put, args=(store, 1))
        putting.start()
        putting.join(0.3)
        assert putting.is_alive()
    putting.join()
    held(store, cid(1)).release()


def test_what_is_damaged_and_stays_in_use_costs_nothing_of_the_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing, "_PROBES_S", 0.1)
    store = damaged(tmp_path)
    with probed(tmp_path), pytest.raises(AdapterError, match="damaged on disk and in use"):
        put(store, 1)
    fetched = tmp_path / "incoming" / str(cid(1)) / "files"
    assert {CONFIG, WEIGHTS} <= {path.name for path in fetched.iterdir()}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with tmpfs(tmp_path / "disk", "size=64k,nr_inodes=60") as disk:
        yield disk


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "ballast").open("wb", 0) as ballast:
        while True:
            ballast.write(b"x" * 4096)
    with suppress(OSError):
        for number in count():
            (disk / str(number)).touch()


def test_a_full_disk_can_be_freed_and_is_said_by_all_else(tiny_disk: Path) -> None:
    store = Store(tiny_disk)
    put(store, 1, size=8192)
    fill(tiny_disk)

    async def fetch() -> None:
        async with store.incoming(cid(2)):
            pass

    with pytest.raises(StorageFull, match="no room left"):
        asyncio.run(fetch())
    with pytest.raises(StorageFull, match="no room left"), store.scratch():
        pass
    assert store.lease(cid(2)) is None
    held(store, cid(1)).release()
    assert store.collect() + store.drop_unused() >= 8192
    assert here(store) == set()
    assert list((tiny_disk / "incoming").iterdir()) == []


def test_a_disk_without_room_for_a_name_can_be_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(tmp_path)
    put(store, 1)
    monkeypatch.setattr("r3mes_vllm.adapters.store.os.rename", full)
    assert store.drop_unused() >= MIB
    assert here(store) == set()


def test_several_commit_at_once_into_a_store_that_must_make_room(tmp_path: Path) -> None:
    """Each measures folders that the others move away, and drops what they would drop too."""
    store = Store(tmp_path, quota=14 * MIB)
    threads = 3
    wrong: list[Exception] = []

    def work(first: int) -> None:
        try:
            for number in range(first, first + 60, threads):
                put(store, number)
        except (AdapterError, OSError) as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
    for it in workers:
        it.start()
    for it in workers:
        it.join()
    assert not wrong
