"""Which node answers what."""

import asyncio
import json
import os
import resource
from collections.abc import Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from r3mes_vllm.backend.balancer import Balancer
from r3mes_vllm.backend.dial import Dialler, Outgoing, Timeouts
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.backend.refusals import Unavailable
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.stand_ins import (
    LEGAL_CID,
    LEGAL_CID_V0,
    OTHER_CID,
    Clock,
    DiesAfter,
    Network,
    StandIn,
    answers,
    says_hello,
    serving,
    unused_port,
    wallet,
)

NEXT_CID = "bafybeihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"

TRIES = 12
"""Random choice between two nodes misses one of them all along once in 2048 runs."""


async def ask(network: Network, **body: Any) -> httpx.Response:
    return await network.http.post("/chat", json={"message": "hi"} | body)


async def test_slashes_in_front_of_a_path_count_as_one(
    network: Network, start_node: StartNode
) -> None:
    node = StandIn()
    await network.register(await start_node(node), "legal")
    body = {"message": "hi", "model": "legal", "messages": [{"role": "user", "content": "hi"}]}
    for path in ("/chat", "/v1/chat/completions", "/v1/completions"):
        answer = await network.http.post(f"{network.url}/{path}", json=body)
        assert answer.status_code == 200, path
        assert node.seen[-1].path == path
    for path in ("//v1/models", "///health", "//"):
        assert (await network.http.get(network.url + path)).status_code == 200, path
    missing = await network.http.get(f"{network.url}//v1//models")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


async def test_the_named_adapter_is_asked_of_a_node_that_holds_it(
    network: Network, start_node: StartNode
) -> None:
    legal, medical = StandIn(), StandIn()
    await network.register(await start_node(legal), "legal", number=1)
    await network.register(await start_node(medical), "medical", number=2)
    for field in ("lora_name", "adapter_name"):
        for _ in range(TRIES):
            answer = await ask(network, **{field: "legal"})
            assert (answer.status_code, answer.text) == (200, "hello")
            assert answer.headers["x-r3mes-node"] == wallet(1)
    by_header = {"X-Adapter": "legal"}
    answer = await network.http.post("/chat", json={"message": "hi"}, headers=by_header)
    assert answer.headers["x-r3mes-node"] == wallet(1)
    assert not medical.seen


async def test_all_holders_get_a_share(network: Network, start_node: StartNode) -> None:
    nodes = [StandIn(), StandIn()]
    for number, node in enumerate(nodes):
        await network.register(await start_node(node), "legal", number=number)
    # at once, and not one conversation, which would stay at one node
    asking = [ask(network, lora_name="legal", message=f"question {n}") for n in range(4 * TRIES)]
    await asyncio.gather(*asking)
    assert all(node.seen for node in nodes)


@pytest.mark.parametrize(
    ("message", "adapter"),
    [
        ("What is a CONTRACT?", "legal"),
        ("I have a symptom", "medical"),
        # coding comes first in the table, but nobody holds it
        ("debug this contract", "legal"),
        ("hello", None),
    ],
)
async def test_words_choose_the_adapter_when_none_is_named(
    network: Network, start_node: StartNode, message: str, adapter: str | None
) -> None:
    node = StandIn()
    await network.register(await start_node(node), "legal", "medical")
    assert (await ask(network, message=message)).status_code == 200
    assert node.seen[0].header("x-adapter") == ([adapter] if adapter else [])


async def test_words_of_the_history_count_when_there_is_no_message(
    network: Network, start_node: StartNode
) -> None:
    node = StandIn()
    await network.register(await start_node(node), "legal", "medical")
    history = [{"role": "user", "content": "law?"}, {"role": "assistant", "content": "doctor"}]
    assert (await ask(network, message="", messages=history)).status_code == 200
    assert node.seen[0].header("x-adapter") == ["legal"]


async def test_the_body_reaches_the_node_unchanged(network: Network, start_node: StartNode) -> None:
    node = StandIn()
    await network.register(await start_node(node), "legal")
    body = b'{ "message":"l\\u00e4w","wallet_address":"x", "future": [1.0, 1e2]}'
    headers = {"X-Wallet-Address": wallet(5), "Accept": "text/event-stream"}
    await network.http.post("/chat", content=body, headers=headers)
    assert node.seen[0].body == body
    assert node.seen[0].path == "/chat"
    assert node.seen[0].header("x-wallet-address") == [wallet(5)]
    assert node.seen[0].header("accept") == ["text/event-stream"]


