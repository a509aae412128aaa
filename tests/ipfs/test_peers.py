"""Against js-ipfs, Helia and Kubo's own code: they publish, we fetch; we pack, they read it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from r3mes_vllm.errors import ContentNotFound
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.fetch import fetch, resolve
from r3mes_vllm.ipfs.pack import CHUNK, pack
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.ipfs.sources import BlocksSource, GatewaySource, KuboSource
from r3mes_vllm.ipfs.tree import Limits
from tests.peers.helia import Helia
from tests.peers.js_ipfs import JsIpfs
from tests.peers.libkubo import LibKubo


def same(one: Path, other: Path) -> bool:
    here = {path.relative_to(one) for path in one.rglob("*")}
    there = {path.relative_to(other) for path in other.rglob("*")}
    return here == there and all(
        (one / path).read_bytes() == (other / path).read_bytes()
        for path in here
        if (one / path).is_file()
    )


@pytest.fixture(scope="module")
def kubo_node(libkubo: Callable[[], LibKubo]) -> LibKubo:
    return libkubo()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "empty").write_bytes(b"")
    (folder / "small.txt").write_bytes(b"hello\n")
    (folder / "exact").write_bytes(b"x" * CHUNK)
    (folder / "a" / "Größe ☃.bin").write_bytes(bytes(range(256)) * 4096)
    # more leaves than one node links to
    (folder / "a" / "b" / "deep").write_bytes(
        b"".join(i.to_bytes(4, "big") * (CHUNK // 4) for i in range(176)) + b"end"
    )
    return folder


def test_pack_gives_the_cid_that_js_ipfs_gives(
    folder: Path, js_ipfs: JsIpfs, tmp_path: Path
) -> None:
    (folder / ".hidden").write_bytes(b"left out, as `ipfs add -r` does")
    packed = pack(folder, tmp_path / "folder.car")
    (folder / ".hidden").unlink()
    assert str(packed) == js_ipfs.add(folder)


async def test_fetch_from_the_daemon(folder: Path, js_ipfs: JsIpfs, tmp_path: Path) -> None:
    cid = CID.parse(js_ipfs.add(folder))
    into = await fetch(cid, tmp_path / "fetch", sources=[KuboSource(js_ipfs.api)])
    assert same(folder, into)


async def test_a_missing_cid_is_not_found_though_the_daemon_says_200(
    js_ipfs: JsIpfs, tmp_path: Path
) -> None:
    cid = CID.of(0x55, b"nobody has this")
    with pytest.raises(ContentNotFound, match=str(cid)) as caught:
        await fetch(
            cid,
            tmp_path / "fetch",
            sources=[KuboSource(js_ipfs.api)],
            limits=Limits(stall_s=2),
        )
    assert "publisher online" in caught.value.hint


async def test_fetch_from_helias_gateway(folder: Path, helia: Helia, tmp_path: Path) -> None:
    cid = pack(folder, tmp_path / "folder.car")
    helia.import_car(tmp_path / "folder.car")
    into = await fetch(cid, tmp_path / "fetch", sources=[GatewaySource(helia.url)])
    assert same(folder, into)


async def test_a_directory_that_helia_spread_over_shards(helia: Helia, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number} ü.txt").write_text(str(number))
    cid = CID.parse(helia.add(folder, shardSplitThresholdBytes=1))
    source = GatewaySource(helia.url)
    into = await fetch(cid, tmp_path / "fetch", sources=[source])
    assert same(folder, into)
    inner = await resolve(IpfsPath(cid, ("123 ü.txt",)), tmp_path / "resolve", sources=[source])
    got = await fetch(inner, tmp_path / "inner", sources=[source])
    assert got.read_text() == "123"


async def test_a_cid_that_helia_does_not_have_is_not_found(helia: Helia, tmp_path: Path) -> None:
    cid = CID.of(0x55, b"nobody has this")
    with pytest.raises(ContentNotFound, match=str(cid)):
        await fetch(
            cid,
            tmp_path / "fetch",
            sources=[GatewaySource(helia.url)],
            limits=Limits(stall_s=3, total_s=20),
        )


async def test_a_repository_is_read_while_its_daemon_sleeps(
    folder: Path, js_ipfs: JsIpfs, tmp_path: Path
) -> None:
    cid = CID.parse(js_ipfs.add(folder))
    into = await fetch(cid, tmp_path / "fetch", sources=[BlocksSource(js_ipfs.blocks)])
    assert same(folder, into)


async def test_from_kubo_over_bitswap_to_our_daemon_to_us(
    folder: Path, libkubo: Callable[[], LibKubo], js_ipfs: JsIpfs, tmp_path: Path
) -> None:
    """Kubo gives CIDs of version 0 and leaves that are not raw."""
    publisher = libkubo()
    cid = publisher.add(folder)
    assert cid.startswith("Qm")
    js_ipfs.connect(publisher.address)
    into = await fetch(CID.parse(cid), tmp_path / "fetch", sources=[KuboSource(js_ipfs.api)])
    assert same(folder, into)


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 174 * CHUNK + 1])
async def test_kubos_trees_of_any_height_are_read(
    size: int, kubo_node: LibKubo, js_ipfs: JsIpfs, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(os.urandom(size))
    cid = CID.parse(kubo_node.add(tmp_path / "file"))
    js_ipfs.connect(kubo_node.address)
    into = await fetch(cid, tmp_path / "fetch", sources=[KuboSource(js_ipfs.api)])
    assert into.read_bytes() == (tmp_path / "file").read_bytes()


def test_kubo_reads_what_we_pack(
    folder: Path, kubo_node: LibKubo, js_ipfs: JsIpfs, tmp_path: Path
) -> None:
    cid = pack(folder, tmp_path / "folder.car")
    js_ipfs.import_car(tmp_path / "folder.car")
    js_ipfs.connect(kubo_node.address)
    kubo_node.get(str(cid), tmp_path / "got")
    assert same(folder, tmp_path / "got")


def test_two_nodes_of_kubo_exchange_an_adapter_once(
    folder: Path, libkubo: Callable[[], LibKubo], kubo_node: LibKubo, tmp_path: Path
) -> None:
    other = libkubo()
    cid = other.add(folder)
    kubo_node.connect(other.address)
    kubo_node.get(cid, tmp_path / "got")
    assert same(folder, tmp_path / "got")
