"""Who gets past the guard; what it guards is real in test_serving.py."""

from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.node.guard import Guard, needs_key, refuse_open_door
from r3mes_vllm.settings import Settings, load
from tests.backend.stand_ins import serving

CLIENT, ADMIN = "client-key", "admin-key"
PATHS = ["/health", "/ready", "/chat", "/v1/models", "/adapters", "/metrics", "/invocations"]
KEYS = {"api_keys": [CLIENT], "admin_key": ADMIN}


def guarded(settings: Settings) -> httpx.AsyncClient:
    async def answer(request: object) -> PlainTextResponse:
        return PlainTextResponse("through")

    routes = [Route(path, answer, methods=["GET", "POST"]) for path in PATHS]
    transport = httpx.ASGITransport(Guard(Starlette(routes=routes), settings))
    return httpx.AsyncClient(transport=transport, base_url="http://node")


async def statuses(settings: Settings, headers: dict[str, str]) -> dict[str, int]:
    async with guarded(settings) as client:
        return {
            path: (
                await client.request("POST" if path == "/chat" else "GET", path, headers=headers)
            ).status_code
            for path in PATHS
        }


OPEN = {"/health": 200, "/ready": 200, "/invocations": 404}


async def test_without_any_key_the_listed_routes_are_open() -> None:
    found = await statuses(load(), {})
    assert found == dict.fromkeys(PATHS, 200) | {"/invocations": 404}


@pytest.mark.parametrize(
    ("headers", "client", "admin"),
    [
        ({}, 401, 401),
        ({"Authorization": "Bearer wrong"}, 401, 401),
        ({"Authorization": f"Basic {CLIENT}"}, 401, 401),
        ({"X-API-Key": ""}, 401, 401),
        ({"X-API-Key": "schlüssel"}, 401, 401),
        ({"Authorization": f"Bearer {CLIENT}"}, 200, 401),
        ({"authorization": f"bearer {CLIENT}"}, 200, 401),
        ({"X-API-Key": CLIENT}, 200, 401),
        ({"X-API-Key": ADMIN}, 200, 200),
    ],
)
async def test_each_key_opens_what_it_is_for(
    headers: dict[str, str], client: int, admin: int
) -> None:
    encoded = {name: value.encode() for name, value in headers.items()}
    found = await statuses(load(KEYS), encoded)  # type: ignore[arg-type]
    expected = {"/chat": client, "/v1/models": client, "/adapters": admin, "/metrics": admin}
    assert found == OPEN | expected


async def test_an_admin_key_alone_closes_everything_else_too() -> None:
    found = await statuses(load({"admin_key": ADMIN}), {})
    assert found["/chat"] == found["/adapters"] == 401


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"api_keys": [CLIENT]},
        {"admin_key": ADMIN},
        {**KEYS, "open_chat": True},
    ],
)
async def test_it_is_known_whether_the_existing_backend_can_chat(given: dict[str, object]) -> None:
    settings = load(given)
    assert needs_key(settings) is ((await statuses(settings, {}))["/chat"] == 401)


async def test_doors_can_be_opened_one_by_one() -> None:
    found = await statuses(load({**KEYS, "open_chat": True, "public_metrics": True}), {})
    assert (found["/chat"], found["/metrics"]) == (200, 200)
    assert (found["/v1/models"], found["/adapters"]) == (401, 401)


async def test_keys_may_lie_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{CLIENT}\n")
    found = await statuses(load({"api_keys_file": file}), {"X-API-Key": CLIENT})
    assert found["/chat"] == 200
    assert (await statuses(load({"api_keys_file": file}), {"X-API-Key": "# ours"}))["/chat"] == 401


