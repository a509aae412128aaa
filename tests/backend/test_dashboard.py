"""What the dashboard says, and what it never does. How it looks and works in a browser is in
test_dashboard_page.py."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from r3mes_vllm import wire
from r3mes_vllm.backend.dashboard import page, view
from r3mes_vllm.backend.dashboard.traffic import SLOT_S, SLOTS, Traffic
from r3mes_vllm.backend.refusals import DatabaseDown
from r3mes_vllm.backend.registry import Registry
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.signing import SigningNode, some_key
from tests.backend.stand_ins import (
    LEGAL_CID,
    OTHER_CID,
    Network,
    StandIn,
    answers,
    unused_port,
    wallet,
)

ROOT = Path(__file__).parents[2]
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>$key${key}"


@pytest.fixture(autouse=True)
def _always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "_FRESH_S", 0)
    monkeypatch.setattr(view, "_SHARE", 0)


async def shown(network: Network) -> dict[str, Any]:
    answer = await network.http.get("/dashboard/data")
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    body: dict[str, Any] = answer.json()
    return body


async def node(network: Network, number: int = 1) -> dict[str, str]:
    lines = (await shown(network))["nodes"]
    return next(line for line in lines if line["key"] == wallet(number))


async def adapter(network: Network, name: str = "legal") -> dict[str, Any]:
    lines = (await shown(network))["adapters"]
    return next(line for line in lines if line["key"] == name)


async def test_a_live_node_is_shown_with_what_it_says(network: Network) -> None:
    await network.register(
        "http://127.0.0.1:1", "legal", "medical", base_model="base", version="0.1.0"
    )
    await network.beat(current_load=2.5)
    network.clock.forward(7)
    line = await node(network)
    assert line["health"] == "live"
    assert line["reason"] == ""
    assert line["adapters"] == "legal, medical"
    assert (line["version"], line["base"]) == ("0.1.0", "base")
    assert line["beat"] == "7 s ago"
    assert line["load"] == "0 in flight"
    assert line["speed"].startswith("reports 2.5, ")
    assert line["endpoint"] == "http://127.0.0.1:1"
    assert (await shown(network))["headline"] == "The one node takes requests"


@pytest.mark.parametrize(
    ("status", "silent_s", "health", "reason"),
    [
        ("active", 59, "live", ""),
        ("active", 75, "stale", "Taken for dead: no beat for 75 s."),
        ("active", 7300, "stale", "Taken for dead: no beat for 2 h."),
        ("draining", 1, "draining", "It is draining: it ends its answers and takes no new "),
        ("busy", 1, "draining", "Its status is “busy”; only “active” gets requests."),
        ("offline", 300, "offline", "It left the network. Its last beat was 5 min ago."),
    ],
)
async def test_why_a_node_gets_no_requests(
    network: Network, status: str, silent_s: float, health: str, reason: str
) -> None:
    await network.register("http://127.0.0.1:1", "legal")
    await network.beat(status=status)
    network.clock.forward(silent_s)
    line = await node(network)
    assert line["health"] == health
    assert line["reason"].startswith(reason)
    assert bool(line["reason"]) == bool(reason)
    said = {"live": "The one node takes requests", "offline": "No node is in the network now"}
    headline = (await shown(network))["headline"]
    assert headline == said.get(health, "0 of 1 nodes take requests")


async def test_a_node_without_a_proof_says_so(network: Network) -> None:
    signing = SigningNode(network)
    await signing.register(f"http://127.0.0.1:{unused_port()}", "legal")
    await signing.settled()
    (line,) = (await shown(network))["nodes"]
    assert line["health"] == "unproven"
    assert "/identity: no answer" in line["reason"]


async def test_where_all_must_sign_an_unsigned_node_says_so(start_backend: StartBackend) -> None:
    await (await start_backend()).register("http://127.0.0.1:1", "legal")
    strict = await start_backend(require_signatures=True)  # on the same database
    line = await node(strict)
    assert line["health"] == "unproven"
    assert "does not sign" in line["reason"]


async def test_a_node_that_could_not_be_dialled_says_so_until_it_beats(network: Network) -> None:
    await network.register(f"http://127.0.0.1:{unused_port()}", "legal")
    assert (await network.http.post("/chat", json={"message": "hi"})).status_code == 503
    line = await node(network)
    assert line["health"] == "ejected"
    assert line["reason"]
    assert (await adapter_or_none(network)) is None
    network.clock.forward(1)
    await network.beat()
    assert (await node(network))["health"] == "live"


async def adapter_or_none(network: Network) -> dict[str, Any] | None:
    return next(iter((await shown(network))["adapters"]), None)


async def test_a_node_with_another_version_is_not_asked_for_it(network: Network) -> None:
    await network.register_lora("legal")
    await network.register("http://127.0.0.1:1", "legal", adapters={"legal": LEGAL_CID})
    await network.register("http://127.0.0.1:2", "legal", number=2, adapters={"legal": OTHER_CID})
    assert (await node(network))["reason"] == ""
    assert (await node(network, 2))["health"] == "live"
    assert (await node(network, 2))["reason"] == "Not asked for legal: it holds another version."
    line = await adapter(network)
    assert (line["holders"], line["others"]) == ("1", "1 other with another version")


async def test_a_node_that_goes_on_with_the_version_before_has_no_reason(network: Network) -> None:
    await network.register_lora("legal")
    await network.register("http://127.0.0.1:1", "legal", adapters={"legal": LEGAL_CID})
    await network.register_lora("legal", OTHER_CID)
    assert (await node(network))["reason"] == ""
    line = await adapter(network)
    assert (line["holders"], line["others"]) == ("0", "1 other with another version")


async def test_an_adapter_is_shown_with_its_versions_and_its_requests(
    network: Network, start_node: StartNode
) -> None:
    url = await start_node(StandIn())
    await network.register(url, "legal", base_model="base", adapters={"legal": OTHER_CID})
    await network.register_lora("legal", LEGAL_CID, category="law", description="On contracts")
    assert (await adapter(network))["summary"] == "1 version"
    network.clock.forward(1)
    await network.register_lora("legal", OTHER_CID, category="law", description="On contracts")
    for model in ("legal", f"legal@{OTHER_CID}", "base", "unknown"):
        await network.http.post("/v1/completions", json={"model": model, "prompt": "hi"})
    line = await adapter(network)
    assert line["cid"] == OTHER_CID
    assert line["short_cid"] == f"{OTHER_CID[:10]}…{OTHER_CID[-6:]}"
    assert line["requests"] == "2"
    assert (line["category"], line["base"]) == ("law", "base")
    assert line["description"] == "On contracts"
    assert line["summary"] == "2 versions"
    assert [text.split()[0] for text in line["versions"]] == [OTHER_CID, LEGAL_CID]
    assert [it["key"] for it in (await shown(network))["choices"]] == ["base", "legal"]


async def test_the_playground_offers_what_may_be_loaded_too(network: Network) -> None:
    await network.register("http://127.0.0.1:1", "legal", base_model="base")
    await network.register_lora("medical")
    kinds = {"base": "base model", "legal": "adapter", "medical": "adapter without a holder"}
    assert {it["key"]: it["kind"] for it in (await shown(network))["choices"]} == kinds


async def test_a_failed_request_is_no_answer_of_the_adapter(
    network: Network, start_node: StartNode
) -> None:
    await network.register(await start_node(StandIn(answers(400, {}))), "legal")
    await network.http.post("/v1/completions", json={"model": "legal", "prompt": "hi"})
    assert (await adapter(network))["requests"] == "0"
    assert sum((await shown(network))["series"]["requests"]) == 0  # the slot is not over


async def test_without_its_database_it_shows_what_it_knows(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def down(*_: object) -> list[wire.LoraVersion]:
        raise DatabaseDown("it does not answer")

    await network.register_lora("legal")
    monkeypatch.setattr(Registry, "down_since", network.clock())
    monkeypatch.setattr(Registry, "latest_versions", down)
    line = await adapter(network)
    assert (line["cid"], line["summary"]) == (LEGAL_CID, "0 versions")
    said = "The database has not answered since 00:00:00 UTC. This is how it was then."
    assert (await shown(network))["notice"] == said
    assert said in (await network.http.get("/")).text


async def test_who_is_gone_is_left_out_first(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "NODES", 2)
    for number in (1, 2):
        await network.register("http://127.0.0.1:1", number=number)
    network.clock.forward(100)
    for number in (3, 4):
        await network.register("http://127.0.0.1:1", number=number)
    found = await shown(network)
    assert [line["key"] for line in found["nodes"]] == [wallet(3), wallet(4)]
    assert found["headline"] == "2 of 4 nodes take requests"
    assert "2 stale" in found["details"]
    network.clock.forward(86_400 - 50)
    assert [line["key"] for line in (await shown(network))["nodes"]] == [wallet(3), wallet(4)]
    network.clock.forward(51)
    assert (await shown(network))["nodes"] == []


async def test_the_page_has_it_all_without_the_script(network: Network) -> None:
    await network.register_lora("legal", LEGAL_CID)
    await network.register("http://127.0.0.1:1", "legal", base_model="base")
    answer = await network.http.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    for text in ("legal", LEGAL_CID, wallet(1), "base", "live"):
        assert text in answer.text
    assert "$" not in answer.text


@pytest.mark.parametrize("protected", [True, False])
async def test_nothing_of_a_stranger_becomes_html(
    network: Network, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    if not protected:
        monkeypatch.setattr(page, "escape", lambda text: text)
    await network.register_lora("legal", LEGAL_CID, category=HOSTILE, description=HOSTILE)
    await network.register_lora("legal", LEGAL_CID, version=HOSTILE, description=HOSTILE)
    await network.register("http://127.0.0.1:1", HOSTILE, base_model=HOSTILE, version=HOSTILE)
    await network.beat(status=HOSTILE[:32])
    text = (await network.http.get("/")).text
    assert ("<script>alert" not in text) == protected
    assert ("<img src=x" not in text) == protected
    assert "$key${key}" in text  # what looks like a place for a text is none


async def test_only_its_own_files_are_used_and_none_within_the_page(network: Network) -> None:
    answer = await network.http.get("/")
    policy = answer.headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "unsafe" not in policy
    assert "*" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<style|<script>|\son\w+=|\sstyle=|javascript:", answer.text)
    urls = re.findall(r'(?:src|href)="([^"#]+)"', answer.text)
    assert len(urls) >= 3
    for url in urls:
        assert url.startswith("dashboard/static/")
        assert (await network.http.get(f"/{url}")).status_code == 200


async def test_files_are_kept_by_browsers_as_long_as_they_are_the_same(network: Network) -> None:
    text = (await network.http.get("/")).text
    (url,) = set(re.findall(r'src="(dashboard/static/dashboard.js\?v=\w+)"', text))
    first = await network.http.get(f"/{url}")
    assert first.headers["content-type"].startswith("text/javascript")
    assert "immutable" in first.headers["cache-control"]
    tag = first.headers["etag"]
    again = await network.http.get(f"/{url}", headers={"If-None-Match": f'W/"x", {tag}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == tag
    other = await network.http.get(f"/{url}", headers={"If-None-Match": '"other"'})
    assert other.content == first.content
    for changed in ("?v=0", ""):
        answer = await network.http.get(f"/{url.split('?')[0]}{changed}")
        assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("name", ["", "x", "../page.html", "%2e%2e%2fpage.html", "page.html"])
async def test_other_files_are_not_served(network: Network, name: str) -> None:
    answer = await network.http.get(f"/dashboard/static/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


async def test_keys_are_shown_nowhere(start_backend: StartBackend) -> None:
    network = await start_backend(api_keys=["client-key"], admin_key="admin-key")
    signing, key = SigningNode(network), some_key()
    await signing.register("http://127.0.0.1:9", "legal", access_key=key)
    for path in ("/", "/dashboard/data"):
        text = (await network.http.get(path)).text
        assert signing.wallet in text
        for secret in (key[:15], "client-key", "admin-key", signing.identity.public_key.hex()):
            assert secret not in text
    assert "This backend wants one." in (await network.http.get("/")).text


@pytest.mark.parametrize("protected", [True, False])
async def test_many_who_look_cost_one_look(
    network: Network, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    monkeypatch.setattr(view, "_FRESH_S", 60 if protected else 0)
    looks = 0
    look = view.look

    async def counting(*given: Any) -> view.View:
        nonlocal looks
        looks += 1
        return await look(*given)

    monkeypatch.setattr(view, "look", counting)
    for _ in range(5):
        await network.http.get("/dashboard/data")
    assert looks == (1 if protected else 5)


def test_traffic_goes_in_slots() -> None:
    now = 1000.0
    traffic = Traffic(lambda: now)
    assert len(traffic.slots()) == SLOTS
    traffic.arrived()
    traffic.arrived()
    traffic.sent(10)
    now += SLOT_S
    traffic.left()
    traffic.sent(5)
    now += 3 * SLOT_S
    last = traffic.slots()[-4:]
    assert [slot.requests for slot in last] == [2, 0, 0, 0]
    assert [slot.in_flight for slot in last] == [2, 2, 1, 1]
    assert [slot.bytes for slot in last] == [10, 5, 0, 0]
    now += 10**9
    assert [slot.in_flight for slot in traffic.slots()] == [1] * SLOTS


def test_traffic_keeps_a_bounded_number_of_names() -> None:
    traffic = Traffic()
    for number in range(20_000):
        traffic.answered(str(number))
    traffic.answered("0")
    assert traffic.answers("0") == 2
    assert traffic.answers("19999") == 0


async def test_what_goes_by_is_counted_and_what_looks_on_is_not(
    start_backend: StartBackend, start_node: StartNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("r3mes_vllm.backend.dashboard.Traffic", lambda: Traffic(lambda: now))
    network = await start_backend()
    await network.register(await start_node(StandIn()), "legal")
    for _ in range(4):
        await network.http.post("/chat", json={"message": "hi", "lora_name": "legal"})
    await network.http.get("/v1/models")
    await network.http.get("/")
    now += SLOT_S
    series = (await shown(network))["series"]
    assert series["requests"][-1] == 4 / SLOT_S
    assert series["in_flight"][-1] == 1
    assert series["bytes"][-1] == 4 * len("hello") / SLOT_S
    assert {len(series[name]) for name in ("requests", "in_flight", "bytes")} == {SLOTS}


def test_a_wheel_has_the_pages_files(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    here = ROOT / "r3mes_vllm" / "backend" / "dashboard"
    wanted = {str(file.relative_to(ROOT)) for file in here.rglob("*.*") if "__" not in str(file)}
    assert len(wanted) > 10
    with ZipFile(wheel) as built:
        assert wanted <= set(built.namelist())
