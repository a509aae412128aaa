"""Nodes of a version that is too old get no requests."""

import asyncio

import pytest

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.settings import load
from r3mes_vllm.versions import is_older
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.stand_ins import StandIn, wallet

ASKED = {"message": "hi", "lora_name": "legal"}


@pytest.mark.parametrize(
    ("version", "than", "older"),
    [
        ("0.1.0", "0.2.0", True),
        ("0.10.0", "0.9.0", False),
        ("1.0.0rc1", "1.0.0", True),
        ("1.0", "1.0", False),
        (None, "1.0", False),
        ("nonsense", "1.0", False),
        ("1.0", None, False),
    ],
)
def test_versions_are_compared(version: str | None, than: str | None, older: bool) -> None:
    assert is_older(version, than) is older


def test_a_required_version_must_be_one() -> None:
    with pytest.raises(ConfigError, match="required_node_version"):
        load({"required_node_version": "the newest"})


async def test_what_is_too_old_gets_no_requests_and_the_page_says_why(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    network = await start_backend(required_node_version="2.0", latest_node_version="2.1")
    old, new, existing = StandIn(), StandIn(), StandIn()
    told = await network.register(await start_node(old), "legal", number=1, version="1.9")
    assert (told["required_version"], told["latest_version"]) == ("2.0", "2.1")
    assert (await network.beat()).json()["required_version"] == "2.0"
    assert (await network.http.post("/chat", json=ASKED)).status_code == 503
    assert await network.wallets(lora="legal") == []
    (line,) = (await network.http.get("/dashboard/data")).json()["nodes"]
    assert line["reason"] == "Its version 1.9 is older than 2.0, which is required."

    await network.register(await start_node(new), "legal", number=2, version="2.0")
    await network.register(await start_node(existing), "legal", number=3)
    asked = [ASKED | {"message": f"what is {number}?"} for number in range(40)]
    # At once: one after another may all go to the node whose first answer was the quicker one.
    answers = await asyncio.gather(*(network.http.post("/chat", json=it) for it in asked))
    assert {it.status_code for it in answers} == {200}
    assert not old.seen
    assert new.seen
    assert existing.seen
    assert await network.wallets(lora="legal") == [wallet(2), wallet(3)]


async def test_without_the_setting_answers_are_the_existing_networks(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    network = await start_backend()
    told = await network.register(await start_node(StandIn()), "legal", version="0.0.1")
    assert told.keys() == {"success", "action", "node_id"}
    assert (await network.beat()).json() == {"success": True}
    assert (await network.http.post("/chat", json=ASKED)).status_code == 200