@pytest.mark.parametrize(
    "path", ["/chat/", "/CHAT", "/chat%2f", "/v1/../metrics", "/./chat", "/health/../adapters"]
)
async def test_other_spellings_of_a_path_are_not_listed(path: str) -> None:
    async with guarded(load(KEYS)) as client:
        answer = await client.post(path)
    assert answer.status_code in (404, 405, 401)
    assert answer.text != "through"


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/metrics"])
async def test_head_is_answered_as_get_without_a_body(path: str) -> None:
    app = FastAPI()

    @app.get(path)
    async def answer() -> str:
        return "through"

    async with serving(Guard(app, load())) as url, httpx.AsyncClient() as client:
        got, head = await client.get(url + path), await client.head(url + path)
        assert (got.status_code, head.status_code) == (200, 200)
        assert (head.content, head.headers["content-length"]) == (b"", str(len(got.content)))
        assert (await client.head(f"{url}/chat")).status_code == 405


async def test_the_wrong_method_says_the_right_one() -> None:
    async with guarded(load()) as client:
        answer = await client.get("/chat")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_errors_under_v1_have_openais_shape() -> None:
    async with guarded(load(KEYS)) as client:
        error = (await client.get("/v1/models")).json()["error"]
    assert error["type"] == "authentication_error"


def test_beyond_loopback_a_key_is_demanded() -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::"):
        with pytest.raises(ConfigError, match="API key"):
            refuse_open_door(load({"serving_node_host": host}))
        refuse_open_door(load({"serving_node_host": host, "api_keys": [CLIENT]}))
        refuse_open_door(load({"serving_node_host": host, "insecure": True}))
    refuse_open_door(load({"serving_node_host": "127.0.0.1"}))


def test_an_empty_key_file_is_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    with pytest.raises(ConfigError):
        refuse_open_door(load({"api_keys_file": file, "serving_node_host": "0.0.0.0"}))


ELSEWHERE = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
FETCHED = {"Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}


@pytest.mark.parametrize("page", [ELSEWHERE, FETCHED, {"Origin": "null"}], ids=str)
async def test_a_web_page_commands_no_node_that_asks_for_no_key(page: dict[str, str]) -> None:
    """Such a request needs no preflight: a browser sends it to loopback for any page."""
    for settings in (load({"serving_node_host": "127.0.0.1"}), load({**KEYS, "open_chat": True})):
        async with guarded(settings) as client:
            answer = await client.post("/chat", headers=page)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site")
            assert "R3MES_CORS_ORIGINS" in answer.json()["error"]["hint"]
            for allowed in ({}, {"Origin": "http://node"}):
                assert (await client.post("/chat", headers=allowed)).text == "through"


async def test_a_key_is_no_web_pages() -> None:
    for key in (CLIENT, ADMIN):
        async with guarded(load(KEYS)) as client:
            answer = await client.post("/chat", headers={**ELSEWHERE, "X-API-Key": key})
        assert answer.text == "through"
    # The twin: one that is none, where none is needed.
    async with guarded(load()) as client:
        answer = await client.post("/chat", headers={**ELSEWHERE, "X-API-Key": CLIENT})
    assert answer.status_code == 403


@pytest.mark.parametrize("path", ["/v1/models", "/adapters", "/metrics", "/health"])
async def test_a_name_that_was_led_to_loopback_opens_no_door(path: str) -> None:
    """After DNS rebinding a page may read the answers too."""
    given = {"serving_node_host": "127.0.0.1", "serving_node_url": "https://node.example"}
    rebound = {"Host": "evil.example:8081"}
    async with guarded(load(given)) as client:
        answer = await client.get(path, headers=rebound)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "unknown_host")
        for host in ("127.0.0.1:8081", "localhost:8081", "node.example"):
            assert (await client.get(path, headers={"Host": host})).text == "through"
    for more in ({"insecure": True}, {"ssl_certfile": "chain.pem"}):
        async with guarded(load(given | more)) as client:
            assert (await client.get(path, headers=rebound)).text == "through"
    async with guarded(load(given | KEYS)) as client:
        answer = await client.get(path, headers={**rebound, "X-API-Key": ADMIN})
    assert answer.text == "through"
