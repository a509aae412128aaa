"""A power cut as a disk sees it: what the kernel had not written yet is lost."""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from r3mes_vllm.adapters import manifest
from r3mes_vllm.adapters.manifest import MANIFEST
from r3mes_vllm.adapters.store import Store
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import WEIGHTS
from r3mes_vllm.ipfs.cid import CID
from tests import tiny
from tests.adapters.mounts import image
from tests.peers import gateway


def written(path: Path) -> None:
    """The kernel chose to write this one first."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


async def fetched(cache: Path, source: str, cid: CID) -> None:
    store = Store(cache)
    supply = Supply(store, ipfs_api="http://127.0.0.1:9", gateways=[source])
    (await supply.obtain(cid)).lease.release()
    store.synchronise()


@pytest.fixture
async def after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Path, gateway.Published, str]]:
    """The disk after the cut, where the adapter has its name, its manifest and its sizes, but not
    its weights; and who has it."""
    published = gateway.packed(tiny.make_adapter(tmp_path / "mine", seed=3, rank=64))
    before, then = tmp_path / "before.img", tmp_path / "then.img"
    with before.open("wb") as file:
        file.truncate(32 << 20)
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 is not here")
    subprocess.run(["mkfs.ext4", "-q", str(before)], check=True)
    async with gateway.listening(gateway.Gateway(published)) as source:
        with monkeypatch.context() as patched, image(before, tmp_path / "before") as disk:
            patched.setattr(manifest, "synchronise", lambda adapter: None)
            await fetched(disk, source.name, published.root)
            adapter = disk / "adapters" / str(published.root)
            written(adapter / MANIFEST)
            written(adapter)
            written(adapter.parent)
            shutil.copyfile(before, then)
        with image(then, tmp_path / "then") as disk:
            adapter = disk / "adapters" / str(published.root)
            size = (published.folder / WEIGHTS).stat().st_size
            assert (adapter / WEIGHTS).stat().st_size == size
            assert (adapter / WEIGHTS).read_bytes() == bytes(size), "it was not lost"
            yield disk, published, source.name


async def test_what_was_lost_is_not_served_but_fetched_again(
    after: tuple[Path, gateway.Published, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, published, source = after
    monkeypatch.setattr(manifest, "boot_id", lambda: "another boot")
    store = Store(disk)
    assert store.lease(published.root) is None
    assert store.stored() == []
    await fetched(disk, source, published.root)
    (it,) = store.stored()
    assert (it.path / WEIGHTS).read_bytes() == (published.folder / WEIGHTS).read_bytes()


async def test_without_the_boot_in_its_manifest_it_would_be_served(
    after: tuple[Path, gateway.Published, str],
) -> None:
    """The store can't tell: this is the boot that the manifest names."""
    disk, published, _ = after
    store = Store(disk)
    lease = store.lease(published.root)
    assert lease is not None
    lease.release()
    store.synchronise()
