"""The key by which a node's own backend may use it: it goes to that node and nowhere else."""

import logging

import pytest

from r3mes_vllm.backend import dial
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.signing import SigningNode, proves, some_key
from tests.backend.stand_ins import Network, StandIn, answers, wallet

CLIENTS = {"Authorization": "Bearer client-key", "X-API-Key": "client-key"}
PATHS = ["/chat", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("signs", [True, False])
async def test_a_node_gets_its_own_key_and_never_a_clients(
    start_backend: StartBackend, start_node: StartNode, path: str, signs: bool
) -> None:
    network = await start_backend(api_keys=["client-key"])
    node = SigningNode(network)
    place = StandIn(proves(node.identity))
    url, key = await start_node(place), some_key()
    if signs:
        await node.register(url, "legal", access_key=key)
        await node.settled()
    else:
        await network.register(url, "legal", access_key=key)
    body = {"message": "hi", "model": "legal"}
    for headers in (CLIENTS, {"X-API-Key": "client-key"}):
        answer = await network.http.post(path, json=body, headers=headers)
        assert answer.text == "hello"
    challenges, chats = place.seen[:-2], place.seen[-2:]
    assert [seen.header("authorization") for seen in chats] == [[f"Bearer {key}"]] * 2
    for seen in chats:
        assert b"client-key" not in b" ".join(value for _, value in seen.headers)
    # Whoever is there has not proved yet that it is the node.
    assert [seen.header("authorization") for seen in challenges] == ([[]] if signs else [])


async def test_each_node_gets_the_key_it_gave(network: Network, start_node: StartNode) -> None:
    keys = [some_key(), some_key(), None]
    nodes = [StandIn(answers(503, {})), StandIn(answers(503, {})), StandIn(answers(503, {}))]
    for number, (node, key) in enumerate(zip(nodes, keys, strict=True)):
        more = {"access_key": key} if key else {}
        await network.register(await start_node(node), "legal", number=number, **more)
    await network.http.post("/chat", json={"message": "hi"})
    for node, key in zip(nodes, keys, strict=True):
        assert node.seen[0].header("authorization") == ([f"Bearer {key}"] if key else [])


async def test_a_key_does_not_follow_a_wallet_to_another_url(
    network: Network, start_node: StartNode
) -> None:
    """Registered without a key, there is none."""
    await network.register(await start_node(StandIn()), "legal", access_key=some_key())
    place = StandIn()
    await network.register(await start_node(place), "legal")
    await network.http.post("/chat", json={"message": "hi"})
    assert place.seen[0].header("authorization") == []


@pytest.mark.parametrize("protected", [True, False])
async def test_without_it_a_node_with_keys_is_of_no_use_to_its_backend(
    network: Network, start_node: StartNode, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    """The twin: the dial leaves the key out."""
    if not protected:
        monkeypatch.setattr(dial, "bearer", lambda key: [])
    place = StandIn()
    await network.register(await start_node(place), "legal", access_key=some_key())
    await network.http.post("/chat", json={"message": "hi"})
    assert bool(place.seen[0].header("authorization")) == protected


async def test_the_key_is_shown_nowhere(
    network: Network, start_node: StartNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    node, key = SigningNode(network), some_key()
    registered = await node.send("register", access_key=key, endpoint_url="http://127.0.0.1:9")
    shown = [registered.text, str((await node.settled())["signature_reason"])]
    for path in ("/api/serving-node/list", "/", "/metrics", "/health", "/v1/models"):
        shown.append((await network.http.get(path)).text)
    shown.append((await network.http.post("/chat", json={"message": "hi"})).text)
    for wrong in (f"{key} {key}", f"{key}\r\nX: y", f"{key}ä", key[:15], key * 9):
        answer = await node.send("register", access_key=wrong)
        assert answer.status_code == 422
        assert answer.json()["error"]["field"] == "access_key"
        shown.append(answer.text)
    again = await node.send("register", access_key=key, endpoint_url="ftp://x")
    shown.append(again.text)
    assert wallet(1) not in shown[0]
    for text in [*shown, *caplog.messages]:
        assert key[:15] not in text