async def test_a_name_nobody_knows_is_404(network: Network, start_node: StartNode) -> None:
    await network.register(await start_node(StandIn()), "legal")
    answer = await ask(network, lora_name="nonsense")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_adapter"
    assert "nonsense" in answer.json()["error"]["message"]


async def test_a_known_name_without_a_live_holder_is_503(
    network: Network, start_node: StartNode
) -> None:
    await network.register_lora("registered")
    await network.register(await start_node(StandIn()), "listed-once")
    network.clock.forward(61)
    for name in ("registered", "listed-once"):
        answer = await ask(network, lora_name=name)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert "no node that holds it is alive" in answer.json()["error"]["message"]


async def test_without_any_node_the_answer_is_503(network: Network) -> None:
    answer = await ask(network)
    assert answer.status_code == 503
    assert "retry-after" in answer.headers


async def test_a_node_with_another_version_is_no_holder(
    network: Network, start_node: StartNode
) -> None:
    stale = StandIn()
    await network.register_lora("legal", LEGAL_CID)
    url = await start_node(stale)
    await network.register(url, "legal", number=1, adapters={"legal": OTHER_CID})
    assert (await ask(network, lora_name="legal")).status_code == 503
    assert not stale.seen
    await network.beat(adapters={"legal": LEGAL_CID})
    assert (await ask(network, lora_name="legal")).status_code == 200


def speaking(cid: str) -> StandIn:
    return StandIn(answers(200, {"response": "hello"}, x_r3mes_adapter="legal", x_r3mes_cid=cid))


async def hold(network: Network, start_node: StartNode, *cids: str) -> list[StandIn]:
    """Nodes of ours, from number 1 on."""
    nodes = [speaking(cid) for cid in cids]
    for number, (node, cid) in enumerate(zip(nodes, cids, strict=True), 1):
        adapters = {"legal": cid}
        await network.register(await start_node(node), "legal", number=number, adapters=adapters)
    return nodes


async def answered_by(network: Network) -> str | None:
    """The CID in the answer to the bare name."""
    answer = await ask(network, lora_name="legal")
    assert answer.status_code in (200, 503), answer.text
    said: str | None = answer.headers.get("x-r3mes-cid")
    return said


async def test_the_version_before_is_asked_until_a_node_holds_the_registered_one(
    network: Network, start_node: StartNode
) -> None:
    await network.register_lora("legal", LEGAL_CID_V0)
    old, _ = await hold(network, start_node, LEGAL_CID, NEXT_CID)
    await network.register_lora("legal", OTHER_CID, version="2")
    for _ in range(TRIES):
        assert await answered_by(network) == LEGAL_CID
    assert (await ask(network, message="What is a contract?")).headers["x-r3mes-cid"] == LEGAL_CID
    (listed,) = (await network.http.get("/v1/models")).json()["data"]
    assert (listed["id"], listed["cid"]) == ("legal", LEGAL_CID_V0)
    exactly = await ask(network, lora_name=f"legal@{OTHER_CID}")
    assert exactly.status_code == 503
    asked = len(old.seen)

    await network.register(await start_node(speaking(OTHER_CID)), "legal", number=3)
    await network.beat(3, adapters={"legal": OTHER_CID})
    for _ in range(TRIES):
        assert await answered_by(network) == OTHER_CID
    assert len(old.seen) == asked
    assert (await network.http.get("/v1/models")).json()["data"][0]["cid"] == OTHER_CID


async def test_the_latest_version_that_is_held_is_asked(
    network: Network, start_node: StartNode
) -> None:
    for cid in (LEGAL_CID, OTHER_CID, LEGAL_CID, NEXT_CID):
        await network.register_lora("legal", cid)
    await hold(network, start_node, OTHER_CID, LEGAL_CID)
    assert await answered_by(network) == LEGAL_CID
    await network.beat(2, status="draining")
    assert await answered_by(network) == OTHER_CID


async def test_other_backends_know_the_version_before_too(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    first = await start_backend()
    await first.register_lora("legal", LEGAL_CID)
    await hold(first, start_node, LEGAL_CID)
    await first.register_lora("legal", OTHER_CID)
    assert await answered_by(await start_backend()) == LEGAL_CID


async def test_an_answer_of_another_version_than_the_one_routed_for_is_none(
    network: Network, start_node: StartNode
) -> None:
    await network.register_lora("legal", LEGAL_CID)
    changed = speaking(OTHER_CID)  # which it has not told yet
    await network.register(await start_node(changed), "legal", adapters={"legal": LEGAL_CID})
    await network.register_lora("legal", NEXT_CID)
    answer = await ask(network, lora_name="legal")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "node_failed")
    assert changed.seen


