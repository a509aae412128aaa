"""An adapter's life on the engine, in every order; on a real engine it is in tests/node."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r3mes_vllm.engine.host import Host
from r3mes_vllm.engine.version import State, Version
from r3mes_vllm.errors import (
    AdapterNotReady,
    AdapterRefused,
    ContentNotFound,
    EngineError,
    StorageFull,
    UnknownAdapter,
)
from r3mes_vllm.ipfs.cid import CID, RAW
from tests.programs import wait_until_async

A, B, C, D = (CID.of(RAW, bytes([number])) for number in range(4))
ROOM = 2


class Engine:
    """vLLM's engine as far as a host sees it; what it holds, and what was asked of it."""

    def __init__(self) -> None:
        self.errored = False
        self.slow: dict[str, asyncio.Event] = {}
        self.holds: dict[int, str] = {}
        self.ids: list[int] = []
        self.most = 0

    async def add_lora(self, request: Any) -> bool:
        await asyncio.sleep(0)
        how = request.lora_name.partition("@")[0]
        if how in self.slow:
            await self.slow[how].wait()
        if how == "hangs":
            await asyncio.sleep(3600)
        if how == "no":
            return False
        if how in ("refused", "dies"):  # as vLLM's client does: with a plain Exception
            self.errored = how == "dies"
            raise Exception("no such module")
        self.holds[request.lora_int_id] = request.lora_name
        self.ids.append(request.lora_int_id)
        self.most = max(self.most, len(self.holds))
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        await asyncio.sleep(0)
        del self.holds[lora_id]
        return True


class Network:
    """Where adapters come from; a CID in `slow` comes when its event is set."""

    def __init__(self) -> None:
        self.names = {"a": A, "b": B, "c": C}
        self.slow: dict[CID, asyncio.Event] = {}
        self.broken: dict[CID, Exception] = {}
        self.fetches: list[CID] = []
        self.leased: list[CID] = []

    async def lookup(self, name: str) -> CID:
        if name not in self.names:
            raise UnknownAdapter(f"no {name}")
        return self.names[name]

    async def obtain(self, cid: CID) -> Any:
        self.fetches.append(cid)
        if cid in self.slow:
            await self.slow[cid].wait()
        if cid in self.broken:
            raise self.broken[cid]
        self.leased.append(cid)
        return SimpleNamespace(
            cid=cid,
            path=Path("/adapters") / str(cid),
            facts=SimpleNamespace(rank=8, size=1),
            lease=SimpleNamespace(release=lambda: self.leased.remove(cid)),
        )


class World:
    def __init__(self, **settings: Any) -> None:
        self.engine, self.network = Engine(), Network()
        ids = iter(range(1, 1000))
        self.models = SimpleNamespace(
            lora_requests={},
            lora_id_counter=SimpleNamespace(inc=lambda by: next(ids)),
            base_model_paths=[SimpleNamespace(name="base")],
            is_base_model=lambda name: name == "base",
        )
        settings = {"room": ROOM, "load_wait_s": 5.0} | settings
        engine: Any = self.engine
        models: Any = self.models
        self.host = Host(engine, models, self.network.obtain, self.network.lookup, **settings)

    @property
    def served(self) -> dict[str, str]:
        return {name: version.cid for name, version in self.host.adapters.items()}

    async def gone(self, version: Version) -> None:
        await wait_until_async(lambda: version.state is State.GONE, 2, "the version to go")


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.host.aclose()
    assert not world.network.leased


async def test_a_first_request_loads_what_the_registry_knows(world: World) -> None:
    async with world.host.hold("a") as version:
        assert version.cid == str(A)
        assert world.models.lora_requests["a"].lora_name == f"a@{A}"
        assert world.models.model_name(version.request) == "a"
    assert "a" not in world.models.lora_requests
    assert world.served == {"a": str(A)}
    assert list(version.since) == [State.FETCHING, State.VETTED, State.STAGED]


