"""Web pages of other origins: none may call the backend, unless the operator names it."""

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.settings import load
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.stand_ins import Network, StandIn

PAGE = "https://page.example"
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
        headers = {"Origin": origin}
        found.append(await network.http.request(method, path, json=body, headers=headers))
        preflight = PREFLIGHT | headers
        found.append(await network.http.request("OPTIONS", path, headers=preflight))
    return found


async def test_no_page_is_allowed_by_default_whatever_a_node_says(
    network: Network, start_node: StartNode
) -> None:
    for answer in await answers(network, await start_node(StandIn(generous))):
        assert allowed(answer) == {}


async def test_a_named_origin_is_allowed_and_no_other(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    """The twin."""
    network = await start_backend(cors_origins=[PAGE, "http://localhost:3000"])
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


@pytest.mark.parametrize("origin", ["*", "page.example", PAGE + "/", PAGE + "/x", "null", ""])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="cors_origins"):
        load({"cors_origins": [origin]})
