"""The store: whole or not there, held while in use, bounded, shared, and checked."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from r3mes_vllm.adapters import manifest
from r3mes_vllm.adapters import store as storing
from r3mes_vllm.adapters.manifest import MANIFEST
from r3mes_vllm.adapters.store import Damaged, Lease, Store
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS
from r3mes_vllm.errors import StorageFull
from r3mes_vllm.ipfs.cid import CID, RAW
from tests.adapters import crashing

MIB = 1 << 20


def cid(number: int) -> CID:
    return CID.of(RAW, bytes([number]))


def put(store: Store, number: int, size: int = MIB) -> CID:
    """An adapter of `size` bytes."""

    async def run() -> None:
        async with store.incoming(cid(number)) as folder:
            files = folder / "files"
            files.mkdir()
            (files / CONFIG).write_text("{}")
            (files / WEIGHTS).write_bytes(os.urandom(size))
            (files / "evil.py").write_text("kept out")
            store.commit(cid(number), files, ["a note"]).release()

    asyncio.run(run())
    store.synchronise()
    return cid(number)


def used_long_ago(store: Store, tmp_path: Path, one: CID, seconds: float) -> None:
    at = time.time() - seconds
    os.utime(tmp_path / "locks" / str(one), (at, at))


def held(store: Store, one: CID) -> Lease:
    lease = store.lease(one)
    assert lease is not None
    return lease


def here(store: Store) -> set[CID]:
    return {it.cid for it in store.stored()}


def test_what_is_committed_is_listed_and_nothing_else_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = put(store, 1)
    (it,) = store.stored()
    assert (it.cid, it.in_use, it.notes) == (one, False, ("a note",))
    assert {path.name for path in it.path.iterdir()} == {CONFIG, WEIGHTS, MANIFEST}
    assert list((tmp_path / "incoming").iterdir()) == []
    with held(store, one) as lease:
        assert lease.path == it.path
        assert store.stored()[0].in_use
    assert not store.stored()[0].in_use


def test_the_least_recently_used_goes_first_and_what_is_leased_stays(tmp_path: Path) -> None:
    store = Store(tmp_path, quota=3 * MIB + 200_000)
    for number in (1, 2, 3):
        put(store, number)
        used_long_ago(store, tmp_path, cid(number), 1000 - number)
    held(store, cid(2)).release()  # used just now
    with held(store, cid(1)):
        put(store, 4)
        assert here(store) == {cid(1), cid(2), cid(4)}
    put(store, 5)
    assert cid(5) in here(store)
    assert len(here(store)) == 3


def test_with_the_lease_off_what_is_in_use_would_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, quota=MIB + 200_000)
    put(store, 1)
    monkeypatch.setattr(storing, "_try_lock", lambda fd: True)
    with held(store, cid(1)):
        put(store, 2)
        assert here(store) == {cid(2)}


def test_what_does_not_fit_beside_what_is_in_use_is_a_clear_error(tmp_path: Path) -> None:
    store = Store(tmp_path, quota=2 * MIB)
    put(store, 1)
    with held(store, cid(1)), pytest.raises(StorageFull, match="do not fit") as caught:
        put(store, 2)
    assert "--cache-size" in caught.value.hint
    assert here(store) == {cid(1)}


def test_a_lease_holds_against_another_process_and_ends_with_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, 1)
    script = (
        "import sys; from pathlib import Path; from r3mes_vllm.adapters.store import Store; "
        "from r3mes_vllm.ipfs.cid import CID; "
        "lease = Store(Path(sys.argv[1])).lease(CID.parse(sys.argv[2])); "
        "print(lease is not None, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), str(cid(1))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout
    assert other.stdout.readline() == "True\n"
    assert store.drop_unused() == 0
    assert here(store) == {cid(1)}
    other.kill()
    other.wait()
    assert store.drop_unused() > MIB
    assert here(store) == set()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_a_flipped_bit_is_found_and_dropped(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    put(store, 1)
    put(store, 2)
    flip(tmp_path / "adapters" / str(cid(1)) / name)
    found = list(store.fsck())
    (damaged,) = [it for it in found if isinstance(it, Damaged)]
    assert (damaged.cid, damaged.dropped) == (cid(1), True)
    assert here(store) == {cid(2)}
    assert not any(isinstance(it, Damaged) for it in store.fsck())


def test_what_is_damaged_and_in_use_is_said_and_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, 1)
    with held(store, cid(1)) as lease:
        (lease.path / CONFIG).write_text("[]")
        (damaged,) = store.fsck()
        assert isinstance(damaged, Damaged)
        assert not damaged.dropped
        assert lease.path.is_dir()


def test_an_adapter_that_was_cut_short_is_not_served_but_fetched_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, 1)
    weights = tmp_path / "adapters" / str(cid(1)) / WEIGHTS
    os.truncate(weights, 100)
    assert store.lease(cid(1)) is None
    put(store, 1)
    held(store, cid(1)).release()


def test_an_unfinished_fetch_is_no_adapter_and_goes_when_room_is_needed(tmp_path: Path) -> None:
    store = Store(tmp_path, quota=2 * MIB)
    left = tmp_path / "incoming" / str(cid(1)) / "files"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_bytes(os.urandom(MIB))
    (tmp_path / "incoming" / str(cid(1)) / "commit").mkdir()
    assert store.lease(cid(1)) is None
    assert store.stored() == []
    put(store, 2, size=MIB + MIB // 2)
    assert here(store) == {cid(2)}
    assert not left.exists()


@pytest.mark.parametrize("came", [b"", b"a block"])
async def test_a_fetch_that_got_nothing_leaves_nothing(tmp_path: Path, came: bytes) -> None:
    """Who may ask for any CID could fill a disk with files of none."""
    store = Store(tmp_path)
    async with store.incoming(cid(1)) as folder:
        (folder / "files").mkdir()
        (folder / "files" / "part").write_bytes(came)
    assert [it.name for it in (tmp_path / "incoming").iterdir()] == [str(cid(1))] * bool(came)
    assert len(list((tmp_path / "locks").iterdir())) == bool(came)


async def test_who_opened_a_lock_that_is_removed_meanwhile_takes_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, opened, lock = Store(tmp_path), Store._open_lock, tmp_path / "locks" / f"{cid(1)}.fetch"

    def removed_once(store: Store, name: Any) -> int:
        fd = opened(store, name)
        monkeypatch.undo()
        lock.unlink()
        return fd

    monkeypatch.setattr(Store, "_open_lock", removed_once)
    async with store.incoming(cid(1)):
        with store._locked(lock.name) as mine:
            assert not mine, "two would fetch into one folder"


def test_what_a_crash_left_is_collected_after_a_day(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name, age in ((".scratch-old", 90_000), (".gone-new", 5)):
        left = tmp_path / "incoming" / name
        left.mkdir()
        (left / "x").write_bytes(b"x" * MIB)
        os.utime(left, (time.time() - age,) * 2)
    assert store.collect() >= MIB
    assert [path.name for path in (tmp_path / "incoming").iterdir()] == [".gone-new"]


def test_strangers_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "adapters" / "notes").mkdir()
    put(store, 1)
    assert here(store) == {cid(1)}
    store.drop_unused()
    assert (tmp_path / "adapters" / "notes").is_dir()


def after_a_power_cut(tmp_path: Path, one: CID) -> Path:
    """The adapter's manifest, as it is when the disk was not waited for in an earlier boot."""
    path = tmp_path / "adapters" / str(one) / MANIFEST
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, manifest._BOOT: "an earlier one"}))
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def is_on_disk(path: Path) -> bool:
    told = manifest.read(path.parent)
    return told is not None and manifest.is_on_disk(told)


