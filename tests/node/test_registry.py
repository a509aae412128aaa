"""Following the registry with a real host; over HTTP and with a real engine in test_hosting.py."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from r3mes_vllm.adapters.catalog import Catalog
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.errors import AdapterRefused, SourceFailed
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.node.registry import Registry
from r3mes_vllm.settings import load
from r3mes_vllm.wire import Lora
from tests.engine.test_life import A, B, C, D, World
from tests.programs import wait_until_async


class Paths:
    async def resolve(self, path: IpfsPath) -> CID:
        return path.root


class Listed(Registry):
    """Of what `now` says; it is looked at a hundred times a second."""

    def __init__(self, state: Path, **now: CID) -> None:
        super().__init__(load({"state_dir": state}), cast(Supply, Paths()), [])
        self._settings = self._settings.model_copy(update={"registry_refresh": 0.01})
        self.now = now

    async def _read(self, *, no_older_than_s: float) -> None:
        loras = [
            Lora(id=number, name=name, ipfs_hash=str(cid))
            for number, (name, cid) in enumerate(self.now.items())
        ]
        self._catalog = Catalog(self._settings.state_dir, loras)


@asynccontextmanager
async def following(registry: Registry, world: World) -> AsyncIterator[None]:
    task = asyncio.create_task(registry.follow(world.host))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await world.host.aclose()


@pytest.fixture
async def world() -> World:
    world = World(room=8)
    await world.host.put("a", A)
    await world.host.put("b", B)
    return world


async def test_a_version_that_comes_slowly_keeps_no_other_name_back(
    tmp_path: Path, world: World
) -> None:
    registry = Listed(tmp_path, a=C, b=B)
    world.network.slow[C] = asyncio.Event()
    async with following(registry, world):
        await wait_until_async(lambda: C in world.network.fetches, 2, "the slow one to begin")
        registry.now["b"] = D
        await wait_until_async(lambda: world.served["b"] == str(D), 2, "the other to switch")
        assert world.served["a"] == str(A)
        world.network.slow[C].set()
        await wait_until_async(lambda: world.served["a"] == str(C), 2, "the slow one to come")
    assert world.network.fetches == [A, B, C, D]


async def test_a_version_that_was_refused_is_not_fetched_at_every_look(
    tmp_path: Path, world: World
) -> None:
    world.network.broken[C] = AdapterRefused("finite", "it is full of NaN")
    async with following(Listed(tmp_path, a=C, b=B), world):
        await wait_until_async(lambda: C in world.network.fetches, 2, "the fetch")
        await asyncio.sleep(0.1)
    assert world.network.fetches == [A, B, C]


async def test_a_bad_cid_in_the_registry_is_not_the_clients_mistake(tmp_path: Path) -> None:
    registry = Listed(tmp_path)
    registry.now = {"a": cast(CID, "no-cid")}
    with pytest.raises(SourceFailed, match="the registry's adapter 'a'"):
        await registry.lookup("a")


async def test_what_the_operator_puts_is_not_overtaken(tmp_path: Path, world: World) -> None:
    registry = Listed(tmp_path, a=A, b=B)
    world.network.slow[C] = asyncio.Event()
    async with following(registry, world):
        put = asyncio.create_task(world.host.put("a", C))
        await wait_until_async(lambda: C in world.network.fetches, 2, "the put to begin")
        registry.now["a"] = D
        await asyncio.sleep(0.1)
        registry.fixed.add("a")  # as its route does when the put has ended
        world.network.slow[C].set()
        await put
        assert world.served["a"] == str(C)
    assert D not in world.network.fetches


async def test_what_it_puts_itself_the_operator_overtakes(tmp_path: Path, world: World) -> None:
    registry = Listed(tmp_path, a=C, b=B)
    world.network.slow[C] = asyncio.Event()
    async with following(registry, world):
        await wait_until_async(lambda: C in world.network.fetches, 2, "the switch to begin")
        await world.host.put("a", D)
        registry.fixed.add("a")
        world.network.slow[C].set()
        await wait_until_async(lambda: not registry._switching, 2, "the switch to end")
        assert world.served["a"] == str(D)
