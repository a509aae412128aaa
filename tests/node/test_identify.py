"""Who a node is, on its own route; and the door that its backend has."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.identity import Identity, access_key
from r3mes_vllm.node import guard, identify
from r3mes_vllm.settings import load
from r3mes_vllm.signatures import Claim, endpoint_text, is_signed, request_text

NONCE = "0f" * 32
URL = "https://node.example/r3mes"
KEYS = {"api_keys": ["client"], "admin_key": "admin"}


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity.load(tmp_path)


def asked(identity: Identity, **settings: Any) -> httpx.AsyncClient:
    app = FastAPI()
    app.include_router(identify.router)
    given = load({"serving_node_url": URL} | settings)
    app.state.r3mes = SimpleNamespace(identity=identity, settings=given)
    transport = httpx.ASGITransport(guard.Guard(app, given))
    return httpx.AsyncClient(transport=transport, base_url="http://node")


async def test_anyone_may_ask_for_the_proof(identity: Identity) -> None:
    async with asked(identity, **KEYS) as client:
        for url in ("http://node/identity", "http://node//identity"):
            proof = (await client.post(url, json={"nonce": NONCE})).json()
            assert (proof["key"], proof["url"]) == (identity.public_key.hex(), URL)
            signature = bytes.fromhex(proof["signature"])
            assert is_signed(identity.public_key, signature, endpoint_text(NONCE, URL))
            for nonce, place in (("1f" * 32, URL), (NONCE, "https://node.example")):
                other = endpoint_text(nonce, place)
                assert not is_signed(identity.public_key, signature, other)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{}",
        b'{"nonce": 1}',
        b'{"nonce": ""}',
        b'{"nonce": "' + b"0F" * 32 + b'"}',
        b'{"nonce": "' + b"0f" * 33 + b'"}',
        b'{"nonce": "' + b"0f" * 32 + b'\\n"}',
        b'{"nonce": "r3mes-request-v1\\nPOST\\n/api/serving-node/register"}',
    ],
)
async def test_nothing_but_a_nonce_is_signed(identity: Identity, body: bytes) -> None:
    async with asked(identity) as client:
        answer = await client.post("/identity", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("nonce")


def test_a_proof_is_no_request_and_a_request_no_proof() -> None:
    """Each kind of text has a first line of its own."""
    request = request_text(Claim(bytes(32), 1, "0" * 32, 1), "POST", "/api", b"")
    assert request.split(b"\n")[0] != endpoint_text(NONCE, URL).split(b"\n")[0]


async def statuses(backend_key: str, presented: str, **settings: Any) -> dict[str, int]:
    async def answer(request: object) -> PlainTextResponse:
        return PlainTextResponse("through")

    paths = ["/chat", "/v1/completions", "/adapters", "/drain"]
    app = Starlette(routes=[Route(path, answer, methods=["POST"]) for path in paths])
    guarded = guard.Guard(app, load(settings), backend_key)
    headers = {"Authorization": f"Bearer {presented}"} if presented else {}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(guarded), base_url="http://node", headers=headers
    ) as client:
        return {path: (await client.post(path)).status_code for path in paths}


CLIENTS = {"/chat": 200, "/v1/completions": 200, "/adapters": 401, "/drain": 401}


async def test_the_backends_key_opens_what_a_clients_does(tmp_path: Path) -> None:
    key = access_key(tmp_path)
    assert await statuses(key, key, **KEYS) == CLIENTS
    assert await statuses(key, "client", **KEYS) == CLIENTS
    assert await statuses(key, key, admin_key="admin") == CLIENTS
    # The twins: a node without one, another key, none.
    for backend_key, presented in (("", key), (key, key[:-1]), (key, "")):
        assert set((await statuses(backend_key, presented, **KEYS)).values()) == {401}


async def test_it_closes_no_door_that_is_open(tmp_path: Path) -> None:
    found = await statuses(access_key(tmp_path), "")
    assert set(found.values()) == {200}


async def test_it_is_no_key_to_listen_beyond_loopback_with() -> None:
    with pytest.raises(ConfigError, match="API key"):
        guard.refuse_open_door(load({"serving_node_host": "0.0.0.0"}))
