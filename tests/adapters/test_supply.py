"""From a CID to an adapter in the store, or to nothing at all."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r3mes_vllm.adapters import shipped, supply
from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.adapters.store import Store
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS
from r3mes_vllm.errors import (
    AdapterError,
    AdapterRefused,
    BadCAR,
    BlockMismatch,
    ContentNotFound,
)
from r3mes_vllm.ipfs import fetch as ipfs_fetch
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.ipfs.pack import pack
from tests import tiny
from tests.peers.js_ipfs import JsIpfs

NOWHERE = "http://127.0.0.1:9"
BASE = ModelShape(tiny.NAME, tiny.modules())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def supplied(store: Store, api: str = NOWHERE) -> Supply:
    return Supply(store, ipfs_api=api, gateways=[], base=BASE)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


async def test_from_the_daemon_to_the_store(store: Store, js_ipfs: JsIpfs, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3, rank=4)
    (adapter / "README.md").write_text("not served")
    cid = CID.parse(js_ipfs.add(adapter))
    got = await supplied(store, js_ipfs.api).obtain(cid)
    assert got.fetched
    assert got.facts.rank == 4
    assert str(cid) in str(got.path)
    assert files(got.path) == [CONFIG, WEIGHTS]
    assert (got.path / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    again = await supplied(store).obtain(cid)  # from nowhere: it is here
    assert not again.fetched
    assert not (tmp_path / "cache" / "incoming" / str(cid)).exists()


async def test_the_shipped_adapters_need_no_network(store: Store) -> None:
    for adapter in shipped.adapters():
        got = await Supply(store, ipfs_api=NOWHERE, gateways=[]).obtain(CID.parse(adapter.cid))
        assert got.facts.rank == 8


async def test_a_directory_and_its_car_are_the_same_adapter(store: Store, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3)
    cid = pack(adapter, tmp_path / "mine.car")
    one = await supplied(store).import_path(adapter)
    two = await supplied(store).import_path(tmp_path / "mine.car")
    assert one.cid == two.cid == cid
    assert one.path == two.path
    assert (one.fetched, two.fetched) == (True, False)


async def test_a_car_with_a_changed_byte_is_refused_by_name_and_nothing_is_kept(
    store: Store, tmp_path: Path
) -> None:
    pack(tiny.make_adapter(tmp_path / "mine", seed=3), tmp_path / "mine.car")
    data = bytearray((tmp_path / "mine.car").read_bytes())
    data[-100] ^= 1
    (tmp_path / "mine.car").write_bytes(data)
    with pytest.raises(BlockMismatch, match=r"mine\.car"):
        await supplied(store).import_path(tmp_path / "mine.car")
    assert store.cids() == []


async def test_what_is_vetoed_is_not_kept(store: Store, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3)
    (adapter / CONFIG).write_text("{}")
    with pytest.raises(AdapterRefused) as caught:
        await supplied(store).import_path(adapter)
    assert caught.value.rule == "kind_is_lora"
    assert store.cids() == []
    assert files(tmp_path / "cache" / "incoming") == []


async def test_with_the_vetting_off_it_would_be_kept(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3)
    (adapter / CONFIG).write_text("{}")
    monkeypatch.setattr(supply, "vet", lambda *_, **__: None)
    await supplied(store).import_path(adapter)
    assert len(store.cids()) == 1


async def test_a_stored_adapter_must_fit_todays_base_model(store: Store, tmp_path: Path) -> None:
    got = await supplied(store).import_path(tiny.make_adapter(tmp_path / "mine", seed=3))
    other = Supply(store, ipfs_api=NOWHERE, gateways=[], base=ModelShape("other", {}))
    with pytest.raises(AdapterRefused, match="other has no module"):
        await other.obtain(got.cid)


async def test_one_that_nobody_has(store: Store) -> None:
    with pytest.raises(ContentNotFound, match=NOWHERE):
        await supplied(store).obtain(CID.of(RAW, b"nobody has this"))


async def test_a_lone_file_is_no_adapter(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 300_000)
    pack(tmp_path / "file", tmp_path / "file.car")
    with pytest.raises(AdapterRefused, match="not a directory"):
        await supplied(store).import_path(tmp_path / "file.car")


@pytest.mark.parametrize("data", [b"", b"not a car at all"])
async def test_a_file_that_is_no_car(store: Store, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.car").write_bytes(data)
    with pytest.raises(BadCAR, match=r"x\.car"):
        await supplied(store).import_path(tmp_path / "x.car")


async def test_many_who_want_one_adapter_make_one_fetch(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3)
    fetches, real = [], ipfs_fetch.fetch

    async def counted(cid: CID, *args: object, **kwargs: object) -> None:
        fetches.append(cid)
        await real(cid, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(supply, "fetch", counted)
    wanted = [supplied(store).import_path(adapter) for _ in range(10)]
    got = await asyncio.gather(*wanted)
    assert len({it.path for it in got}) == 1
    assert len(fetches) == 1


def test_a_lease_ends_with_its_process(store: Store, tmp_path: Path) -> None:
    cid = CID.of(RAW, b"x")
    (tmp_path / "cache" / "adapters" / str(cid)).mkdir()
    lease = store.lease(cid)
    assert lease is not None
    script = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    lock = str(tmp_path / "cache" / "locks" / str(cid))

    def taken() -> bool:
        run = subprocess.run([sys.executable, "-c", script, lock], capture_output=True)
        return run.returncode != 0

    assert taken()
    lease.release()
    assert not taken()


def test_a_cache_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match="can't use the cache"):
        Store(tmp_path / "file")


def test_an_unfinished_fetch_is_no_adapter(store: Store, tmp_path: Path) -> None:
    cid = CID.of(RAW, b"x")
    os.makedirs(tmp_path / "cache" / "incoming" / str(cid) / "commit")
    assert store.lease(cid) is None
    assert store.cids() == []
