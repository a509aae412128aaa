"""Adapters and nodes make themselves known."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from r3mes_vllm.backend.app import create_app
from r3mes_vllm.backend.registry import Registry
from r3mes_vllm.settings import load
from tests.backend.conftest import StartBackend
from tests.backend.signing import until
from tests.backend.stand_ins import LEGAL_CID, OTHER_CID, Clock, Network, serving, wallet

ON_BOTH = True

OLD_NODE = "remes1qy8dh2k3mvx7q0sw9f4tzlj5n6e"


async def test_an_existing_node_that_sends_only_the_old_fields_is_served(network: Network) -> None:
    http = network.http
    registered = await http.post(
        "/api/serving-node/register",
        json={
            "wallet_address": OLD_NODE,
            "endpoint_url": "http://127.0.0.1:8080",
            "available_lora_list": ["legal", "medical"],
        },
    )
    assert registered.json() == {"success": True, "action": "created", "node_id": 1}
    beat = await http.post(
        "/api/serving-node/heartbeat",
        json={"wallet_address": OLD_NODE, "status": "active", "current_load": 3},
    )
    assert beat.json() == {"success": True}
    query: dict[str, str | int] = {"lora": "legal", "max_age_seconds": 60}
    listed = (await http.get("/api/serving-node/list", params=query)).json()
    assert listed["count"] == 1
    old_fields = {
        "wallet_address": OLD_NODE,
        "endpoint_url": "http://127.0.0.1:8080",
        "available_lora_list": ["legal", "medical"],
        "status": "active",
        "current_load": 3.0,
        "last_heartbeat": "2026-01-01T00:00:00Z",
    }
    assert listed["nodes"][0].items() >= old_fields.items()


async def test_registering_a_node_again_updates_it(network: Network) -> None:
    first = await network.register("http://127.0.0.1:1", "legal")
    second = await network.register("http://127.0.0.1:2/", "medical")
    assert second == {"success": True, "action": "updated", "node_id": first["node_id"]}
    nodes = (await network.http.get("/api/serving-node/list")).json()["nodes"]
    assert [node["endpoint_url"] for node in nodes] == ["http://127.0.0.1:2"]
    assert [node["available_lora_list"] for node in nodes] == [["medical"]]


async def test_concurrent_registrations_of_one_wallet_make_one_node(network: Network) -> None:
    answers = await asyncio.gather(
        *(network.register(f"http://127.0.0.1:{1000 + n}", f"a{n}") for n in range(30))
    )
    assert sorted(a["action"] for a in answers) == ["created"] + ["updated"] * 29
    assert len({a["node_id"] for a in answers}) == 1
    nodes = (await network.http.get("/api/serving-node/list")).json()["nodes"]
    assert len(nodes) == 1
    # One whole registration won: not the URL of one with the adapters of another.
    port = int(nodes[0]["endpoint_url"].rpartition(":")[2])
    assert nodes[0]["available_lora_list"] == [f"a{port - 1000}"]


async def test_concurrent_writers_in_two_backends_on_one_database_all_succeed(
    start_backend: StartBackend,
) -> None:
    one, two = await start_backend(), await start_backend()
    await asyncio.gather(
        *(
            backend.register("http://127.0.0.1:9", "legal", number=n)
            for n in range(20)
            for backend in (one, two)
        ),
        *(backend.register_lora(f"x{n}") for n in range(20) for backend in (one, two)),
    )
    for backend in (one, two):

        async def all_are_there(backend: Network = backend) -> bool:
            loras = (await backend.http.get("/api/lora/list")).json()
            wallets = sorted(await backend.wallets())
            return len(loras) == 20 and wallets == [wallet(n) for n in range(20)]

        await until(all_are_there)


async def test_an_unknown_node_that_beats_is_told_404(network: Network) -> None:
    answer = await network.beat(7)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_node"
    assert wallet(7) in answer.json()["error"]["message"]


@pytest.mark.parametrize("status", ["busy", "draining", "offline"])
async def test_only_active_nodes_are_listed(network: Network, status: str) -> None:
    await network.register("http://127.0.0.1:1", "legal")
    assert (await network.beat(status=status)).status_code == 200
    assert await network.wallets() == []
    await network.beat(status="active")
    assert await network.wallets() == [wallet(1)]


async def test_a_node_without_a_beat_for_60_seconds_drops_out(network: Network) -> None:
    await network.register("http://127.0.0.1:1", "legal")
    network.clock.forward(59.9)
    assert await network.wallets(lora="legal", max_age_seconds=60) == [wallet(1)]
    assert await network.wallets(max_age_seconds=30) == []
    network.clock.forward(0.1)
    assert await network.wallets() == []
    assert await network.wallets(max_age_seconds=120) == [wallet(1)]
    await network.beat()
    assert await network.wallets() == [wallet(1)]


async def test_the_node_list_is_filtered_by_adapter(network: Network) -> None:
    await network.register("http://127.0.0.1:1", "legal", number=1)
    await network.register("http://127.0.0.1:2", "medical", number=2)
    assert await network.wallets(lora="medical") == [wallet(2)]
    assert await network.wallets(lora="nothing") == []
    assert await network.wallets() == [wallet(1), wallet(2)]


async def test_a_node_that_deregisters_is_gone_until_it_registers(network: Network) -> None:
    await network.register("http://127.0.0.1:1", "legal")
    leaving = {"wallet_address": wallet(1)}
    answer = await network.http.post("/api/serving-node/deregister", json=leaving)
    assert answer.json() == {"success": True}
    assert await network.wallets() == []
    assert (await network.register("http://127.0.0.1:1", "legal"))["action"] == "updated"
    assert await network.wallets() == [wallet(1)]


async def test_deregistering_an_unknown_node_is_404(network: Network) -> None:
    unknown = {"wallet_address": wallet(1)}
    answer = await network.http.post("/api/serving-node/deregister", json=unknown)
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("held", "listed"),
    [
        ({"legal": LEGAL_CID, "medical": OTHER_CID}, ["from-disk", "legal", "medical"]),
        ({"medical": OTHER_CID}, ["from-disk", "medical"]),
        ({}, ["from-disk"]),
        (None, ["from-disk", "legal"]),
    ],
)
async def test_a_beat_says_what_the_node_holds_now(
    network: Network, held: dict[str, str] | None, listed: list[str]
) -> None:
    await network.register(
        "http://127.0.0.1:1", "from-disk", "legal", adapters={"legal": LEGAL_CID}
    )
    await network.beat(adapters=held)
    node = (await network.http.get("/api/serving-node/list")).json()["nodes"][0]
    assert node["available_lora_list"] == listed
    assert node["adapters"] == ({"legal": LEGAL_CID} if held is None else held)


async def test_an_adapter_is_registered_once_and_updated_after(network: Network) -> None:
    first = await network.register_lora(
        "legal", LEGAL_CID, description="law", category="legal", version="1.0.0"
    )
    assert first == {"success": True, "action": "created", "lora_id": 1}
    again = await network.register_lora("legal", OTHER_CID, version="2.0.0")
    assert again == {"success": True, "action": "updated", "lora_id": 1}
    listed = (await network.http.get("/api/lora/list", params={"active_only": "true"})).json()
    assert listed == [
        {
            "id": 1,
            "name": "legal",
            "ipfs_hash": OTHER_CID,
            "description": "",
            "category": "",
            "version": "2.0.0",
            "system_prompt": None,
            "created_at": "2026-01-01T00:00:00Z",
            "base_model": None,
            "size_bytes": None,
            "rank": None,
            "active": True,
            "owner": None,
        }
    ]


async def test_an_adapters_system_prompt_is_kept_until_it_is_registered_without(
    network: Network,
) -> None:
    for prompt in ("Be brief. " + "ü" * 8182, "Be kind.", None):
        await network.register_lora("legal", **({"system_prompt": prompt} if prompt else {}))
        (listed,) = (await network.http.get("/api/lora/list")).json()
        assert listed["system_prompt"] == prompt


async def test_concurrent_registrations_of_one_adapter_make_one(network: Network) -> None:
    answers = await asyncio.gather(*(network.register_lora("legal") for _ in range(20)))
    assert sorted(a["action"] for a in answers) == ["created"] + ["updated"] * 19
    assert len((await network.http.get("/api/lora/list")).json()) == 1


async def test_a_restart_keeps_every_registration(database: str) -> None:
    settings = load({"database_url": database, "allow_private_nodes": True})
    clock = Clock()

    async def round_of(work: Any) -> Any:
        async with (
            serving(create_app(settings, clock=clock)) as url,
            httpx.AsyncClient(base_url=url, trust_env=False) as http,
        ):
            return await work(Network(url, http, clock))

    async def before(network: Network) -> None:
        await network.register_lora("legal")
        await network.register("http://127.0.0.1:1", "legal", adapters={"legal": LEGAL_CID})

    async def after(network: Network) -> tuple[list[str], str]:
        assert (await network.beat()).status_code == 200
        loras = (await network.http.get("/api/lora/list")).json()
        return await network.wallets(lora="legal"), loras[0]["ipfs_hash"]

    await round_of(before)
    assert await round_of(after) == ([wallet(1)], LEGAL_CID)


async def test_a_file_is_write_ahead_logged(tmp_path: Path) -> None:
    async with Registry.open(f"sqlite:///{tmp_path}/b.sqlite3"):
        assert (tmp_path / "b.sqlite3-wal").exists()
