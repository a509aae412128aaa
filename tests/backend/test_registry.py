"""What the registry keeps of an adapter, and who may change it."""

from dataclasses import replace
from typing import Any

import httpx
import pytest

from r3mes_vllm.backend import loras
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.signing import Sent, SigningNode, code, deliver
from tests.backend.stand_ins import LEGAL_CID, OTHER_CID, Network, StandIn

ON_BOTH = True
BOTH = pytest.mark.parametrize("protected", [True, False])
TAKEN = (200, "")
WRONG_KEY = (403, "wrong_key")
NO_KEY = (401, "unauthorized")
ADMIN = {"Authorization": "Bearer admin-key"}
REGISTER = "/api/lora/register"
ACTIONS = ["register", "deactivate", "activate"]


def request(author: SigningNode, action: str, cid: str = OTHER_CID, name: str = "legal") -> Sent:
    if action == "register":
        return author.signed(REGISTER, {"name": name, "ipfs_hash": cid})
    return author.signed(f"/api/lora/{name}/{action}", {})


async def listed(network: Network, **query: Any) -> list[dict[str, Any]]:
    answer = await network.http.get("/api/lora/list", params=query)
    found: list[dict[str, Any]] = answer.json()
    return found


async def names(network: Network, **query: Any) -> list[str]:
    return [lora["name"] for lora in await listed(network, **query)]


async def as_admin(network: Network, sent: Sent) -> httpx.Response:
    return await deliver(network, replace(sent, headers=sent.headers | ADMIN))


async def test_what_an_adapter_is_made_of_is_kept(network: Network) -> None:
    facts: dict[str, Any] = {"base_model": "org/base", "size_bytes": 5 << 30, "rank": 16}
    await network.register_lora("legal", **facts)
    (lora,) = await listed(network)
    assert lora.items() >= facts.items()
    await network.register_lora("legal")  # as an existing publisher does
    (lora,) = await listed(network)
    assert {lora[name] for name in facts} == {None}


async def test_every_cid_of_a_name_is_kept(network: Network) -> None:
    for cid, version in ((LEGAL_CID, "1"), (OTHER_CID, "2"), (LEGAL_CID, "1")):
        await network.register_lora("legal", cid, version=version)
        network.clock.forward(60)
    await network.register_lora("medical")
    found = (await network.http.get("/api/lora/legal/versions")).json()
    assert found == [
        {
            "ipfs_hash": OTHER_CID,
            "version": "2",
            "registered_at": "2026-01-01T00:01:00Z",
            "current": False,
        },
        {
            "ipfs_hash": LEGAL_CID,
            "version": "1",
            "registered_at": "2026-01-01T00:00:00Z",
            "current": True,
        },
    ]


@pytest.mark.parametrize(
    ("method", "route"), [("GET", "versions"), ("POST", "deactivate"), ("POST", "activate")]
)
async def test_a_name_that_nobody_registered_is_404(
    network: Network, method: str, route: str
) -> None:
    for name, status in (("nobody", 404), ("a" * 5000, 422), ("%00", 422), ("a%2Fb", 404)):
        answer = await network.http.request(method, f"/api/lora/{name}/{route}")
        assert answer.status_code == status


async def test_the_list_is_filtered_by_category(network: Network) -> None:
    await network.register_lora("one", category="legal")
    await network.register_lora("two", category="medical")
    await network.register_lora("three", category="legal")
    assert await names(network, category="legal") == ["one", "three"]
    assert await names(network, category="LEGAL") == []
    assert await names(network, category="") == []
    assert await names(network) == ["one", "two", "three"]
    await network.http.post("/api/lora/three/deactivate")
    assert await names(network, category="legal") == ["one"]
    assert await names(network, category="legal", active_only=False) == ["one", "three"]


async def test_the_list_is_sent_again_only_when_it_has_changed(network: Network) -> None:
    await network.register_lora("legal")
    first = await network.http.get("/api/lora/list")
    known = {"If-None-Match": first.headers["etag"]}
    again = await network.http.get("/api/lora/list", headers=known)
    assert (again.status_code, again.content) == (304, b"")
    await network.http.post("/api/lora/legal/deactivate")
    changed = await network.http.get("/api/lora/list", headers=known)
    assert (changed.status_code, changed.json()) == (200, [])


@BOTH
async def test_a_deactivated_adapter_is_neither_listed_nor_routed(
    network: Network, start_node: StartNode, protected: bool
) -> None:
    await network.register_lora("legal")
    node = StandIn()
    await network.register(await start_node(node), "legal", adapters={"legal": LEGAL_CID})
    if protected:
        answer = await network.http.post("/api/lora/legal/deactivate")
        assert answer.json() == {"success": True, "action": "deactivated", "lora_id": 1}
    asked = [
        await network.http.post("/chat", json={"message": "contract", "lora_name": "legal"}),
        await network.http.post("/v1/completions", json={"model": "legal", "prompt": "x"}),
        await network.http.post("/v1/completions", json={"model": f"legal@{LEGAL_CID}"}),
        await network.http.get("/v1/models/legal"),
    ]
    assert {it.status_code for it in asked} == {404 if protected else 200}
    assert bool(await network.wallets(lora="legal")) != protected
    assert bool(await names(network)) != protected
    assert len(await names(network, active_only=False)) == 1
    # Its words choose it no longer; the node answers with what it takes.
    await network.http.post("/chat", json={"message": "contract"})
    assert node.seen[-1].header("x-adapter") == ([] if protected else ["legal"])
    answer = await network.http.post("/api/lora/legal/activate")
    assert answer.json() == {"success": True, "action": "activated", "lora_id": 1}
    answer = await network.http.post("/chat", json={"message": "hi", "lora_name": "legal"})
    assert answer.text == "hello"


