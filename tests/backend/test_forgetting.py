"""Nodes that were silent for long are forgotten, the others and what was promised them are not."""

from datetime import timedelta

import pytest

from r3mes_vllm.backend import registry as registries
from r3mes_vllm.backend.forgetting import UNPROVEN_AFTER, forget, forgetting
from r3mes_vllm.backend.refusals import DatabaseDown
from r3mes_vllm.backend.registry import Registry
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.signing import SigningNode, code, deliver, proves, until
from tests.backend.stand_ins import Network, StandIn, wallet

ON_BOTH = True
MONTH = timedelta(days=30)
LATER_S = UNPROVEN_AFTER.total_seconds() + 1


def registry(network: Network) -> Registry:
    assert network.app
    found: Registry = network.app.state.backend.registry
    return found


async def forgotten(network: Network, after: timedelta = MONTH) -> int:
    return await forget(registry(network), network.clock(), after)


async def known(network: Network) -> set[str]:
    return {node.wallet_address for node in await registry(network).all_nodes()}


async def proven(network: Network, start_node: StartNode) -> SigningNode:
    node = SigningNode(network)
    await node.register(await start_node(StandIn(proves(node.identity))), "legal")
    await node.settled()
    return node


async def test_who_proved_nothing_is_forgotten_after_a_day(
    network: Network, start_node: StartNode
) -> None:
    node = await proven(network, start_node)
    elsewhere = SigningNode(network)
    await elsewhere.register(await start_node(StandIn()), "legal")
    await elsewhere.settled()
    await network.register("http://127.0.0.1:9", "legal", number=1)
    await network.register("http://127.0.0.1:9", "legal", number=2)
    network.clock.forward(LATER_S)
    await network.beat(2)
    assert await forgotten(network) == 2
    assert await known(network) == {wallet(2), node.wallet}
    assert await network.wallets(lora="legal") == [wallet(2)]
    assert await forgotten(network) == 0


async def test_who_lived_at_its_url_is_forgotten_after_a_month(
    network: Network, start_node: StartNode
) -> None:
    await proven(network, start_node)
    network.clock.forward(MONTH.total_seconds() - 60)
    assert await forgotten(network) == 0
    network.clock.forward(61)
    assert await forgotten(network) == 1
    assert await known(network) == set()


async def test_the_database_forgets_too(start_backend: StartBackend) -> None:
    one = await start_backend()
    await one.register("http://127.0.0.1:9", "legal")
    one.clock.forward(LATER_S)
    assert await forgotten(one) == 1
    assert await known(await start_backend()) == set()


async def test_many_are_forgotten_a_few_at_a_time(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registries, "_AT_ONCE", 2)
    for number in range(5):
        await network.register("http://127.0.0.1:9", "legal", number=number)
    network.clock.forward(LATER_S)
    assert await forgotten(network) == 5
    assert await known(network) == set()


async def test_who_comes_back_registers_again(network: Network) -> None:
    await network.register("http://127.0.0.1:9", "legal")
    network.clock.forward(LATER_S)
    assert await forgotten(network) == 1
    assert (await network.beat()).status_code == 404  # which has a node register
    assert (await network.register("http://127.0.0.1:9", "medical"))["action"] == "created"
    assert await network.wallets(lora="medical") == [wallet(1)]
    assert await network.wallets(lora="legal") == []


async def test_another_backend_that_was_told_of_a_beat_keeps_the_node(
    start_backend: StartBackend,
) -> None:
    """One that has not looked since finds the node silent, the database does not."""
    one, two = await start_backend(), await start_backend()
    await one.register("http://127.0.0.1:9", "legal")

    async def there() -> bool:
        return wallet(1) in await known(two)

    await until(there)
    for each in (one, two):
        each.clock.forward(LATER_S)
    await one.beat()
    await forgotten(two)
    await until(there)
    assert await known(await start_backend()) == {wallet(1)}


@pytest.mark.parametrize("what", ["register", "heartbeat"])
async def test_a_captured_request_does_not_bring_a_node_back(network: Network, what: str) -> None:
    node = SigningNode(network)
    captured = node.request("register")
    assert (await deliver(network, captured)).status_code == 200
    if what == "heartbeat":
        captured = node.request("heartbeat")
        assert (await deliver(network, captured)).status_code == 200
    await node.settled()
    network.clock.forward(LATER_S)
    assert await forgotten(network) == 1
    assert code(await deliver(network, captured)) == (401, "bad_signature")
    assert await known(network) == set()


async def test_it_goes_on_when_the_database_was_away(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    await network.register("http://127.0.0.1:9")
    network.clock.forward(LATER_S)
    forget_nodes, failed = Registry.forget_nodes, list[int]()

    async def sometimes(self: Registry, *given: object) -> int:
        if len(failed) < 2:
            failed.append(1)
            raise DatabaseDown("away") if len(failed) == 1 else ValueError("a defect")
        return await forget_nodes(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Registry, "forget_nodes", sometimes)

    async def gone() -> bool:
        return await known(network) == set()

    async with forgetting(registry(network), network.clock, MONTH, every_s=0.01):
        await until(gone)
