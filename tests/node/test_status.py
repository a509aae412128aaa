"""`r3mes-vllm status`, and the document that it reads."""

import json
import os
import pty
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from r3mes_vllm.identity import operator_key
from r3mes_vllm.node.guard import Access, Doors
from r3mes_vllm.node.journal import COMPLETE, REFUSED, Entry
from r3mes_vllm.node.measures import FIRST_TOKEN_S, Histogram, Measures
from r3mes_vllm.node.standing import (
    Reading,
    note_place,
    rates,
    why_no_requests,
    with_noted_place,
)
from r3mes_vllm.node.status import Standing
from r3mes_vllm.settings import load
from tests.conftest import Network
from tests.programs import free_port, wait_until

BACKEND, PUBLIC = "https://backend.example", "https://node.example:8443"


def document(**changed: Any) -> dict[str, Any]:
    return {
        "wallet_address": "remes1",
        "public_url": PUBLIC,
        "backend": BACKEND,
        "up_s": 100.0,
        "reason": None,
        "beat_age_s": 3.0,
        "beat_trouble": None,
        "requests": {"legal": {"complete": 4, "generated_tokens": 80, "last_s_ago": None}},
    } | changed


LISTED = {"wallet_address": "remes1", "signature": "signed"}
CASES: list[tuple[Reading, str]] = [
    (Reading("u", trouble="no node is running: nothing listens at u"), "no node is running"),
    (Reading("u", trouble="it is starting: adapters are fetched"), "starting: adapters"),
    (Reading("u", node=document(reason="the engine hangs")), "not ready: the engine hangs"),
    (Reading("u", node=document(reason="draining")), "not ready: draining"),
    (Reading("u", node=document(reason="no adapter is ready")), "no adapter is ready"),
    (Reading("u", node=document(backend=None)), "its backend's program alone"),
    (Reading("u", node=document(beat_trouble="the backend said no")), "the backend said no"),
    (Reading("u", node=document(beat_age_s=None)), "has not registered"),
    (Reading("u", node=document(upgrade="it is old", outdated=True)), "it is old"),
    (Reading("u", node=document(beat_age_s=61.0)), "61 s ago"),
    (Reading("u", node=document(), list_trouble="404"), "can't be told"),
    (Reading("u", node=document()), "does not list this node"),
    (
        Reading(
            "u",
            node=document(),
            listed={"signature": "unproven", "signature_reason": "it answered 404"},
        ),
        "it answered 404",
    ),
    (
        Reading("u", node=document(public_url="http://localhost:8080"), listed=LISTED),
        "pass --public-url",
    ),
    (
        Reading("u", node=document(public_url="http://node.example:8081"), listed=LISTED),
        "pass --port 8080",
    ),
    (
        Reading("u", node=document(chat_needs_key=True), listed={"wallet_address": "remes1"}),
        "pass --open-chat",
    ),
    (
        Reading("u", node=document(chat_needs_key=False), listed={"wallet_address": "remes1"}),
        "nobody has asked",
    ),
    (Reading("u", node=document(chat_needs_key=True), listed=LISTED), "nobody has asked"),
    (Reading("u", node=document(), listed=LISTED), "nobody has asked for its adapters yet"),
    (
        Reading("u", node=document(requests={"legal": {"last_s_ago": 7.0}}), listed=LISTED),
        "the last request ended 7 s ago",
    ),
]


@pytest.mark.parametrize(("reading", "said"), CASES)
def test_why_no_requests_come_is_one_sentence(reading: Reading, said: str) -> None:
    found = why_no_requests(reading)
    assert said in found
    assert "\n" not in found
    assert found.endswith(".")


def test_rates_are_of_the_time_between_two_readings() -> None:
    before = Reading("u", at=10.0, node=document())
    later = {"legal": {"complete": 6, "generated_tokens": 180, "prompt_tokens": 7}}
    found = rates(before, Reading("u", at=12.0, node=document(requests=later)))
    assert found
    assert (found.requests, found.generated_tokens, found.prompt_tokens) == (1.0, 50.0, 3.5)
    assert rates(before, Reading("u", at=12.0, node=document(up_s=1.0))) is None
    assert rates(Reading("u"), before) is None


def test_a_quantile_lies_where_so_many_were_faster() -> None:
    times = Histogram(FIRST_TOKEN_S)
    assert times.quantile(0.5) is None
    for seconds in [0.03] * 90 + [0.15] * 10:
        times.observe(seconds)
    median, high = times.quantile(0.5), times.quantile(0.95)
    assert median is not None
    assert high is not None
    assert 0.02 < median <= 0.05
    assert 0.1 < high <= 0.2


def test_refusals_are_few_and_say_nothing_of_the_question() -> None:
    standing = Standing(Measures())
    for _ in range(3):
        standing.refused(Entry("id", "POST /chat", outcome=REFUSED, status=429, code="busy"))
    standing.refused(Entry("id", "POST /chat", outcome=COMPLETE, status=200))
    standing.refused(Entry("id", "GET /adapters", outcome=REFUSED, status=401))
    (only,) = standing.refusals
    assert only.items() >= {"code": "busy", "status": 429, "count": 3}.items()
    for number in range(100):
        standing.refused(Entry("id", "POST /chat", outcome=REFUSED, status=number))
    assert len(standing.refusals) == 20