async def test_a_hundred_requests_make_one_load_and_cancelling_some_ends_none(
    world: World,
) -> None:
    world.network.slow[A] = asyncio.Event()
    tasks = [asyncio.create_task(world.host.load("a")) for _ in range(100)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.sleep(0)
    world.network.slow[A].set()
    await asyncio.gather(*tasks[1::2])
    assert world.network.fetches == [A]
    assert len(world.engine.ids) == 1


async def test_who_waits_too_long_is_told_to_come_again_and_finds_it_then() -> None:
    world = World(load_wait_s=0.05)
    world.network.slow[A] = asyncio.Event()
    with pytest.raises(AdapterNotReady, match="fetching") as told:
        await world.host.load("a")
    assert told.value.headers["Retry-After"]
    world.network.slow[A].set()
    await wait_until_async(lambda: world.host.is_ready("a"), 2, "the load")
    await world.host.load("a")
    assert world.network.fetches == [A]
    await world.host.aclose()


async def test_at_most_so_many_loads_are_on_their_way() -> None:
    world = World(load_wait_s=0.05, loads=1)
    world.network.slow[A] = asyncio.Event()
    with pytest.raises(AdapterNotReady):
        await world.host.load("a")
    with pytest.raises(AdapterNotReady, match="already"):
        await world.host.load("b")
    assert world.network.fetches == [A]
    await wait_until_async(lambda: len(world.host.versions) == 1, 2, "the other to be forgotten")
    await world.host.aclose()


async def test_an_unknown_name_leaves_nothing_behind(world: World) -> None:
    for number in range(50):
        with pytest.raises(UnknownAdapter):
            await world.host.load(f"nobody-{number}")
    assert world.host.versions == []


async def test_a_failure_is_remembered_and_a_put_tries_again(world: World) -> None:
    world.network.broken[A] = ContentNotFound("nobody offered it")
    for _ in range(3):
        with pytest.raises(ContentNotFound):
            await world.host.load("a")
    assert world.network.fetches == [A]
    del world.network.broken[A]
    await world.host.put("a", A)
    assert world.served == {"a": str(A)}


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("refused", AdapterRefused, "no such module"),
        ("no", AdapterRefused, "can't load"),
        ("dies", EngineError, "died"),
        ("hangs", EngineError, "within 0 s"),
    ],
)
async def test_what_the_engine_does_not_load_is_neither_served_nor_kept(
    world: World, how: str, error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r3mes_vllm.engine.host.LOAD_TIMEOUT_S", 0.1)
    world.network.names[how] = A
    with pytest.raises(error, match=says):
        await world.host.load(how)
    assert not world.served
    assert not world.network.leased


async def test_a_new_version_takes_the_name_and_the_old_one_ends_with_its_last_request(
    world: World,
) -> None:
    async with AsyncExitStack() as running:
        old = await running.enter_async_context(world.host.hold("a"))
        await world.host.put("a", B)
        assert world.served == {"a": str(B)}
        assert old.state is State.DRAINING
        # what vLLM finds under the name in this request is what it held from the start
        assert world.models.lora_requests["a"].lora_name == f"a@{A}"
        async with world.host.hold("a") as new:
            assert new.cid == str(B)
        assert old.lora_id in world.engine.holds
    await world.gone(old)
    assert list(world.engine.holds) == [new.lora_id]
    assert world.network.leased == [B]


async def test_a_version_that_fails_leaves_the_one_before(world: World) -> None:
    await world.host.put("a", A)
    world.network.broken[B] = AdapterRefused("finite", "it is full of NaN")
    with pytest.raises(AdapterRefused):
        await world.host.put("a", B)
    assert world.served == {"a": str(A)}


async def test_of_two_versions_the_last_put_wins_also_when_it_comes_first(world: World) -> None:
    world.network.slow[A] = asyncio.Event()
    first = asyncio.create_task(world.host.put("x", A))
    await asyncio.sleep(0)
    await world.host.put("x", B)
    world.network.slow[A].set()
    with pytest.raises(AdapterNotReady, match="once more"):  # no success that is none
        await first
    assert world.served == {"x": str(B)}
    await wait_until_async(lambda: world.network.leased == [B], 2, "the other to go")


async def test_a_put_whose_name_is_removed_meanwhile_says_so(world: World) -> None:
    await world.host.put("x", A)
    world.network.slow[B] = asyncio.Event()
    put = asyncio.create_task(world.host.put("x", B))
    await asyncio.sleep(0)
    world.host.remove("x")
    world.network.slow[B].set()
    with pytest.raises(AdapterNotReady, match="once more"):
        await put
    assert not world.served
    await wait_until_async(lambda: not world.network.leased, 2, "both to go")


async def test_a_load_nobody_waits_for_goes_when_its_name_was_put_meanwhile(world: World) -> None:
    for cid in (A, B):
        world.network.slow[cid] = asyncio.Event()
    left = asyncio.create_task(world.host.load("a"))
    await wait_until_async(lambda: world.network.fetches == [A], 2, "the load to begin")
    left.cancel()
    put = asyncio.create_task(world.host.put("a", B))
    await asyncio.sleep(0)
    world.network.slow[A].set()
    await wait_until_async(lambda: bool(world.engine.ids), 2, "the first to be loaded")
    world.network.slow[B].set()
    await put
    await wait_until_async(lambda: world.network.leased == [B], 2, "the first to go")
    assert world.served == {"a": str(B)}


async def test_what_is_asked_for_again_while_it_goes_keeps_its_lease(world: World) -> None:
    for name in ("a", "b"):
        await world.host.load(name)
    world.engine.slow["c"] = asyncio.Event()
    other = asyncio.create_task(world.host.load("c"))  # `a` makes room, and goes
    await wait_until_async(lambda: "a" not in world.served, 2, "the other to make room")
    left = asyncio.create_task(world.host.load("a"))
    await asyncio.sleep(0.01)
    left.cancel()
    world.engine.slow["c"].set()
    await other
    await wait_until_async(lambda: not world.host._loading, 2, "the loads")
    await asyncio.sleep(0.05)
    assert A in world.network.leased if "a" in world.served else A not in world.network.leased
    assert len(world.engine.holds) <= ROOM
    for name in ("b", "c", "a"):
        await world.host.load(name)
    assert world.engine.most == ROOM


async def test_a_put_of_what_is_there_does_not_wait_for_who_waits_for_room() -> None:
    world = World(room=1)
    async with world.host.hold("a"):
        waiting = asyncio.create_task(world.host.load("b"))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(2):
            await world.host.put("alias", A)
    await waiting
    assert world.served.keys() >= {"alias", "b"}
    await world.host.aclose()


async def test_slow_fetches_keep_out_nothing_that_is_on_the_disk() -> None:
    world = World(load_wait_s=0.5, loads=1, room=1)
    await world.host.put("a", A)
    await world.host.put("b", B)
    world.network.slow[C] = asyncio.Event()
    with pytest.raises(AdapterNotReady):
        await world.host.load("c")
    await world.host.load("a")
    await world.host.aclose()


async def test_a_put_that_is_cancelled_leaves_nothing_of_what_it_began(world: World) -> None:
    await world.host.put("a", A)
    world.network.slow[B] = asyncio.Event()
    task = asyncio.create_task(world.host.put("a", B))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    world.network.slow[B].set()
    await wait_until_async(lambda: B not in world.network.leased and not world.host._loading, 2, "")
    await asyncio.sleep(0.05)
    assert world.served == {"a": str(A)}
    assert world.network.leased == [A]


async def test_the_engine_never_has_more_than_there_is_room_for(world: World) -> None:
    for _ in range(5):
        for name in ("a", "b", "c"):
            await world.host.load(name)
    assert world.engine.most == ROOM
    assert len(set(world.engine.ids)) == len(world.engine.ids)  # no id is given twice


async def test_what_the_operator_named_stays_on_disk_and_comes_back_from_there(
    world: World,
) -> None:
    for cid, name in ((A, "a"), (B, "b"), (C, "c")):
        await world.host.put(name, cid)
    assert world.served.keys() == {"a", "b", "c"}
    assert world.host.find("a")
    assert not world.host.is_ready("a")
    assert sorted(world.network.leased, key=str) == sorted([A, B, C], key=str)
    await world.host.load("a")
    assert world.network.fetches == [A, B, C]


async def test_while_all_room_is_in_use_the_next_waits_for_it(world: World) -> None:
    async with AsyncExitStack() as running:
        for name in ("a", "b"):
            await running.enter_async_context(world.host.hold(name))
        waiting = asyncio.create_task(world.host.load("c"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert len(world.engine.holds) == ROOM
    await waiting
    assert world.engine.most == ROOM


async def test_a_removed_name_is_gone_until_it_is_put_again(world: World) -> None:
    await world.host.put("a", A)
    version = world.host.remove("a")
    await world.gone(version)
    assert not world.engine.holds
    with pytest.raises(UnknownAdapter, match="removed"):
        await world.host.load("a")
    with pytest.raises(UnknownAdapter):
        world.host.remove("a")
    await world.host.put("a", A)
    assert world.served == {"a": str(A)}


async def test_two_names_of_one_cid_are_one_adapter(world: World) -> None:
    await world.host.put("a", A)
    await world.host.put("alias", A)
    assert len(world.engine.ids) == 1
    world.host.remove("a")
    async with world.host.hold("alias") as version:
        assert world.models.model_name(version.request) == "alias"


async def test_a_cid_is_a_name_only_where_that_is_allowed(world: World) -> None:
    with pytest.raises(UnknownAdapter):
        await world.host.load(f"ipfs://{D}")
    open_world = World(allow_cid=True)
    async with open_world.host.hold(f"ipfs://{D}") as version:
        assert version.cid == str(D)
        assert open_world.models.model_name(version.request) == f"ipfs://{D}"
    with pytest.raises(UnknownAdapter):
        await open_world.host.load("ipfs://nonsense")
    await open_world.host.aclose()


async def test_a_name_with_a_cid_is_that_version_or_unknown(world: World) -> None:
    await world.host.load(f"a@{A}")
    assert world.served == {"a": str(A)}
    with pytest.raises(UnknownAdapter):
        await world.host.load(f"a@{B}")
    with pytest.raises(UnknownAdapter):
        await world.host.load(f"b@{A}")


async def test_what_only_waits_on_demand_makes_way_when_the_cache_is_full(world: World) -> None:
    obtain = world.network.obtain

    async def of_two(cid: CID) -> Any:
        if len(world.network.leased) >= 2:
            raise StorageFull("the cache is full")
        return await obtain(cid)

    world.host._obtain = of_two
    await world.host.put("kept", D)
    for name in ("a", "b", "c"):
        await world.host.load(name)
    assert world.served == {"kept": str(D), "c": str(C)}
    assert world.network.leased == [D, C]
    async with world.host.hold("c"):
        with pytest.raises(StorageFull):
            await world.host.load("a")
    assert world.served == {"kept": str(D), "c": str(C)}


async def test_what_the_engine_refuses_at_the_start_is_let_go_and_its_name_says_why(
    world: World,
) -> None:
    with pytest.raises(AdapterRefused):
        await world.host.add("refused", await world.network.obtain(D))
    assert not world.network.leased
    assert [it.state for it in world.host.versions] == [State.GONE]
    with pytest.raises(AdapterRefused, match="no such module"):
        await world.host.load("refused")
