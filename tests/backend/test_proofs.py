"""A node that signs must prove its URL before anything is sent there."""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from r3mes_vllm.backend import prover
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.identity import Identity
from r3mes_vllm.node.identify import prove
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.signing import SigningNode, identity, proves, until
from tests.backend.stand_ins import (
    Behaviour,
    Network,
    StandIn,
    says_hello,
    untouched,
    unused_port,
    wallet,
)
from tests.backend.test_endpoints import PUBLIC

ON_BOTH = True
BOTH = pytest.mark.parametrize("protected", [True, False])
RETRY_S = 11


async def ask(network: Network, **body: Any) -> httpx.Response:
    return await network.http.post("/chat", json={"message": "hi", "lora_name": "legal"} | body)


def paths(node: StandIn) -> list[str]:
    return [seen.path for seen in node.seen]


async def test_a_node_that_lives_where_it_says_is_used(
    network: Network, start_node: StartNode
) -> None:
    node = SigningNode(network)
    there = StandIn(proves(node.identity))
    await node.register(await start_node(there), "legal")
    listed = await node.settled()
    assert (listed["signature"], listed["signature_reason"]) == ("signed", None)
    assert (await ask(network)).text == "hello"
    assert paths(there) == ["/identity", "/chat"]
    # Not asked again while it stays there, and restarts there.
    network.clock.forward(RETRY_S)
    await node.restarted().register((await node.listed())["endpoint_url"], "legal")
    assert (await ask(network)).text == "hello"
    assert paths(there).count("/identity") == 1


async def test_a_first_question_waits_for_the_proof(
    network: Network, start_node: StartNode
) -> None:
    node = SigningNode(network)
    answers = proves(node.identity)

    async def slowly(request: Request) -> Response:
        await asyncio.sleep(0.3)
        return await answers(request)

    await node.register(await start_node(StandIn(slowly)), "legal", base_model="base")
    by_model = {"model": "base", "prompt": "hi"}
    for answer in await asyncio.gather(
        ask(network),
        ask(network, lora_name=None),
        network.http.post("/v1/completions", json=by_model),
    ):
        assert (answer.status_code, answer.text) == (200, "hello")


async def test_nobody_waits_for_a_proof_while_another_can_answer(
    network: Network, start_node: StartNode
) -> None:
    async def never(request: Request) -> Response:
        await asyncio.Event().wait()
        raise AssertionError

    await network.register(await start_node(StandIn()), "legal", number=1)
    began = time.monotonic()
    silent = SigningNode(network)
    await silent.register(await start_node(StandIn(never)), "legal")
    assert (await ask(network)).headers["x-r3mes-node"] == wallet(1)
    assert time.monotonic() - began < prover._TIMEOUT_S / 2
    assert (await silent.listed())["signature"] == "unproven"


def another_key(node: Identity) -> Behaviour:
    return proves(identity())


def an_old_node(node: Identity) -> Behaviour:
    async def behaviour(request: Request) -> Response:
        if request.url.path == "/identity":
            return JSONResponse({"error": "Not found"}, 404)
        return await says_hello(request)

    return behaviour


def the_key_elsewhere(node: Identity) -> Behaviour:
    """Somebody passes the challenge on to the node, which lives at another URL."""
    return proves(node, "https://node.example")


def altered(node: Identity) -> Behaviour:
    """The same, and says that the proof is of this URL."""

    async def behaviour(request: Request) -> Response:
        nonce = (await request.json()).get("nonce")
        if nonce is None:
            return await says_hello(request)
        proof = prove(node, nonce, "https://node.example").model_dump()
        return JSONResponse(proof | {"url": str(request.base_url).rstrip("/")})

    return behaviour


def an_old_proof(node: Identity) -> Behaviour:
    """Of a nonce that was asked before."""

    async def behaviour(request: Request) -> Response:
        if request.url.path != "/identity":
            return await says_hello(request)
        return JSONResponse(prove(node, "00" * 32, str(request.base_url).rstrip("/")).model_dump())

    return behaviour


def says(content: bytes) -> Callable[[Identity], Behaviour]:
    def of(node: Identity) -> Behaviour:
        async def behaviour(request: Request) -> Response:
            if request.url.path != "/identity":
                return await says_hello(request)
            return Response(content)

        return behaviour

    return of


@BOTH
@pytest.mark.parametrize(
    ("there", "reason"),
    [
        (another_key, "another key answers"),
        (an_old_node, "the answer was 404"),
        (the_key_elsewhere, "lives at another"),
        (altered, "can't sign"),
        (an_old_proof, "can't sign"),
        (says(b"hello"), "knows no proof"),
        (says(b"null"), "knows no proof"),
        (says(b'{"key": 1}'), "knows no proof"),
        (says(b"[" * 4096), "knows no proof"),
        (says(b" " * 4097), "over 4096 bytes"),
    ],
)
async def test_a_node_that_lives_elsewhere_is_not_used(
    network: Network,
    start_node: StartNode,
    monkeypatch: pytest.MonkeyPatch,
    there: Callable[[Identity], Behaviour],
    reason: str,
    protected: bool,
) -> None:
    if not protected:
        monkeypatch.setattr(KnownNode, "usable", True)
    node = SigningNode(network)
    place = StandIn(there(node.identity))
    await node.register(await start_node(place), "legal", base_model="base")
    if not protected:
        assert (await ask(network)).text == "hello"
        return
    listed = await node.settled()
    assert listed["signature"] == "unproven"
    assert reason in listed["signature_reason"]
    answer = await ask(network)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_not_ready")
    assert (await ask(network, lora_name=None)).status_code == 503
    assert (await network.http.get("/v1/models")).json()["data"] == []
    assert await network.wallets(lora="legal") == []
    assert paths(place) == ["/identity"]