def test_the_operators_key_opens_what_the_admins_does_and_no_other(tmp_path: Path) -> None:
    assert operator_key(tmp_path, make=False) == ""
    key = operator_key(tmp_path)
    assert stat.S_IMODE((tmp_path / "operator.key").stat().st_mode) == 0o600
    doors = Doors(load({"api_keys": ["client"]}), "backend", key)
    assert doors.let_in(Access.ADMIN, key.encode())
    for other in (b"", b"client", b"backend", key[:-1].encode()):
        assert doors.let_in(Access.ADMIN, other) is None
    without = Doors(load({"api_keys": ["client"]}), "backend")
    assert without.let_in(Access.ADMIN, key.encode()) is None
    assert without.let_in(Access.ADMIN, b"") is None


def of(network: Network) -> tuple[list[str], dict[str, str]]:
    """The command where that node has its state, and its environment: nobody tells it the port."""
    command = [sys.executable, "-m", "r3mes_vllm", "status"]
    return command, os.environ | {"R3MES_STATE_DIR": str(network.folder / "state")}


def asked(network: Network, *options: str) -> subprocess.CompletedProcess[str]:
    command, environment = of(network)
    return subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, timeout=60
    )


def test_it_shows_what_a_node_did(network: Network) -> None:
    chat = {"message": "what is a contract?", "lora_name": "legal", "stream": False}
    assert httpx.post(f"{network.node.url}/chat", json=chat, timeout=60).is_success
    unknown = httpx.post(f"{network.node.url}/chat", json=chat | {"lora_name": "nobody"})
    assert unknown.status_code == 404

    found = asked(network, "--json")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    node = told["node"]
    assert told["ready"] is True
    assert told["why"].startswith("All is well: it is listed, and the last request ended")
    assert told["listed"]["wallet_address"] == node["wallet_address"]
    assert told["rates"]["requests"] >= 0
    assert node["beat_age_s"] < 60
    assert 0 <= node["kv_cache"] <= 1
    legal = node["requests"]["legal"]
    assert legal["complete"] >= 1
    assert legal["generated_tokens"] >= 1
    assert legal["first_token_p50_s"] <= legal["first_token_p95_s"]
    assert {"legal", "medical"} <= {name for it in node["adapters"] for name in it["names"]}
    assert any(it["status"] == 404 and it["route"] == "POST /chat" for it in node["refusals"])
    assert "contract" not in found.stdout

    page = asked(network).stdout
    for said in ("ready, up", "last heartbeat", "legal", "resident", "last refusals:", "All is"):
        assert said in page


def test_a_node_is_found_where_it_was_started_last(tmp_path: Path) -> None:
    given = load({"state_dir": tmp_path})
    assert with_noted_place(given) == given
    for port in (8080, 8443):
        certificate = tmp_path / "fullchain.pem" if port == 8443 else None
        note_place(
            load({"state_dir": tmp_path, "serving_node_port": port, "ssl_certfile": certificate})
        )
    found = with_noted_place(given)
    assert found.local_url == "https://127.0.0.1:8443"
    assert found.ssl_certfile == tmp_path / "fullchain.pem"
    assert found.state_dir == tmp_path


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"serving_node_host": 1, "serving_node_port": "x"}', "\xff"]
)
def test_a_place_that_is_none_is_not_used(tmp_path: Path, text: str) -> None:
    (tmp_path / "node.json").write_bytes(text.encode("latin-1"))
    given = load({"state_dir": tmp_path})
    assert with_noted_place(given) == given


@pytest.mark.parametrize("told", [["--port", "8099"], ["--host", "127.0.0.2"]])
def test_a_place_that_is_told_is_asked(tmp_path: Path, told: list[str]) -> None:
    note_place(load({"state_dir": tmp_path, "serving_node_port": free_port()}))
    environment = os.environ | {"R3MES_STATE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-m", "r3mes_vllm", "status", *told],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told[1] in found.stdout


def test_without_a_node_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "r3mes_vllm", "status", "--port", str(free_port())]
    environment = os.environ | {"R3MES_STATE_DIR": str(tmp_path / "state")}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert "no node is running: nothing listens" in " ".join(found.stdout.split())
    assert not (tmp_path / "state").exists()


def _until(descriptor: int, condition: Callable[[str], bool]) -> str:
    seen = ""

    def more() -> bool:
        nonlocal seen
        seen += os.read(descriptor, 1 << 16).decode(errors="replace")
        return condition(seen)

    wait_until(more, 60, "the page")
    return seen


def test_it_is_drawn_anew_until_ctrl_c(network: Network) -> None:
    command, environment = of(network)
    ours, theirs = pty.openpty()
    environment |= {"TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
    with subprocess.Popen(
        [*command, "--watch"], env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        _until(ours, lambda seen: seen.count("last heartbeat") >= 2)
        process.send_signal(signal.SIGINT)
        while process.poll() is None:
            try:
                os.read(ours, 1 << 16)
            except OSError:
                break
        assert process.wait(10) == 130
    os.close(ours)
