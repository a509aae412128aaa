"""Pins on the daemon hold up nobody who wants the adapter."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from r3mes_vllm.adapters.store import Store
from r3mes_vllm.adapters.supply import Obtained, Supply
from r3mes_vllm.errors import AdapterError
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.tree import Limits
from tests import tiny
from tests.adapters.test_flights import until
from tests.adapters.test_supply import NOWHERE, supplied
from tests.peers.js_ipfs import JsIpfs


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


async def imported(store: Store, tmp_path: Path) -> Obtained:
    return await supplied(store).import_path(tiny.make_adapter(tmp_path / "mine", seed=3))


async def test_what_is_fetched_is_pinned_meanwhile(
    store: Store, js_ipfs: JsIpfs, tmp_path: Path
) -> None:
    cid = CID.parse(js_ipfs.add(tiny.make_adapter(tmp_path / "mine", seed=70)))
    assert str(cid) not in js_ipfs.pins()
    one = Supply(store, ipfs_api=js_ipfs.api, gateways=[], pin=True)
    await one.obtain(cid)
    await one.pins.wait()
    assert str(cid) in js_ipfs.pins()


async def test_what_is_here_already_is_pinned_too(
    store: Store, js_ipfs: JsIpfs, tmp_path: Path
) -> None:
    cid = CID.parse(js_ipfs.add(tiny.make_adapter(tmp_path / "mine", seed=8)))
    await supplied(store, js_ipfs.api).obtain(cid)
    assert str(cid) not in js_ipfs.pins()
    one = Supply(store, ipfs_api=js_ipfs.api, gateways=[], pin=True)
    await one.obtain(cid)
    await one.pins.wait()
    assert str(cid) in js_ipfs.pins()


class SlowDaemon:
    """Holds nothing, and answers `pin/add` when it may."""

    def __init__(self) -> None:
        self.may_pin = asyncio.Event()
        self.asked = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            if "/pin/add?arg=" not in head:
                writer.write(b"HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n")
                return
            self.asked += 1
            await self.may_pin.wait()
            body = json.dumps({"Pins": [head.partition("arg=")[2].partition("&")[0]]})
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            self.may_pin.set()
            server.close()


async def test_an_adapter_does_not_wait_for_a_daemon_that_pins_for_longer_than_it_may_stall(
    store: Store, tmp_path: Path
) -> None:
    root = (await imported(store, tmp_path)).cid
    daemon = SlowDaemon()
    async with daemon.listening() as api:
        limits = Limits(stall_s=0.3, total_s=30)
        one = Supply(store, ipfs_api=api, gateways=[], pin=True, limits=limits)
        for _ in range(2):
            await one.obtain(root)
        await until(lambda: daemon.asked == 1)
        asyncio.get_running_loop().call_later(1, daemon.may_pin.set)
        await one.pins.pin(root)  # raises nothing
        await one.pins.wait()
        await one.obtain(root)
        assert daemon.asked == 2, "it was begun once, and asked for once more"


async def test_pins_under_way_end_with_their_owner(store: Store, tmp_path: Path) -> None:
    root = (await imported(store, tmp_path)).cid
    daemon = SlowDaemon()
    async with daemon.listening() as api:
        one = Supply(store, ipfs_api=api, gateways=[], pin=True)
        await one.obtain(root)
        await until(lambda: daemon.asked == 1)
        async with asyncio.timeout(5):
            await one.pins.aclose()
            await one.pins.wait()


async def test_a_pin_that_failed_is_a_warning_and_tried_again(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = (await imported(store, tmp_path)).cid
    one = Supply(store, ipfs_api=NOWHERE, gateways=[], pin=True)
    for _ in range(2):
        (await one.obtain(root)).lease.release()
        await one.pins.wait()
        assert "is here, but is not pinned" in capsys.readouterr().err
    with pytest.raises(AdapterError, match="is here, but is not pinned"):
        await one.pins.pin(root)
