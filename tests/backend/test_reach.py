"""The backend calls back: for who signs, a few times a minute, and no private address."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from r3mes_vllm.identity import Identity
from r3mes_vllm.node.doctor import checks_network
from tests.backend.conftest import StartBackend
from tests.backend.stand_ins import Network
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