@pytest.mark.parametrize("back", ["register", "activate"])
async def test_what_was_withdrawn_is_not_asked_in_place_of_a_later_version(
    network: Network, start_node: StartNode, back: str
) -> None:
    await network.register_lora("legal", LEGAL_CID)
    if back == "activate":
        await network.register_lora("legal", OTHER_CID)
    old, *_ = await hold(network, start_node, LEGAL_CID)
    await network.http.post("/api/lora/legal/deactivate")
    assert (await ask(network, lora_name="legal")).status_code == 404
    if back == "activate":
        await network.http.post("/api/lora/legal/activate")
    else:
        await network.register_lora("legal", OTHER_CID)
    assert await answered_by(network) is None
    await network.register_lora("legal", NEXT_CID)
    assert await answered_by(network) is None
    assert not old.seen


async def test_a_node_known_to_hold_the_version_is_preferred(
    network: Network, start_node: StartNode
) -> None:
    old, exact = StandIn(), StandIn()
    # The registry knows the CID in its other spelling.
    await network.register_lora("legal", LEGAL_CID_V0)
    await network.register(await start_node(old), "legal", number=1)
    await network.register(
        await start_node(exact), "legal", number=2, adapters={"legal": LEGAL_CID}
    )
    for _ in range(TRIES):
        await ask(network, lora_name="legal")
    assert (len(old.seen), len(exact.seen)) == (0, TRIES)
    await network.beat(2, status="draining")
    assert (await ask(network, lora_name="legal")).headers["x-r3mes-node"] == wallet(1)


async def test_a_node_that_refuses_the_connection_costs_the_client_nothing(
    network: Network, start_node: StartNode
) -> None:
    dead = f"http://127.0.0.1:{unused_port()}"
    await network.register(dead, "legal", number=1)
    await network.register(await start_node(StandIn()), "legal", number=2)
    asking = [ask(network, lora_name="legal", message=f"question {n}") for n in range(4 * TRIES)]
    for answer in await asyncio.gather(*asking):
        assert (answer.status_code, answer.text) == (200, "hello")
        assert answer.headers["x-r3mes-node"] == wallet(2)
    metrics = (await network.http.get("/metrics")).text
    assert "r3mes_backend_dial_failures_total 0.0" not in metrics


async def test_a_node_that_failed_its_dial_is_out_until_its_next_beat(
    network: Network, start_node: StartNode
) -> None:
    port = unused_port()
    await network.register(f"http://127.0.0.1:{port}", "legal")
    assert (await ask(network, lora_name="legal")).status_code == 503
    answer = await ask(network, lora_name="legal")
    assert answer.json()["error"]["code"] == "adapter_not_ready"
    assert (await network.http.get("/v1/models")).json()["data"] == []
    metrics = (await network.http.get("/metrics")).text
    assert "r3mes_backend_dial_failures_total 1.0" in metrics

    network.clock.forward(1)
    await network.register(await start_node(StandIn()), "legal")
    assert (await ask(network, lora_name="legal")).status_code == 200


async def test_after_a_partition_all_nodes_get_their_share_at_once(
    network: Network, open_until_end: AsyncExitStack
) -> None:
    async def takes_a_while(request: Request) -> Response:
        await asyncio.sleep(0.1)
        return await says_hello(request)

    nodes = [StandIn(takes_a_while) for _ in range(3)]
    ports = [unused_port() for _ in nodes]
    for number, port in enumerate(ports, 1):
        await network.register(f"http://127.0.0.1:{port}", "legal", number=number)
    for _ in range(TRIES):
        assert (await ask(network, lora_name="legal")).status_code == 503
    network.clock.forward(300)
    assert await network.wallets() == []
    for number, (node, port) in enumerate(zip(nodes, ports, strict=True), 1):
        await open_until_end.enter_async_context(serving(node, port))
        assert (await network.beat(number)).status_code == 200
    for number in range(TRIES):
        words = [f"{number} {it}" for it in "abc"]
        told = await asyncio.gather(
            *(ask(network, lora_name="legal", message=f"after {it}") for it in words)
        )
        assert [it.text for it in told] == ["hello"] * 3
    assert [len(it.seen) for it in nodes] == [TRIES] * 3


