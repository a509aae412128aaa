"""Who may speak for a node. Each protection has its twin: switched off, the wrong one gets in."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import true

from r3mes_vllm import signatures
from r3mes_vllm.backend import claims, signed
from r3mes_vllm.backend import network as backend_network
from r3mes_vllm.backend.app import create_app
from r3mes_vllm.settings import load
from tests.backend.conftest import MakeDatabase, StartBackend, StartNode
from tests.backend.signing import FIELDS, Sent, SigningNode, code, deliver, identity
from tests.backend.stand_ins import Network, StandIn, serving, wallet

ON_BOTH = True

WHATS = list(FIELDS)
BAD = (401, "bad_signature")
WRONG_KEY = (403, "wrong_key")
REPLAYED = (403, "replayed")
TAKEN = (200, "")
BOTH = pytest.mark.parametrize("protected", [True, False])


def switch(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, instead: Any) -> None:
    monkeypatch.setattr(module, name, lambda *args: instead)


async def test_a_signed_node_registers_beats_and_leaves(network: Network) -> None:
    node = SigningNode(network)
    for what in WHATS:
        assert code(await node.send(what)) == TAKEN
        if what == "register":
            assert (await node.listed())["signature"] in ("signed", "unproven")
    assert await network.wallets() == []


async def test_a_node_that_does_not_sign_is_taken_as_before(network: Network) -> None:
    await network.register("http://127.0.0.1:9", "legal")
    assert (await network.beat()).status_code == 200
    nodes = (await network.http.get("/api/serving-node/list")).json()["nodes"]
    assert [node["signature"] for node in nodes] == ["unsigned"]


@BOTH
@pytest.mark.parametrize("header", ["Key", "Signature", "Time", "Boot", "Sequence"])
async def test_a_signature_is_of_each_of_its_headers(
    network: Network, monkeypatch: pytest.MonkeyPatch, header: str, protected: bool
) -> None:
    if not protected:
        switch(monkeypatch, signatures, "is_signed", True)
    # A wallet that was not derived from a key: nothing but the signature protects it.
    node, name = SigningNode(network, wallet=wallet(1)), f"X-R3MES-{header}"
    sent = node.request("register")
    value = sent.headers[name]
    other = value[:-1] + ("1" if value[-1] != "1" else "2")
    answer = await deliver(network, replace(sent, headers=sent.headers | {name: other}))
    assert code(answer) == (BAD if protected else TAKEN)
    if protected:
        assert answer.headers["www-authenticate"] == "R3MES-Signature"
        assert await network.wallets() == []


@BOTH
@pytest.mark.parametrize("what", WHATS)
async def test_a_signature_is_of_the_body_and_the_path(
    network: Network, monkeypatch: pytest.MonkeyPatch, what: str, protected: bool
) -> None:
    node = SigningNode(network)
    await node.send("register")
    if not protected:
        switch(monkeypatch, signatures, "is_signed", True)
    other_body = json.dumps(json.loads(node.request(what).body) | {"more": 1}).encode()
    changed = replace(node.request(what), body=other_body)
    assert code(await deliver(network, changed)) == (BAD if protected else TAKEN)
    beat = replace(node.request("heartbeat"), path="/api/serving-node/deregister")
    assert code(await deliver(network, beat)) == (BAD if protected else TAKEN)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-R3MES-Key", None),
        ("X-R3MES-Key", "00" * 31),
        ("X-R3MES-Key", "zz" * 32),
        ("X-R3MES-Key", "ff" * 32),
        ("X-R3MES-Signature", None),
        ("X-R3MES-Signature", ""),
        ("X-R3MES-Time", None),
        ("X-R3MES-Time", "-1"),
        ("X-R3MES-Time", "1e9"),
        ("X-R3MES-Time", "9" * 5000),
        ("X-R3MES-Boot", "x" * 32),
        ("X-R3MES-Boot", None),
        ("X-R3MES-Sequence", "0"),
        ("X-R3MES-Sequence", "01"),
        ("X-R3MES-Sequence", "9" * 19),
        ("X-R3MES-Sequence", None),
    ],
)
async def test_headers_of_another_form_are_refused_and_not_overlooked(
    network: Network, name: str, value: str | None
) -> None:
    sent = SigningNode(network).request("register")
    headers = {key: it for key, it in sent.headers.items() if key != name}
    headers |= {} if value is None else {name: value}
    assert code(await deliver(network, replace(sent, headers=headers))) == BAD


@BOTH
@pytest.mark.parametrize("late_s", [-61, 61, 3600])
async def test_a_request_of_another_time_is_refused(
    network: Network, monkeypatch: pytest.MonkeyPatch, late_s: float, protected: bool
) -> None:
    if not protected:
        switch(monkeypatch, signed, "check_time", None)
    node = SigningNode(network)
    answer = await node.send("register", late_s=late_s)
    assert code(answer) == (BAD if protected else TAKEN)
    if protected:
        assert ("after" if late_s < 0 else "before") in answer.json()["error"]["message"]


@pytest.mark.parametrize("late_s", [-60, 60])
async def test_clocks_may_differ_by_a_minute(network: Network, late_s: float) -> None:
    assert code(await SigningNode(network).send("register", late_s=late_s)) == TAKEN


@BOTH
@pytest.mark.parametrize("what", WHATS)
async def test_a_request_is_taken_once(
    network: Network, monkeypatch: pytest.MonkeyPatch, what: str, protected: bool
) -> None:
    if not protected:
        switch(monkeypatch, claims, "is_later", true())
    node = SigningNode(network)
    await node.send("register")
    overtaken, sent = node.request(what), node.request(what)
    assert code(await deliver(network, sent)) == TAKEN
    for again in (sent, overtaken):
        assert code(await deliver(network, again)) == (REPLAYED if protected else TAKEN)
    assert code(await node.send(what)) == TAKEN


@BOTH
async def test_of_equal_requests_at_once_one_is_taken(
    start_backend: StartBackend, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    """By two backends on one database."""
    if not protected:
        switch(monkeypatch, claims, "is_later", true())
    backends = [await start_backend(), await start_backend()]
    node = SigningNode(backends[0])
    await node.send("register")
    for what in WHATS:
        sent = node.request(what)
        answers = await asyncio.gather(*(deliver(it, sent) for it in backends * 10))
        taken = [code(it) for it in answers].count(TAKEN)
        assert taken == (1 if protected else 20)


@BOTH
@pytest.mark.parametrize("what", WHATS)
async def test_what_signed_once_is_not_heard_unsigned(
    network: Network, monkeypatch: pytest.MonkeyPatch, what: str, protected: bool
) -> None:
    node = SigningNode(network)
    await node.send("register")
    if not protected:
        switch(monkeypatch, claims, "may_change", true())
    unsigned = node.request(what, endpoint_url="http://127.0.0.1:6").without_signature()
    assert code(await deliver(network, unsigned)) == (WRONG_KEY if protected else TAKEN)
    if protected:
        assert (await node.listed())["endpoint_url"] == "http://127.0.0.1:9"


@BOTH
@pytest.mark.parametrize("what", WHATS)
async def test_a_wallet_belongs_to_the_first_key_that_signs_for_it(
    network: Network, monkeypatch: pytest.MonkeyPatch, what: str, protected: bool
) -> None:
    node, other = (SigningNode(network, wallet=wallet(1)) for _ in range(2))
    await node.send("register")
    if not protected:
        switch(monkeypatch, claims, "may_change", true())
    assert code(await other.send(what)) == (WRONG_KEY if protected else TAKEN)


@BOTH
async def test_a_wallet_derived_from_a_key_belongs_to_that_key(
    network: Network, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    if not protected:
        switch(monkeypatch, backend_network, "check_wallet", None)
    node = SigningNode(network)
    thief = SigningNode(network, wallet=node.wallet)
    assert code(await thief.send("register")) == (WRONG_KEY if protected else TAKEN)
    # Whoever had it unsigned gives way.
    if protected:
        assert code(await deliver(network, thief.request("register").without_signature())) == TAKEN
    assert code(await node.send("register")) == (TAKEN if protected else WRONG_KEY)


async def test_a_node_that_signs_from_now_on_registers_anew(network: Network) -> None:
    node = SigningNode(network)
    unsigned = node.request("register").without_signature()
    assert code(await deliver(network, unsigned)) == TAKEN
    assert (await node.send("heartbeat")).status_code == 404
    assert (await node.listed())["signature"] == "unsigned"
    assert code(await node.send("register")) == TAKEN
    assert code(await node.send("heartbeat")) == TAKEN
    assert code(await deliver(network, unsigned)) == WRONG_KEY


@BOTH
async def test_nobody_signs_a_wallet_away_from_a_node_that_beats(
    network: Network, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    if not protected:
        switch(monkeypatch, claims, "is_silent", true())
    await network.register("http://127.0.0.1:9", "legal")
    network.clock.forward(59)
    leaving = {"wallet_address": wallet(1)}
    await network.http.post("/api/serving-node/deregister", json=leaving)  # by anyone
    thief = SigningNode(network, wallet=wallet(1))
    assert code(await thief.send("register")) == (WRONG_KEY if protected else TAKEN)
    assert (await network.beat()).status_code == (200 if protected else 403)
    # Nobody beats for it any more: the first that signs has it.
    network.clock.forward(60)
    assert code(await thief.send("register")) == TAKEN
    assert (await network.beat()).status_code == 403


@BOTH
async def test_a_restart_of_the_backend_forgets_nothing(
    make_database: MakeDatabase, start_backend: StartBackend, protected: bool
) -> None:
    """The twin has another database."""
    url = make_database()
    settings = load({"database_url": url, "allow_private_nodes": True})
    network = await start_backend()
    node = SigningNode(network)
    sent = [node.request("register"), node.request("heartbeat")]
    async with serving(create_app(settings, clock=network.clock)) as before:
        for it in sent:
            answer = await network.http.post(before + it.path, content=it.body, headers=it.headers)
            assert code(answer) == TAKEN
    if not protected:
        settings = load({"allow_private_nodes": True, "database_url": make_database()})
    async with serving(create_app(settings, clock=network.clock)) as after:

        async def again(it: Sent) -> tuple[int, str]:
            answer = await network.http.post(after + it.path, content=it.body, headers=it.headers)
            return code(answer)

        unsigned = node.request("register").without_signature()
        assert [await again(it) for it in sent] == ([REPLAYED] * 2 if protected else [TAKEN] * 2)
        assert await again(unsigned) == WRONG_KEY
        assert await again(node.request("heartbeat")) == TAKEN


@BOTH
async def test_a_restart_of_the_node_ends_its_boot_before(
    network: Network, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    if not protected:
        switch(monkeypatch, claims, "is_later", true())
    before = SigningNode(network)
    await before.send("register")
    before.sequence = 1000
    after = before.restarted()
    assert code(await after.send("register")) == TAKEN
    # What was held back, and what the process before says now.
    for what in WHATS:
        assert code(await before.send(what)) == (REPLAYED if protected else TAKEN)
    assert code(await after.send("heartbeat")) == TAKEN


@BOTH
async def test_a_boot_of_the_future_keeps_no_later_one_out(
    network: Network, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    if not protected:
        switch(monkeypatch, signed, "check_time", None)
        switch(monkeypatch, claims, "not_yet", "g")
    year = signatures.new_boot(network.clock().timestamp() + 365 * 86_400)
    node = SigningNode(network, boot=year)
    assert code(await node.send("register")) == (BAD if protected else TAKEN)
    assert code(await node.restarted().send("register")) == (TAKEN if protected else REPLAYED)


@BOTH
@pytest.mark.parametrize("hours", [1, 24 * 365])
async def test_a_clock_that_is_set_back_keeps_no_node_out(
    network: Network, monkeypatch: pytest.MonkeyPatch, hours: int, protected: bool
) -> None:
    if not protected:
        switch(monkeypatch, claims, "not_yet", "g")
    before = SigningNode(network)
    assert code(await before.send("register")) == TAKEN
    network.clock.forward(-3600 * hours)
    after = before.restarted()
    for what in WHATS:
        assert code(await after.send(what)) == (TAKEN if protected else REPLAYED)
    again = after.request("register")
    assert code(await deliver(network, again)) == (TAKEN if protected else REPLAYED)
    assert code(await deliver(network, again)) == REPLAYED


async def test_what_another_clock_may_have_seen_is_not_taken_for_a_clock_set_back(
    network: Network,
) -> None:
    """A backend a minute ahead, and a boot a minute after a request of a minute ago."""
    ahead = signatures.new_boot(network.clock().timestamp() + 119)
    later = SigningNode(network, boot=ahead)
    network.clock.forward(60)
    assert code(await later.send("register")) == TAKEN
    network.clock.forward(-60)
    assert code(await later.restarted().send("register")) == REPLAYED


@BOTH
async def test_a_backend_may_insist_on_signatures(
    start_backend: StartBackend, start_node: StartNode, protected: bool
) -> None:
    lax = await start_backend()
    url = await start_node(StandIn())
    await lax.register(url, "legal")  # in the same database, before
    network = await start_backend(require_signatures=protected)
    node = SigningNode(network)
    assert (await network.beat()).status_code == (401 if protected else 200)
    unsigned = await deliver(network, node.request("register").without_signature())
    assert code(unsigned) == (BAD if protected else TAKEN)
    if protected:
        assert "signed requests only" in unsigned.json()["error"]["message"]
    answer = await network.http.post("/chat", json={"message": "hi", "lora_name": "legal"})
    assert answer.status_code == (503 if protected else 200)
    assert code(await node.send("register")) == TAKEN


async def test_requests_that_name_no_wallet_of_ones_own_change_nothing(network: Network) -> None:
    """A valid signature is not enough: it must be the wallet's."""
    node, other = SigningNode(network), SigningNode(network, identity())
    await node.send("register")
    await other.send("register")
    for what in WHATS:
        answer = await other.send(what, wallet_address=node.wallet)
        assert code(answer) == WRONG_KEY
    assert (await node.listed())["status"] == "active"
