"""The backend calls back: for who signs, a few times a minute, and no private address."""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from r3mes_vllm.backend import reach
from r3mes_vllm.identity import Identity
from r3mes_vllm.node.doctor import checks_network
from r3mes_vllm.node.identify import prove
from tests.backend.conftest import StartBackend
from tests.backend.stand_ins import (
    Behaviour,
    Network,
    StandIn,
    answers,
    says_hello,
    serving,
    untouched,
)
from tests.doctor.given import settings
from tests.programs import free_port


@pytest.fixture
async def here(network: Network) -> Network:
    network.clock.now = datetime.now(UTC)
    return network


async def test_the_backend_calls_back(tmp_path: Path, here: Network) -> None:
    found = await checks_network.public_url(settings(tmp_path, backend_url=here.url))
    assert found.status == "ok", found


async def test_a_url_where_nobody_listens_is_unreachable(tmp_path: Path, here: Network) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    given = settings(tmp_path, backend_url=here.url, serving_node_url=url)
    found = await checks_network.public_url(given)
    assert found.status == "fail"
    assert "refused" in found.message
    assert "--public-url" in found.fix


async def hangs(request: Request) -> Response:
    await asyncio.sleep(60)
    raise AssertionError


async def ends_never(request: Request) -> Response:
    async def body() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 65536
            await asyncio.sleep(0.001)

    return StreamingResponse(body())


async def proves_another_key(request: Request) -> Response:
    nonce = json.loads(await request.body())["nonce"]
    url = str(request.base_url).rstrip("/")
    with tempfile.TemporaryDirectory() as folder:
        return JSONResponse(prove(Identity.load(Path(folder)), nonce, url).model_dump())


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        (hangs, "nothing answers in time"),
        (says_hello, "what answers there is no node"),
        (ends_never, "what answers there is no node"),
        (answers(404, {}), "what answers there is no node"),
        (proves_another_key, "another key"),
    ],
)
async def test_what_answers_there_must_be_this_node(
    tmp_path: Path,
    here: Network,
    behaviour: Behaviour,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reach, "_TIMEOUT_S", 1.0)
    async with serving(StandIn(behaviour)) as url:
        given = settings(tmp_path, backend_url=here.url, serving_node_url=url)
        found = await checks_network.public_url(given)
    assert found.status == "fail"
    assert why in found.message


async def test_no_redirect_is_followed(tmp_path: Path, here: Network) -> None:
    with untouched() as port:

        async def sends_elsewhere(request: Request) -> Response:
            return RedirectResponse(f"http://127.0.0.1:{port}", 307)

        async with serving(StandIn(sends_elsewhere)) as url:
            given = settings(tmp_path, backend_url=here.url, serving_node_url=url)
            found = await checks_network.public_url(given)
    assert "what answers there is no node" in found.message


async def test_an_existing_backend_cannot_call_back(tmp_path: Path) -> None:
    async with serving(StandIn(answers(404, {"detail": "Not Found"}))) as url:
        found = await checks_network.public_url(settings(tmp_path, backend_url=url))
    assert found.status == "skip"
    assert found.message == "this backend cannot call back"


async def test_a_private_address_is_not_called(tmp_path: Path, start_backend: StartBackend) -> None:
    here = await start_backend(allow_private_nodes=False)
    here.clock.now = datetime.now(UTC)
    found = await checks_network.public_url(settings(tmp_path, backend_url=here.url))
    assert found.status == "fail"
    assert "private" in found.message


async def test_only_who_signs_is_called_back(tmp_path: Path, here: Network) -> None:
    wallet = Identity.load(tmp_path).wallet_address
    body = {"wallet_address": wallet, "endpoint_url": here.url}
    assert (await here.http.post("/api/serving-node/reach", json=body)).status_code == 401


async def test_a_few_calls_a_minute(tmp_path: Path, here: Network) -> None:
    given = settings(tmp_path, backend_url=here.url)
    found = [await checks_network.public_url(given) for _ in range(7)]
    assert [it.status for it in found] == ["ok"] * 6 + ["skip"]
