"""Web pages of other origins: none may call the backend, unless the operator names it. What one
sends without asking first, and without a key, is refused; with a key none may read the answer."""

import json
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.settings import load
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.stand_ins import OTHER_CID, Network, StandIn, wallet

PAGE = "https://page.example"
KEYS: dict[str, Any] = {"api_keys": ["client"], "admin_key": "admin"}
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
ROUTES = [
    ("GET", "/"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/api/lora/list"),
    ("GET", "/api/serving-node/list"),
    ("POST", "/api/lora/register"),
    ("POST", "/chat"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/nowhere"),
]


async def generous(request: Request) -> Response:
    return Response("hello", headers={"Access-Control-Allow-Origin": "*", "X-R3MES-CID": "bafy"})


def allowed(answer: httpx.Response) -> dict[str, str]:
    return {name: it for name, it in answer.headers.items() if name.startswith("access-control")}


async def answers(network: Network, node: str, origin: str = PAGE) -> list[httpx.Response]:
    await network.register(node, "legal")
    found = []
    for method, path in ROUTES:
        body = {"message": "hi", "model": "legal"} if method == "POST" else None
        headers = {"Origin": origin, "X-API-Key": "client"}
        found.append(await network.http.request(method, path, json=body, headers=headers))
        preflight = PREFLIGHT | headers
        found.append(await network.http.request("OPTIONS", path, headers=preflight))
    return found


async def test_no_page_is_allowed_by_default_whatever_a_node_says(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    network = await start_backend(**KEYS)
    for answer in await answers(network, await start_node(StandIn(generous))):
        assert allowed(answer) == {}


async def test_a_named_origin_is_allowed_and_no_other(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    """The twin."""
    network = await start_backend(cors_origins=[PAGE, "http://localhost:3000"], **KEYS)
    node = await start_node(StandIn(generous))
    for answer in await answers(network, node):
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "access-control-allow-credentials" not in answer.headers
    for other in (
        "https://page.example.evil",
        "http://page.example",
        "null",
        "https://page.exampl",
    ):
        for answer in await answers(network, node, other):
            assert "access-control-allow-origin" not in answer.headers


FORGED = {"Origin": PAGE, "Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}
CHANGES: dict[str, Any] = {
    "/api/lora/register": {"name": "legal", "ipfs_hash": OTHER_CID},
    "/api/lora/legal/deactivate": {},
    "/api/serving-node/register": {
        "wallet_address": wallet(7),
        "endpoint_url": "http://127.0.0.1:1",
        "available_lora_list": ["legal"],
    },
    "/chat": {"message": "hi"},
    "/v1/chat/completions": {"model": "legal"},
}


async def test_what_a_page_sends_without_asking_first_changes_nothing(
    network: Network, start_node: StartNode
) -> None:
    node = StandIn(generous)
    await network.register_lora("legal")
    await network.register(await start_node(node), "legal")
    before = (await network.http.get("/api/lora/list")).json()
    for path, body in CHANGES.items():
        for forged in (FORGED, FORGED | {"Origin": "null"}, {"Origin": PAGE}):
            answer = await network.http.post(path, headers=forged, content=json.dumps(body))
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site")
    assert (await network.http.get("/api/lora/list", headers=FORGED)).json() == before
    assert await network.wallets(max_age_seconds=60) == [wallet(1)]
    assert node.seen == []


@pytest.mark.parametrize(
    "allowed",
    [
        {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"},
        {"Origin": "https://other.example", "Authorization": "Bearer client"},
        {"Origin": "null", "X-API-Key": "admin"},
    ],
    ids=str,
)
async def test_a_named_page_may_send_and_who_has_a_key(
    start_backend: StartBackend, allowed: dict[str, str]
) -> None:
    network = await start_backend(cors_origins=[PAGE], **KEYS)
    answer = await network.http.post("/api/serving-node/heartbeat", headers=allowed, json={})
    assert answer.status_code == 422


async def test_a_name_that_was_led_to_loopback_reads_nothing(start_backend: StartBackend) -> None:
    network = await start_backend()
    rebound = {"Host": "page.example:8000", "Origin": "http://page.example:8000"}
    for method, path in ROUTES:
        answer = await network.http.request(method, path, headers=rebound)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "unknown_host")
        assert "R3MES_INSECURE" in answer.text
    # The twins: behind a proxy, which the operator says, or with a key.
    given: dict[str, Any]
    for given in ({"insecure": True}, {"admin_key": "admin"}, {"backend_host": "0.0.0.0"}):
        network = await start_backend(**given)
        assert (await network.http.get("/", headers=rebound)).status_code == 200


@pytest.mark.parametrize(
    "names",
    [
        "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,"
        "x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
        "x-stainless-runtime-version,x-stainless-timeout,openai-organization,openai-project",
        "authorization, x-adapter, x-wallet-address, x-request-id, traceparent",
    ],
    ids=["openai-js", "others"],
)
async def test_a_page_of_a_named_origin_sends_what_headers_it_likes(
    start_backend: StartBackend, names: str
) -> None:
    network = await start_backend(cors_origins=[PAGE])
    preflight = PREFLIGHT | {"Access-Control-Request-Headers": names}
    answer = await network.http.options("/v1/chat/completions", headers=preflight)
    assert answer.status_code == 200
    allowed_names = answer.headers["access-control-allow-headers"].split(",")
    assert {it.strip().lower() for it in allowed_names} >= {it.strip() for it in names.split(",")}
    preflight["Origin"] = "https://page.example.evil"
    other = await network.http.options("/v1/chat/completions", headers=preflight)
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("origin", ["*", "page.example", PAGE + "/", PAGE + "/x", "null", ""])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="cors_origins"):
        load({"cors_origins": [origin]})