async def test_no_redirect_leads_to_a_proof(network: Network, start_node: StartNode) -> None:
    node = SigningNode(network)
    with untouched() as port:

        async def bounces(request: Request) -> Response:
            location = f"http://127.0.0.1:{port}/identity"
            return Response(status_code=307, headers={"location": location})

        await node.register(await start_node(StandIn(bounces)), "legal")
        assert "307" in (await node.settled())["signature_reason"]


@pytest.mark.parametrize("silent", [True, False])
async def test_no_answer_is_no_proof(
    network: Network, start_node: StartNode, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    monkeypatch.setattr(prover, "_TIMEOUT_S", 0.2)

    async def never(request: Request) -> Response:
        await asyncio.Event().wait()
        raise AssertionError

    url = await start_node(StandIn(never)) if silent else f"http://127.0.0.1:{unused_port()}"
    node = SigningNode(network)
    await node.register(url, "legal")
    reason = (await node.settled())["signature_reason"]
    assert reason == f"POST {url}/identity: no answer" + (" within 0.2 s" if silent else "")


async def test_a_failure_is_asked_again_when_the_node_beats(
    network: Network, start_node: StartNode
) -> None:
    node = SigningNode(network)
    place = StandIn(another_key(node.identity))
    await node.register(await start_node(place), "legal")
    assert (await node.settled())["signature"] == "unproven"
    place.behaviour = proves(node.identity)
    await node.send("heartbeat")  # too soon
    network.clock.forward(RETRY_S)
    assert paths(place) == ["/identity"]
    await node.send("heartbeat")

    async def signed() -> bool:
        return bool((await node.listed())["signature"] == "signed")

    await until(signed)
    assert paths(place) == ["/identity"] * 2
    assert (await ask(network)).text == "hello"


async def test_a_node_that_moves_proves_its_new_url(
    network: Network, start_node: StartNode
) -> None:
    node = SigningNode(network)
    await node.register(await start_node(StandIn(proves(node.identity))), "legal")
    assert (await node.settled())["signature"] == "signed"
    elsewhere = StandIn(another_key(node.identity))
    await node.register(await start_node(elsewhere), "legal")
    assert (await node.settled())["signature"] == "unproven"
    assert (await ask(network)).status_code == 503
    assert paths(elsewhere) == ["/identity"]


async def test_a_url_belongs_to_the_last_key_that_proved_it(
    network: Network, start_node: StartNode
) -> None:
    before, after = SigningNode(network), SigningNode(network)
    place = StandIn(proves(before.identity))
    url = await start_node(place)
    await before.register(url, "legal")
    assert (await before.settled())["signature"] == "signed"
    place.behaviour = proves(after.identity)
    await after.register(url, "legal")
    assert (await after.settled())["signature"] == "signed"
    await before.send("heartbeat")
    assert (await before.settled())["signature_reason"] == "another key answers at its URL"
    assert (await ask(network)).headers["x-r3mes-node"] == after.wallet


async def test_each_challenge_is_another_one(network: Network, start_node: StartNode) -> None:
    node, place = SigningNode(network), StandIn(another_key(identity()))
    await node.register(await start_node(place), "legal")
    await node.settled()
    network.clock.forward(RETRY_S)
    await node.send("heartbeat")

    async def twice() -> bool:
        return len(place.seen) == 2

    await until(twice)
    assert len({json.loads(seen.body)["nonce"] for seen in place.seen}) == 2


@BOTH
async def test_no_private_address_is_asked(
    start_backend: StartBackend, start_node: StartNode, protected: bool
) -> None:
    """The name turns private after its registration."""
    addresses = [PUBLIC]

    async def resolve(host: str, port: int) -> list[str]:
        found, addresses[:] = list(addresses), ["127.0.0.1"]
        return found

    network = await start_backend(allow_private_nodes=not protected, resolve=resolve)
    node = SigningNode(network)
    with untouched() if protected else nullcontext() as port:
        place = StandIn(proves(node.identity))
        at = port or (await start_node(place)).rpartition(":")[2]
        await node.register(f"http://localhost:{at}", "legal")
        assert (await node.settled())["signature"] == ("unproven" if protected else "signed")


async def test_a_url_is_compared_in_its_normal_form(
    network: Network, start_node: StartNode
) -> None:
    node, place = SigningNode(network), StandIn()
    port = (await start_node(place)).rpartition(":")[2]
    url = f"http://LOCALHOST:{port}/"
    place.behaviour = proves(node.identity, url)
    await node.register(url, "legal")
    assert (await node.settled())["signature"] == "signed"
    assert (await node.listed())["endpoint_url"] == f"http://localhost:{port}"
