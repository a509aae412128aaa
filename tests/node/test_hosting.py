"""Adapters that come, change and go while a real node serves."""

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psutil
import pytest

from r3mes_vllm.errors import AdapterRefused
from r3mes_vllm.node import hold
from tests import tiny
from tests.conftest import REFRESH_S, Network
from tests.in_store import put_in_store
from tests.programs import wait_until

SWITCHES, REQUESTS, AT_ONCE = 20, 1000, 8


@pytest.fixture(scope="module")
def cids(network: Network, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of three adapters that answer differently, in the node's store, under no name."""
    folder = tmp_path_factory.mktemp("adapters")

    async def import_all() -> list[str]:
        made = [tiny.make_adapter(folder / str(seed), seed=seed) for seed in range(10, 13)]
        return [await put_in_store(network.node_cache, adapter) for adapter in made]

    return asyncio.run(import_all())


@pytest.fixture
def node(network: Network) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=network.node.url, timeout=60) as client:
        yield client


def put(node: httpx.Client, name: str, cid: str) -> dict[str, Any]:
    answer = node.post("/adapters", json={"name": name, "cid": cid})
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["adapter"])


def ask(node: httpx.Client, name: str) -> httpx.Response:
    return node.post("/chat", json=question(name))


def question(name: str, number: int = 0) -> dict[str, Any]:
    return {
        "message": f"What is a contract? {number % 4}",
        "lora_name": name,
        "temperature": 0,
        "max_tokens": 8,
        "stream": False,
    }


def states(node: httpx.Client) -> dict[str, str]:
    return {it["cid"]: it["state"] for it in node.get("/adapters").json()["adapters"]}


def nodes_adapters(network: Network) -> list[str]:
    listed = httpx.get(f"{network.backend.url}/api/serving-node/list").json()["nodes"]
    return [name for it in listed for name in it["available_lora_list"]]


def test_an_adapter_comes_answers_and_goes(
    node: httpx.Client, network: Network, cids: list[str]
) -> None:
    shown = put(node, "guest", cids[0])
    assert shown["names"] == ["guest"]
    assert {"vetted", "staged"} <= shown["since"].keys()
    answer = ask(node, "guest")
    assert answer.json()["cid"] == answer.headers["x-r3mes-cid"] == cids[0]
    assert states(node)[cids[0]] == "resident"
    metrics = node.get("/metrics").text
    assert 'r3mes_adapter_requests_total{adapter="guest",outcome="complete"} 1.0' in metrics
    assert 'r3mes_adapters{state="resident"}' in metrics
    wait_until(lambda: "guest" in nodes_adapters(network), 10, "the backend to know")
    assert "guest" in [it["id"] for it in node.get("/v1/models").json()["data"]]
    assert node.delete("/adapters/guest").status_code == 200
    wait_until(lambda: states(node)[cids[0]] == "gone", 10, "it to leave the engine")
    assert ask(node, "guest").status_code == 404
    assert node.delete("/adapters/guest").status_code == 404
    wait_until(lambda: "guest" not in nodes_adapters(network), 10, "the backend to forget it")


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 400, "name"),
        ({"name": "x", "cid": "nonsense"}, 400, "nonsense"),
        ({"name": "../x", "cid": "bafkqaaa"}, 400, "name"),
        ({"name": "x", "cid": "bafkqaaa", "path": "/etc"}, 400, "path"),
    ],
)
def test_a_mistaken_adapter_is_a_clear_error(
    node: httpx.Client, body: dict[str, Any], status: int, field: str
) -> None:
    answer = node.post("/adapters", json=body)
    assert answer.status_code == status, answer.text
    assert field in answer.json()["error"]["message"]