async def test_registering_a_deactivated_adapter_activates_it(network: Network) -> None:
    await network.register_lora("legal")
    await network.http.post("/api/lora/legal/deactivate")
    await network.register_lora("legal")
    assert await names(network) == ["legal"]


@BOTH
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_name_belongs_to_the_key_that_registered_it(
    network: Network, monkeypatch: pytest.MonkeyPatch, action: str, protected: bool
) -> None:
    if not protected:
        monkeypatch.setattr(loras, "refusal", lambda *args: None)
    owner, other = SigningNode(network), SigningNode(network)
    assert code(await deliver(network, request(owner, "register", LEGAL_CID))) == TAKEN
    assert (await listed(network))[0]["owner"] == owner.identity.public_key.hex()
    refused = WRONG_KEY if protected else TAKEN
    assert code(await deliver(network, request(other, action))) == refused
    unsigned = request(owner, action).without_signature()
    assert code(await deliver(network, unsigned)) == refused
    (lora,) = await listed(network, active_only=False)
    untouched = (lora["ipfs_hash"], lora["active"]) == (LEGAL_CID, True)
    assert untouched == (protected or action == "activate")
    assert code(await deliver(network, request(owner, action))) == TAKEN


@BOTH
@pytest.mark.parametrize("action", ACTIONS)
async def test_an_owners_request_is_taken_once(
    network: Network, monkeypatch: pytest.MonkeyPatch, action: str, protected: bool
) -> None:
    if not protected:
        monkeypatch.setattr(loras, "is_later", lambda *args: True)
    owner = SigningNode(network)
    await deliver(network, request(owner, "register", LEGAL_CID))
    sent = request(owner, action)
    assert code(await deliver(network, sent)) == TAKEN
    assert code(await deliver(network, sent)) == ((403, "replayed") if protected else TAKEN)
    assert code(await deliver(network, request(owner.restarted(), "register"))) == TAKEN
    assert code(await deliver(network, sent)) == ((403, "replayed") if protected else TAKEN)


async def test_a_signature_for_one_name_is_none_for_another(network: Network) -> None:
    owner = SigningNode(network)
    for name in ("legal", "medical"):
        await deliver(network, request(owner, "register", name=name))
    sent = replace(request(owner, "deactivate"), path="/api/lora/medical/deactivate")
    assert code(await deliver(network, sent)) == (401, "bad_signature")


async def test_a_name_that_was_registered_unsigned_stays_everybodys(network: Network) -> None:
    """As before, where there is no admin: nobody can sign it away from its publisher."""
    await network.register_lora("legal")
    signer = SigningNode(network)
    for action in ACTIONS:
        assert code(await deliver(network, request(signer, action))) == TAKEN
    assert (await listed(network))[0]["owner"] is None
    await network.register_lora("legal", LEGAL_CID)
    assert (await listed(network))[0]["ipfs_hash"] == LEGAL_CID


async def test_with_an_admin_new_names_need_him_and_then_their_owner(
    start_backend: StartBackend,
) -> None:
    network = await start_backend(admin_key="admin-key")
    owner, other = SigningNode(network), SigningNode(network)
    assert code(await deliver(network, request(owner, "register"))) == NO_KEY
    assert await names(network, active_only=False) == []
    assert code(await as_admin(network, request(owner, "register"))) == TAKEN
    for action in ACTIONS:
        assert code(await deliver(network, request(owner, action))) == TAKEN
        assert code(await deliver(network, request(other, action))) == WRONG_KEY
        unsigned = request(owner, action).without_signature()
        assert code(await deliver(network, unsigned)) == NO_KEY
        # The admin may, and whatever he signs with, it stays its owner's.
        assert code(await as_admin(network, unsigned)) == TAKEN
        assert code(await as_admin(network, request(other, action))) == TAKEN
        assert code(await as_admin(network, request(other, "activate"))) == TAKEN
    assert (await listed(network))[0]["owner"] == owner.identity.public_key.hex()


async def test_the_admin_gives_an_owner_to_a_name_that_has_none(
    start_backend: StartBackend,
) -> None:
    network = await start_backend(admin_key="admin-key")
    owner = SigningNode(network)
    unsigned = request(owner, "register").without_signature()
    assert code(await as_admin(network, unsigned)) == TAKEN
    assert code(await deliver(network, request(owner, "register"))) == NO_KEY
    assert code(await as_admin(network, request(owner, "register"))) == TAKEN
    assert code(await deliver(network, request(owner, "register"))) == TAKEN


@BOTH
async def test_what_the_admin_deactivates_its_owner_does_not_activate(
    start_backend: StartBackend, protected: bool
) -> None:
    """In the twin its owner did it himself."""
    network = await start_backend(admin_key="admin-key")
    owner = SigningNode(network)
    await as_admin(network, request(owner, "register"))
    out = request(owner, "deactivate")
    await (as_admin(network, out) if protected else deliver(network, out))
    for action in ("activate", "register"):
        answer = await deliver(network, request(owner, action))
        assert code(answer) == ((403, "deactivated") if protected else TAKEN)
    assert bool(await names(network)) != protected
    assert code(await as_admin(network, request(owner, "activate"))) == TAKEN
    assert code(await deliver(network, request(owner, "register"))) == TAKEN


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_model", "x" * 257),
        ("base_model", 1),
        ("size_bytes", -1),
        ("size_bytes", 2**63),
        ("size_bytes", "1"),
        ("size_bytes", 1.5),
        ("rank", 0),
        ("rank", True),
        ("rank", 2**31),
    ],
)
async def test_facts_that_can_not_be_are_refused(
    network: Network, field: str, value: object
) -> None:
    body = {"name": "legal", "ipfs_hash": LEGAL_CID, field: value}
    answer = await network.http.post(REGISTER, json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == field