async def test_a_node_that_says_not_now_is_passed_over(
    network: Network, start_node: StartNode
) -> None:
    full = StandIn(answers(503, {"error": "busy"}, retry_after="3"))
    await network.register(await start_node(full), "legal", number=1)
    alone = await ask(network, lora_name="legal")
    assert (alone.status_code, alone.json()) == (503, {"error": "busy"})
    assert alone.headers["retry-after"] == "3"
    await network.register(await start_node(StandIn()), "legal", number=2)
    for number in range(TRIES):  # it said for how long it is full
        answer = await ask(network, lora_name="legal", message=f"question {number}")
        assert answer.text == "hello"
    assert len(full.seen) == 1


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("full_first", [True, False])
@pytest.mark.parametrize("other", ["refuses the connection", "dies"])
async def test_beside_a_full_node_one_that_fails_does_not_hide_for_how_long(
    start_node: StartNode, status: int, full_first: bool, other: str
) -> None:
    async def dies(request: Request) -> Response:
        return DiesAfter()

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    full = await start_node(StandIn(answers(status, {"error": "busy"}, retry_after="3")))
    failing = f"http://127.0.0.1:{unused_port()}"
    if other == "dies":
        failing = await start_node(StandIn(dies))
    order = [full, failing] if full_first else [failing, full]
    balancer = Balancer()
    dialler = Dialler(
        Timeouts(),
        allow_private=True,
        resolve=resolve,
        strangers=resolve,
        dial_failed=balancer.dial_failed,
        flight=balancer.flight,
    )
    nodes = [known_at(url, number) for number, url in enumerate(order)]
    async with aclosing(dialler):
        if full_first:
            with pytest.raises(Unavailable) as caught:
                await dialler.begin(nodes, lambda node: Outgoing("/chat", [], b"{}"))
            assert caught.value.retry_after == 3
        else:
            begun = await dialler.begin(nodes, lambda node: Outgoing("/chat", [], b"{}"))
            assert (begun.response.status_code, begun.response.headers["retry-after"]) == (
                status,
                "3",
            )
            await begun.aclose()


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_what_the_backend_lacks_is_no_nodes_failure(
    network: Network, start_node: StartNode
) -> None:
    nodes = [StandIn(), StandIn()]
    for number, node in enumerate(nodes):
        await network.register(await start_node(node), "legal", number=number)
    with no_descriptor_left():
        answers = [await ask(network, lora_name="legal") for _ in range(3)]
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_socket")
        assert int(answer.headers["retry-after"]) > 0
    assert "r3mes_backend_dial_failures_total 0.0" in (await network.http.get("/metrics")).text
    assert (await ask(network, lora_name="legal")).text == "hello"


def known_at(url: str, number: int) -> KnownNode:
    return KnownNode(
        wallet_address=wallet(number),
        endpoint_url=url,
        available_lora_list=[],
        status="active",
        current_load=0,
        last_heartbeat=Clock().now,
        signature="unsigned",
    )


async def test_a_node_that_dies_before_its_first_byte_is_passed_over(
    network: Network, start_node: StartNode
) -> None:
    async def dies(request: Request) -> Response:
        return DiesAfter()

    dying = StandIn(dies)
    await network.register(await start_node(dying), "legal", number=1)
    alone = await ask(network, lora_name="legal")
    assert alone.status_code == 502
    assert alone.json()["error"]["code"] == "node_failed"
    await network.register(await start_node(StandIn()), "legal", number=2)
    # at once: one after the other all go to whichever of the two seems a little faster
    asking = [ask(network, lora_name="legal", message=f"question {n}") for n in range(4 * TRIES)]
    assert [it.text for it in await asyncio.gather(*asking)] == ["hello"] * 4 * TRIES
    assert len(dying.seen) > 1


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/chat", {"message": "hi", "lora_name": "legal"}),
        ("/v1/completions", {"prompt": "hi", "model": "legal"}),
    ],
)
async def test_a_conversation_is_with_the_node_that_began_to_answer(
    network: Network, start_node: StartNode, path: str, asked: dict[str, object]
) -> None:
    async def dies(request: Request) -> Response:
        return DiesAfter()

    assert network.app
    conversations = network.app.state.backend.balancer._conversations
    await network.register(await start_node(StandIn(dies)), "legal", number=1)
    assert (await network.http.post(path, json=asked)).status_code == 502
    assert not conversations._wallets
    await network.register(await start_node(StandIn()), "legal", number=2)
    assert (await network.http.post(path, json=asked)).status_code == 200
    assert [*conversations._wallets.values()] == [wallet(2)]


