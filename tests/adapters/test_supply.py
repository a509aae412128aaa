"""From a CID to an adapter in the store, or to nothing at all."""

import asyncio
import json
import shutil
from pathlib import Path

import multibase
import pytest
from safetensors.numpy import save_file

from r3mes_vllm.adapters import paths, shipped, supply, vetting
from r3mes_vllm.adapters.manifest import MANIFEST
from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.adapters.store import Store
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS
from r3mes_vllm.errors import (
    AdapterError,
    AdapterRefused,
    BadCAR,
    BadDAG,
    BlockMismatch,
    ContentNotFound,
    ContentTooLarge,
)
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.ipfs.pack import pack
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.ipfs.tree import Limits
from tests import tiny
from tests.peers import gateway
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
    store.synchronise()
    assert files(got.path) == [CONFIG, WEIGHTS, MANIFEST]
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
    assert store.stored() == []


async def test_what_is_vetoed_is_not_kept(store: Store, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3)
    (adapter / CONFIG).write_text("{}")
    with pytest.raises(AdapterRefused) as caught:
        await supplied(store).import_path(adapter)
    assert caught.value.rule == "kind_is_lora"
    assert store.stored() == []
    assert files(tmp_path / "cache" / "incoming") == []


async def test_with_the_vetting_off_it_would_be_kept(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3)
    (adapter / CONFIG).write_text("{}")
    facts = vetting.Adapter(8, 8.0, 1, 1, "")
    monkeypatch.setattr(supply, "vet", lambda *_, **__: facts)
    await supplied(store).import_path(adapter)
    assert len(store.stored()) == 1


async def test_a_stored_adapter_must_fit_todays_base_model(store: Store, tmp_path: Path) -> None:
    got = await supplied(store).import_path(tiny.make_adapter(tmp_path / "mine", seed=3))
    other = Supply(store, ipfs_api=NOWHERE, gateways=[], base=ModelShape("other", {}))
    with pytest.raises(AdapterRefused, match="other has no module"):
        await other.obtain(got.cid)


async def test_one_that_nobody_has(store: Store) -> None:
    with pytest.raises(ContentNotFound, match=NOWHERE):
        await supplied(store).obtain(CID.of(RAW, b"nobody has this"))


async def test_two_spellings_of_a_cid_are_one_adapter(store: Store, tmp_path: Path) -> None:
    got = await supplied(store).import_path(tiny.make_adapter(tmp_path / "mine", seed=3))
    for base in ("base36", "base58btc", "base64url"):
        spelled = multibase.encode(base, bytes(got.cid)).decode()
        again = await supplied(store).obtain(IpfsPath.parse(f"ipfs://{spelled}/"))
        assert (again.path, again.fetched) == (got.path, False)


async def test_a_lone_file_that_is_no_adapter(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 300_000)
    pack(tmp_path / "file", tmp_path / "file.car")
    with pytest.raises(AdapterRefused, match="neither an archive nor safetensors"):
        await supplied(store).import_path(tmp_path / "file.car")
    assert store.stored() == []


async def test_lone_weights_are_an_adapter_with_a_note(store: Store, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3, rank=4)
    pack(adapter / WEIGHTS, tmp_path / "weights.car")
    got = await supplied(store).import_path(tmp_path / "weights.car")
    assert (got.facts.rank, got.facts.alpha) == (4, 4.0)
    assert "lora_alpha as large" in got.facts.notes[0]
    got.lease.release()
    again = await supplied(store).obtain(got.cid)
    assert again.facts.notes == got.facts.notes


async def test_lone_weights_may_carry_their_configuration(store: Store, tmp_path: Path) -> None:
    told = {"lora_adapter_metadata": json.dumps(tiny.config(rank=4) | {"lora_alpha": 32})}
    save_file(tiny.tensors(seed=1, rank=4), tmp_path / "x.safetensors", metadata=told)
    got = await supplied(store).import_path(tmp_path / "x.safetensors")
    assert (got.facts.rank, got.facts.alpha) == (4, 32.0)