def test_a_name_of_the_registry_is_loaded_when_it_is_asked_for_and_follows_it(
    node: httpx.Client, network: Network, cids: list[str]
) -> None:
    def register(cid: str) -> None:
        body = {"name": "listed", "ipfs_hash": cid}
        httpx.post(f"{network.backend.url}/api/lora/register", json=body).raise_for_status()

    register(cids[1])
    # a name asked for in vain before is looked up again soon
    wait_until(lambda: ask(node, "listed").status_code == 200, 10, "the name")
    assert ask(node, "listed").json()["cid"] == cids[1]
    register(cids[2])
    wait_until(lambda: ask(node, "listed").json()["cid"] == cids[2], 10, "the new version")
    wait_until(lambda: states(node).get(cids[1]) == "gone", 10, "the old one to go")
    node.delete("/adapters/listed")


def test_an_adapter_that_is_named_by_its_cid_is_not_looked_for_in_the_registry(
    node: httpx.Client, network: Network, cids: list[str]
) -> None:
    assert ask(node, f"ipfs://{cids[1]}").json()["cid"] == cids[1]
    time.sleep(3 * REFRESH_S)
    assert "stays at its version" not in network.node.output()
    assert node.delete(f"/adapters/{quote(f'ipfs://{cids[1]}', safe='')}").status_code == 200


def test_an_openai_client_is_told_which_rule_an_adapter_breaks() -> None:
    answer = hold._refusal(AdapterRefused("numbers_are_finite", "it is full of NaN"))
    error = json.loads(bytes(answer.body))["error"]
    assert (answer.status_code, error["code"]) == (422, "adapter_refused")
    assert (error["rule"], error["param"]) == ("numbers_are_finite", "model")


def test_an_openai_client_is_told_which_name_is_unknown(node: httpx.Client) -> None:
    body = {"model": "nobody", "messages": [{"role": "user", "content": "hi"}]}
    answer = node.post("/v1/chat/completions", json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"
    assert "nobody" in answer.json()["error"]["message"]


async def test_no_request_fails_or_mixes_versions_while_a_name_goes_to_and_fro(
    network: Network, cids: list[str]
) -> None:
    async with httpx.AsyncClient(base_url=network.node.url, timeout=120) as client:

        async def switch(cid: str) -> None:
            answer = await client.post("/adapters", json={"name": "turning", "cid": cid})
            assert answer.status_code == 200, answer.text

        alone: dict[tuple[str, int], str] = {}
        for cid in cids[:2]:
            await switch(cid)
            for number in range(4):
                answer = (await client.post("/chat", json=question("turning", number))).json()
                assert answer["cid"] == cid
                alone[cid, number] = answer["response"]
        assert len(set(alone.values())) > 4  # the versions differ, also after the same question

        numbers = iter(range(REQUESTS))
        seen: list[str] = []
        wrong: list[str] = []

        async def worker() -> None:
            for number in numbers:
                answer = await client.post("/chat", json=question("turning", number))
                if answer.status_code != 200:
                    wrong.append(answer.text)
                    continue
                found = answer.json()
                seen.append(found["cid"])
                if found["response"] != alone[found["cid"], number % 4]:
                    wrong.append(f"{number}: {found}")

        workers = asyncio.gather(*(worker() for _ in range(AT_ONCE)))
        for turn in range(SWITCHES):
            done = len(seen)
            while len(seen) < done + REQUESTS // SWITCHES - AT_ONCE and not workers.done():
                await asyncio.sleep(0.01)
            await switch(cids[turn % 2])
        await workers
        assert not wrong
        assert sum(a != b for a, b in itertools.pairwise(seen)) >= SWITCHES // 2
        await client.delete("/adapters/turning")


def test_loading_and_unloading_leaves_no_memory_behind(
    node: httpx.Client, network: Network, cids: list[str]
) -> None:
    """The long form of this is `make churn`."""

    def cycle(times: int) -> int:
        for turn in range(times):
            put(node, "passing", cids[turn % 2])
        node.delete("/adapters/passing")
        tree = psutil.Process(network.node.process.pid)
        return sum(it.memory_info().rss for it in (tree, *tree.children(recursive=True)))

    cycle(40)
    before = cycle(40)
    assert cycle(100) - before < 8 << 20


def test_no_path_of_the_machine_is_shown(node: httpx.Client, network: Network) -> None:
    assert str(Path(network.folder)) not in node.get("/adapters").text
