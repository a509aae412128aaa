"""A store that can't be written: what is in it is verified and served, all else is said."""

import asyncio
import errno
import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from r3mes_vllm.adapters import manifest
from r3mes_vllm.adapters.store import Store
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import WEIGHTS
from r3mes_vllm.errors import AdapterError, DiskFull
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.pack import pack
from r3mes_vllm.node.adapters import obtain_all
from r3mes_vllm.node.doctor import checks_adapters, checks_local
from tests import tiny
from tests.adapters.mounts import read_only
from tests.adapters.test_store import after_a_power_cut, cid, flip, held, here, is_on_disk, put
from tests.cli.test_adapter import adapter_command, told
from tests.doctor.given import settings as settings_of
from tests.in_store import put_in_store

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tiny.make_adapter(tmp_path / "mine", seed=5)


@pytest.fixture
async def stored(tmp_path: Path, adapter: Path) -> CID:
    """Of `adapter`, which is in the store at `tmp_path / "cache"`."""
    return CID.parse(await put_in_store(tmp_path / "cache", adapter))


@pytest.fixture
def cache(tmp_path: Path, stored: CID) -> Iterator[Path]:
    """The same, where nothing can be written."""
    with read_only(tmp_path / "cache", tmp_path / "cache") as view:
        yield view


def supplied(cache: Path) -> Supply:
    return Supply(Store(cache), ipfs_api=NOWHERE, gateways=[])


def left(cache: Path) -> dict[str, float]:
    """What is in it, and when that was written last."""
    return {str(path): path.lstat().st_mtime for path in cache.rglob("*")}


async def test_what_is_in_it_is_served_and_nothing_is_touched(
    cache: Path, stored: CID, adapter: Path
) -> None:
    before = left(cache)
    got = await supplied(cache).obtain(stored)
    assert (got.cid, got.fetched) == (stored, False)
    assert (got.path / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert Store(cache).stored()[0].in_use
    got.lease.release()
    by_path = await supplied(cache).import_path(adapter)
    assert (by_path.cid, by_path.fetched) == (stored, False)
    by_path.lease.release()
    assert left(cache) == before


async def test_who_can_write_it_does_not_remove_what_is_served_from_it(
    tmp_path: Path, stored: CID
) -> None:
    with read_only(tmp_path / "cache", tmp_path / "view") as view:
        got = await supplied(view).obtain(stored)
        owner = Store(tmp_path / "cache")
        assert owner.drop_unused() == 0
        got.lease.release()
        assert owner.drop_unused() > 0
        assert Store(view).lease(stored) is None


@pytest.mark.parametrize("lied", [False, True])
def test_what_a_power_cut_damaged_is_not_served_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lied: bool
) -> None:
    """It is hashed as everywhere; `lied`: with the check off it would be served."""
    weights = after_a_power_cut(tmp_path, put(Store(tmp_path), 1)).with_name(WEIGHTS)
    flip(weights)
    if lied:
        monkeypatch.setattr(manifest, "power_went", lambda told: False)
    with read_only(tmp_path, tmp_path) as view:
        store = Store(view)
        if lied:
            held(store, cid(1)).release()
            store.synchronise()
            return
        for look in (store.lease, lambda one: list(store.fsck(one))):
            with pytest.raises(AdapterError, match=rf"{cid(1)} is damaged: {WEIGHTS} is not what"):
                look(cid(1))
        assert weights.exists()


