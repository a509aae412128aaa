"""Links in a folder of the operator's own, such as all files of a model hub's cache are."""

import os
import socket
from pathlib import Path

import pytest

from r3mes_vllm.adapters.inspection import inspect
from r3mes_vllm.adapters.manifest import FILES
from r3mes_vllm.adapters.publish import publish
from r3mes_vllm.adapters.store import Store
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS, vet
from r3mes_vllm.errors import AdapterError, AdapterRefused
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.pack import pack
from tests import tiny
from tests.adapters.test_supply import supplied


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tiny.make_adapter(tmp_path / "mine", seed=3)
    (folder / "README.md").write_text("of it")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{x}}"}')
    return folder


def snapshot_of(adapter: Path) -> Path:
    """As huggingface_hub keeps it."""
    snapshot = adapter.with_name("models--me--mine") / "snapshots" / "abc123"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(adapter.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


async def same_everywhere(folder: Path, cid: CID) -> None:
    """It is inspected, published and served as `cid`."""
    found = inspect(folder, base=None, max_rank=8, follow_links=True)
    assert found.accepted
    assert "chat template" in found.notes[-1]
    assert (await publish(folder, api=None))[0] == cid
    got = await supplied(Store(folder.with_name("cache"))).import_path(folder)
    assert got.cid == cid
    assert all((got.path / name).is_file() for name in FILES)
    assert not any((got.path / name).is_symlink() for name in FILES)


async def test_a_snapshot_in_a_hub_cache_is_what_its_files_are(
    adapter: Path, tmp_path: Path
) -> None:
    await same_everywhere(snapshot_of(adapter), pack(adapter, tmp_path / "x.car"))


async def test_a_link_to_a_folder_is_that_folder(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(adapter)
    await same_everywhere(tmp_path / "current", pack(adapter, tmp_path / "x.car"))


async def test_the_served_files_may_lie_anywhere_and_others_in_the_folder(
    adapter: Path, tmp_path: Path
) -> None:
    cid = pack(adapter, tmp_path / "x.car")
    for name in FILES:
        (adapter / name).rename(tmp_path / f"checkpoint-{name}")
        (adapter / name).symlink_to(tmp_path / f"checkpoint-{name}")
    (adapter / "README.md").rename(adapter / ".readme")
    (adapter / "README.md").symlink_to(".readme")
    await same_everywhere(adapter, cid)


def test_a_link_that_would_publish_what_lies_elsewhere_is_refused(
    adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("key")
    (adapter / "README.md").unlink()
    (adapter / "README.md").symlink_to("../secret")
    with pytest.raises(AdapterError, match=r"link to .*secret, outside of"):
        pack(adapter, tmp_path / "x.car", linked=FILES)
    assert not (tmp_path / "x.car").exists()


@pytest.mark.parametrize("target", ["fifo", "socket", "/dev/zero", "folder", ".", "loop", "gone"])
@pytest.mark.parametrize("name", ["more", CONFIG, WEIGHTS])
def test_a_link_that_leads_to_no_file_is_refused(
    adapter: Path, tmp_path: Path, name: str, target: str
) -> None:
    os.mkfifo(adapter / "fifo")
    (adapter / "folder").mkdir()
    (adapter / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as it:
        it.bind(str(adapter / "socket"))
        (adapter / name).unlink(missing_ok=True)
        (adapter / name).symlink_to(target)
        for beside in {"fifo", "socket", "loop"} - {target}:
            (adapter / beside).unlink()
        with pytest.raises(AdapterError):
            pack(adapter, tmp_path / "x.car", linked=FILES)
        if name in FILES:
            with pytest.raises(AdapterRefused) as caught:
                vet(adapter, follow_links=True)
            assert caught.value.rule == "files_are_there"


def test_a_link_in_what_was_fetched_is_refused(adapter: Path) -> None:
    with pytest.raises(AdapterRefused, match="not a regular file"):
        vet(snapshot_of(adapter))