def archived(adapter: Path, kind: str) -> Path:
    form = {"tar": "tar", "tar.gz": "gztar", "zip": "zip"}[kind]
    base = str(adapter.parent / "archive")
    return Path(shutil.make_archive(base, form, adapter.parent, adapter.name))


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
async def test_an_archive_is_unpacked(store: Store, tmp_path: Path, kind: str) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3)
    archive = archived(adapter, kind)
    got = await supplied(store).import_path(archive)
    assert got.cid == pack(archive, tmp_path / "archive.car")
    assert (got.path / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    (tmp_path / "folder").mkdir()
    shutil.move(archive, tmp_path / "folder")  # as `ipfs add -w` wraps a file
    wrapped = await supplied(store).import_path(tmp_path / "folder")
    assert wrapped.cid != got.cid
    store.synchronise()
    assert files(wrapped.path) == [CONFIG, WEIGHTS, MANIFEST]


async def test_an_archive_is_unpacked_under_the_same_limits(store: Store, tmp_path: Path) -> None:
    archive = archived(tiny.make_adapter(tmp_path / "mine", seed=3), "tar.gz")
    small = Supply(
        store, ipfs_api=NOWHERE, gateways=[], limits=Limits(bytes=archive.stat().st_size + 9)
    )
    with pytest.raises(ContentTooLarge):
        await small.import_path(archive)
    assert store.stored() == []


async def test_a_path_inside_a_cid(store: Store, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    adapter = tiny.make_adapter(outer / "a" / "b", seed=3)
    tiny.make_adapter(outer / "c", seed=4)
    published = gateway.packed(outer)
    cid = pack(adapter, tmp_path / "inner.car")
    server = gateway.Gateway(published)
    async with gateway.listening(server) as source:
        supply = Supply(store, ipfs_api=NOWHERE, gateways=[source.name])
        got = await supply.obtain(IpfsPath.parse(f"/ipfs/{published.root}/a/b"))
        assert got.cid == cid
        asked = len(server.asked)
        assert asked < len(published.blocks)  # the other adapter was not fetched
        for wrong, error in (("a/x", "no a/x in"), (f"c/{CONFIG}/d", "is a file")):
            with pytest.raises(BadDAG, match=error):
                await supply.obtain(IpfsPath.parse(f"{published.root}/{wrong}"))


async def test_where_a_path_leads_is_known_without_its_source(store: Store, tmp_path: Path) -> None:
    tiny.make_adapter(tmp_path / "outer" / "a", seed=3)
    tiny.make_adapter(tmp_path / "outer" / "b", seed=4)
    published = gateway.packed(tmp_path / "outer")
    wanted = [IpfsPath.parse(f"{published.root}/{name}") for name in "ab"]
    async with gateway.listening(gateway.Gateway(published)) as source:
        one = Supply(store, ipfs_api=NOWHERE, gateways=[source.name])
        got = await asyncio.gather(*map(one.obtain, wanted))
    for path, it in zip(wanted, got, strict=True):
        again = await supplied(store).obtain(path)
        assert (again.cid, again.fetched) == (it.cid, False)
        again.lease.release()
    got[0].lease.release()
    store.collect()
    store.drop_unused()
    assert store.paths.get(wanted[0]) == got[0].cid
    store.collect()
    assert store.paths.get(wanted[0]) is None
    assert store.paths.get(wanted[1]) == got[1].cid


@pytest.mark.parametrize("left", [b"", b"[]", b'{"CID/a": 1}', b'{"CID/a": "no"}', b"\xff"])
def test_what_became_of_the_known_paths_is_no_reason_to_fail(
    store: Store, left: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, path = store.directory / "paths.json", IpfsPath(CID.of(RAW, b"x"), ("a",))
    file.write_bytes(left.replace(b"CID", str(path.root).encode()))
    assert store.paths.get(path) is None
    store.paths.remember(path, path.root)
    assert store.paths.get(path) == path.root
    monkeypatch.setattr(paths, "_MOST", 3)
    for number in range(5):
        store.paths.remember(IpfsPath(path.root, (str(number),)), path.root)
    assert store.paths.get(path) is None
    assert store.paths.get(IpfsPath(path.root, ("4",))) == path.root

    def fails(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.replace", fails)
    store.paths.remember(path, path.root)
    assert store.paths.get(path) is None


@pytest.mark.parametrize("data", [b"", b"not a car at all"])
async def test_a_file_that_is_no_car(store: Store, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.car").write_bytes(data)
    with pytest.raises(BadCAR, match=r"x\.car"):
        await supplied(store).import_path(tmp_path / "x.car")


async def test_a_liar_is_left_alone_in_the_next_fetch_too(store: Store, tmp_path: Path) -> None:
    published = gateway.packed(tiny.make_adapter(tmp_path / "mine", seed=3))
    liar = gateway.Gateway(published, gateway.flip)
    async with gateway.listening(liar) as source:
        one = Supply(store, ipfs_api=NOWHERE, gateways=[source.name])
        with pytest.raises(BlockMismatch, match=source.name):
            await one.obtain(published.root)
        asked = len(liar.asked)
        with pytest.raises(ContentNotFound, match="left alone"):
            await one.obtain(published.root)
        assert len(liar.asked) == asked


def test_a_cache_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match="can't use the cache"):
        Store(tmp_path / "file")