@pytest.mark.parametrize("status", [401, 403])
async def test_a_node_that_refuses_its_access_key_says_nothing_of_the_clients(
    start_backend: StartBackend,
    start_node: StartNode,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    secret, own = "clients-key-12345", "nodes-own-key-67890"
    locked = StandIn(answers(status, {"error": f"wrong key {own}"}))
    network = await start_backend(api_keys=[secret])
    await network.register(await start_node(locked), "legal", access_key=own)
    network.http.headers["authorization"] = f"Bearer {secret}"
    for path in ("/chat", "/v1/completions"):
        asked = {"message": "hi", "lora_name": "legal", "prompt": "hi", "model": "legal"}
        answer = await network.http.post(path, json=asked)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "node_failed")
        assert "key" not in answer.text
    assert f"node {wallet(1)} gave no answer" in caplog.text
    assert "it wants another access key" in caplog.text
    assert own not in caplog.text

    full = StandIn(answers(503, {"error": "busy"}, retry_after="3"))
    await network.register(await start_node(full), "legal", number=2)
    for _ in range(TRIES):
        answer = await ask(network, lora_name="legal")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")

    await network.register(await start_node(StandIn()), "legal", number=3)
    for number in range(TRIES):
        assert (await ask(network, lora_name="legal", message=f"{number}")).text == "hello"


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500])
async def test_what_a_node_answers_is_passed_on(
    network: Network, start_node: StartNode, status: int
) -> None:
    body: dict[str, object] = {"error": "text"}
    await network.register(await start_node(StandIn(answers(status, body))), "legal")
    answer = await ask(network, lora_name="legal")
    assert (answer.status_code, answer.json()) == (status, body)


async def test_a_redirect_is_not_followed(network: Network, start_node: StartNode) -> None:
    secret = StandIn()
    target = await start_node(secret)
    bouncing = StandIn(answers(307, {}, location=f"{target}/chat"))
    await network.register(await start_node(bouncing), "legal")
    answer = await ask(network, lora_name="legal")
    assert answer.status_code == 502
    assert "location" not in answer.headers
    assert not secret.seen

    # The twin: a client that follows redirects is led to the secret.
    async with httpx.AsyncClient(trust_env=False, follow_redirects=True) as following:
        url = (await network.http.get("/api/serving-node/list")).json()["nodes"][0]["endpoint_url"]
        await following.post(f"{url}/chat", json={"message": "hi"})
    assert secret.seen


async def test_a_node_that_is_this_backend_ends_in_an_error_and_not_in_a_loop(
    network: Network,
) -> None:
    await network.register(network.url, "legal")
    answer = await ask(network, lora_name="legal")
    assert answer.status_code == 508
    assert answer.json()["error"]["code"] == "routing_loop"


async def test_a_policy_of_ones_own_chooses(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    network = await start_backend(chat={"policy": "tests.backend.test_routing:last"})
    node = StandIn()
    await network.register(await start_node(node), "a", "b", "c")
    assert (await ask(network)).status_code == 200
    assert node.seen[0].header("x-adapter") == ["c"]


def last(message: str, adapters: list[str]) -> str | None:
    return adapters[-1]


async def test_an_adapter_named_with_its_cid_needs_exactly_that_one(
    network: Network, start_node: StartNode
) -> None:
    silent, exact = StandIn(), StandIn()
    await network.register(await start_node(silent), "legal", number=1)
    url = await start_node(exact)
    await network.register(url, "legal", number=2, adapters={"legal": LEGAL_CID})
    body = {"model": f"legal@{LEGAL_CID}", "prompt": "hi"}
    for _ in range(TRIES):
        answer = await network.http.post("/v1/completions", json=body)
        assert answer.headers["x-r3mes-node"] == wallet(2)
    assert json.loads(exact.seen[0].body) == body
    other = {"model": f"legal@{OTHER_CID}", "prompt": "hi"}
    assert (await network.http.post("/v1/completions", json=other)).status_code == 503


async def test_a_refusal_that_is_passed_on_leaves_nothing_in_flight(
    network: Network, start_node: StartNode
) -> None:
    full = StandIn(answers(429, {"error": "busy"}))
    await network.register(await start_node(full), "legal", number=1)
    assert network.app
    backend = network.app.state.backend
    for _ in range(3):
        assert (await ask(network, lora_name="legal")).status_code == 429
    [node] = await backend.live_nodes()
    assert backend.balancer.state(node).in_flight == 0