async def test_what_is_not_in_it_is_one_adapter_left_out(
    cache: Path, stored: CID, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = pack(tiny.make_adapter(tmp_path / "other", seed=6), tmp_path / "other.car")
    given = settings_of(
        tmp_path,
        loras=[f"gone={other}", f"file={tmp_path / 'other.car'}", f"here={stored}"],
        ipfs_api_url=NOWHERE,
    )
    named = await obtain_all(given, Supply.of(given))
    assert [(it.name, it.adapter.cid) for it in named] == [("here", stored)]
    named[0].adapter.lease.release()
    said = capfd.readouterr().err
    for name in ("gone", "file"):
        assert f"adapter '{name}' is left out: the cache {cache} is read-only: nothing can" in said
    assert "point --cache-dir elsewhere" in said


async def test_the_commands_say_it(cache: Path, stored: CID, tmp_path: Path) -> None:
    """In a line, with what to do next."""
    listed = adapter_command(tmp_path, "list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert [it["cid"] for it in told(listed)] == [str(stored)]
    pulled = adapter_command(tmp_path, "pull", str(stored), "--json")
    assert (pulled.returncode, told(pulled)["fetched"]) == (0, False)
    assert adapter_command(tmp_path, "verify").returncode == 0
    for command in (["pull", str(cid(9))], ["gc", "--all"]):
        found = adapter_command(tmp_path, *command)
        assert found.returncode == 1
        assert f"error: the cache {cache} is read-only" in found.stderr
        assert "try: " in found.stderr


async def test_doctor_says_it(cache: Path, stored: CID, tmp_path: Path) -> None:
    given = settings_of(tmp_path, loras=[f"here={stored}"], ipfs_api_url=NOWHERE)
    found = checks_local.directories(given)
    assert (found.status, str(cache) in found.message) == ("fail", True)
    assert (await checks_adapters.retrievable(given)).status == "ok"
    gone = settings_of(tmp_path, loras=[f"gone={cid(9)}"], ipfs_api_url=NOWHERE)
    assert (await checks_adapters.retrievable(gone)).status == "fail"


def as_nobody(work: Callable[[], object]) -> object:
    """What `work` gives, or the error it raises as text, in a process of a user who owns nothing.

    It forks, since that user may not even read this Python.
    """
    if os.getuid():
        pytest.skip("only root can become another user")
    heard, tell = os.pipe()
    if not (child := os.fork()):
        try:
            said = become_nobody() and work()
        except AdapterError as error:
            said = [str(error), error.hint]
        except BaseException:  # noqa: BLE001 - it must not come back as a second parent
            said = traceback.format_exc()
        os.write(tell, json.dumps(said).encode())
        os._exit(0)
    os.close(tell)
    with open(heard) as answer:
        said = json.loads(answer.read())
    os.waitpid(child, 0)
    if said is False:
        pytest.skip("this root may not become another user")
    return said


def become_nobody() -> bool:
    try:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    except PermissionError:
        return False
    return True


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that others can look into, unlike `tmp_path`."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_another_users_store_is_served_from(common: Path) -> None:
    (common / "incoming").mkdir()
    (common / "incoming" / str(cid(1))).mkdir()
    Store(common).drop_unused()  # which makes its lock before it comes
    put(Store(common), 1)

    def work() -> object:
        store = Store(common)
        with held(store, cid(1)) as lease:
            whole = not manifest.problem(lease.path)
        return [whole, [str(it.cid) for it in store.stored()], store.lease(cid(2)) is None]

    assert as_nobody(work) == [True, [str(cid(1))], True]
    assert here(Store(common)) == {cid(1)}


def test_another_users_store_takes_nothing_and_says_so(common: Path) -> None:
    put(Store(common), 1)

    def fetch() -> object:
        async def run() -> None:
            async with Store(common).incoming(cid(2)):
                pass

        return asyncio.run(run())

    for work in (fetch, lambda: Store(common).drop_unused()):
        said = as_nobody(work)
        assert isinstance(said, list), said
        message, hint = said
        assert f"this user may not use the cache {common}: {common}/" in message
        assert "Permission denied" in message
        assert "point --cache-dir elsewhere" in hint
    assert here(Store(common)) == {cid(1)}


def test_a_store_that_another_user_keeps_to_himself(common: Path) -> None:
    put(Store(common), 1)
    for folder in common.iterdir():
        folder.chmod(0o700)

    def work() -> object:
        store = Store(common)
        assert store.lease(cid(1)) is None
        return list(map(str, store.stored()))

    said = as_nobody(work)
    assert isinstance(said, list), said
    assert f"this user may not use the cache {common}: {common}/adapters" in said[0]


@pytest.mark.parametrize(
    ("number", "kind", "says"),
    [
        (errno.EIO, AdapterError, "can't use the cache .*Input/output error"),
        (errno.EDQUOT, DiskFull, "no room left in"),
        (errno.EPERM, AdapterError, "may not use the cache"),
    ],
)
async def test_a_disk_that_fails_is_one_adapter_left_out(
    tmp_path: Path,
    stored: CID,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
    kind: type[Exception],
    says: str,
) -> None:
    other = pack(tiny.make_adapter(tmp_path / "other", seed=6), tmp_path / "other.car")
    real = os.open

    def opened(path: str | Path, flags: int, *mode: int, **named: int) -> int:
        if str(other) in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *mode, **named)

    monkeypatch.setattr(os, "open", opened)
    given = settings_of(tmp_path, loras=[f"bad={other}", f"here={stored}"], ipfs_api_url=NOWHERE)
    supply = Supply.of(given)
    with pytest.raises(kind, match=says):
        await supply.obtain(other)
    named = await obtain_all(given, supply)
    assert [it.name for it in named] == ["here"]
    assert "adapter 'bad' is left out" in capfd.readouterr().err


def test_a_disk_that_fails_and_then_may_only_be_read_is_not_trusted_in_another_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ext4 does; pytest fails for a thread that ends with an error."""

    def fails(fd: int) -> None:
        monkeypatch.setattr(os, "rename", refuses)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def refuses(source: Path, target: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source))

    monkeypatch.setattr(os, "fsync", fails)
    store = Store(tmp_path)
    put(store, 1)
    monkeypatch.undo()
    adapter = tmp_path / "adapters" / str(cid(1))
    assert not is_on_disk(adapter / manifest.MANIFEST)
    flip(adapter / WEIGHTS)
    monkeypatch.setattr(manifest, "boot_id", lambda: "another boot")
    assert store.lease(cid(1)) is None


async def test_an_operators_file_that_can_not_be_read_is_one_adapter_left_out(
    tmp_path: Path,
    stored: CID,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine.tar").write_bytes(b"x")
    real = Path.open

    def opened(path: Path, *how: object, **named: object) -> object:
        if path.name == "mine.tar":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *how, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opened)
    given = settings_of(tmp_path, loras=[f"bad={tmp_path / 'mine.tar'}", f"here={stored}"])
    named = await obtain_all(given, Supply.of(given))
    assert [it.name for it in named] == ["here"]
    said = capfd.readouterr().err
    assert f"adapter 'bad' is left out: Permission denied: {tmp_path}/mine.tar" in said
