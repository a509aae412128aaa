"""Against js-ipfs: it publishes, we fetch; we pack, it gives the same CID."""

from pathlib import Path

import pytest

from r3mes_vllm.errors import ContentNotFound
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.fetch import fetch
from r3mes_vllm.ipfs.pack import CHUNK, pack
from r3mes_vllm.ipfs.sources import KuboSource
from r3mes_vllm.ipfs.tree import Limits
from tests.peers.js_ipfs import JsIpfs


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
    for path in folder.rglob("*"):
        here = into / path.relative_to(folder)
        assert here.is_dir() if path.is_dir() else here.read_bytes() == path.read_bytes()
    assert len(list(into.rglob("*"))) == len(list(folder.rglob("*")))


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