def test_a_commit_is_written_through_to_the_disk_before_that_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    one = put(Store(tmp_path), 1)
    assert synced == [CONFIG, WEIGHTS, str(one), "adapters", f".{MANIFEST}", str(one)]
    assert is_on_disk(tmp_path / "adapters" / str(one) / MANIFEST)


def test_what_a_power_cut_left_whole_is_served(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = after_a_power_cut(tmp_path, put(store, 1))
    held(store, cid(1)).release()
    store.synchronise()
    assert is_on_disk(path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_a_power_cut_damaged_is_dropped_and_fetched_again(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    flip(after_a_power_cut(tmp_path, put(store, 1)).with_name(name))
    assert store.lease(cid(1)) is None
    assert here(store) == set()
    put(store, 1)
    held(store, cid(1)).release()


def test_with_the_check_off_what_a_power_cut_damaged_would_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "power_went", lambda told: False)
    store = Store(tmp_path)
    flip(after_a_power_cut(tmp_path, put(store, 1)).with_name(WEIGHTS))
    held(store, cid(1)).release()


def test_another_process_finishes_what_one_was_killed_at(tmp_path: Path) -> None:
    script = (
        "import os, sys, time; from pathlib import Path; "
        "from r3mes_vllm.adapters import manifest; from tests.adapters import test_store; "
        "manifest.synchronise = lambda adapter: (print('here', flush=True), time.sleep(3600)); "
        "store = test_store.Store(Path(sys.argv[1])); "
        "store.synchronise = lambda: None; test_store.put(store, 1)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout
    assert other.stdout.readline() == "here\n"
    other.kill()
    other.wait()
    path = tmp_path / "adapters" / str(cid(1)) / MANIFEST
    assert not is_on_disk(path)
    store = Store(tmp_path)
    held(store, cid(1)).release()
    store.synchronise()
    assert is_on_disk(path)


def test_a_disk_that_does_not_take_it_has_it_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    store = Store(tmp_path)
    put(store, 1)
    assert here(store) == set()


def crashed(folder: Path, kills: int, *options: str, status: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.adapters.crashing", str(folder), str(kills), "1"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert run.returncode == status, run.stderr
    return dict(json.loads(run.stdout))


def test_kill_9_at_a_hundred_instants_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    found = crashed(tmp_path, 100)
    assert found["wrong"] == []
    assert found["killed"] == 100
    assert found["resumed"] > 10


def test_with_adapters_written_in_place_kill_9_leaves_half_of_one(tmp_path: Path) -> None:
    assert crashed(tmp_path, 20, "--unsafe", status=1)["wrong"]


@pytest.mark.parametrize(
    ("killed", "resumed", "wrong", "said"),
    [
        (100, 40, [], ""),
        (100, 40, ["half of one", "half of one"], "2 times wrong: half of one"),
        (99, 40, [], "99 were killed, of 100"),
        (100, 5, [], "killed too early"),
    ],
)
def test_kills_are_good_only_if_they_have_shown_something(
    killed: int,
    resumed: int,
    wrong: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"killed": killed, "ended": 7, "resumed": resumed}
    assert said in " ".join(crashing.problems(found, wrong, 100))
    monkeypatch.setattr(crashing, "run", lambda *_: (found, wrong))
    assert crashing.main(tmp_path, 100, seed=1) == int(bool(said))


def test_no_kills_show_nothing() -> None:
    assert crashing.problems({"killed": 0, "ended": 0, "resumed": 0}, [], 0)
