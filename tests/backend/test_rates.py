"""What a minute allows each client of the backend."""

from pathlib import Path

import httpx
import pytest

from tests.backend.conftest import StartBackend, StartNode
from tests.backend.stand_ins import Network, StandIn

PATHS = ["/chat", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
BODY = {"message": "hi", "model": "legal"}


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found = [1_000_000.0]
    monkeypatch.setattr("time.time", lambda: found[0])
    return found


async def ask(network: Network, key: str = "", path: str = "/chat") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return await network.http.post(path, json=BODY, headers=headers)


@pytest.mark.parametrize("path", PATHS)
async def test_each_key_has_its_requests_and_no_more(
    start_backend: StartBackend, start_node: StartNode, now: list[float], path: str
) -> None:
    network = await start_backend(api_keys=["one", "two"], rates={"requests": 2})
    node = StandIn()
    await network.register(await start_node(node), "legal")
    assert [(await ask(network, "one", path)).status_code for _ in range(3)] == [200, 200, 429]
    assert (await ask(network, "two", path)).status_code == 200
    assert len(node.seen) == 3
    over = await ask(network, "one", path)
    assert over.json()["error"]["code"] == "rate_limit_exceeded"
    assert "2 requests a minute" in over.json()["error"]["message"]
    assert ("type" in over.json()["error"]) == path.startswith("/v1")
    assert 1 <= int(over.headers["retry-after"]) <= 60
    now[0] += int(over.headers["retry-after"])
    assert (await ask(network, "one", path)).status_code == 200


async def test_each_address_has_its_requests_whatever_its_keys(
    start_backend: StartBackend, start_node: StartNode, now: list[float]
) -> None:
    network = await start_backend(api_keys=["one", "two"], rates={"address_requests": 3})
    await network.register(await start_node(StandIn()), "legal")
    # A wrong key costs too: who tries many is held up.
    tries = [(await ask(network, key)).status_code for key in ("one", "wrong", "two", "one")]
    assert tries == [200, 401, 200, 429]
    # What is no question to a model is free, and so is what nodes send.
    assert (await network.http.get("/v1/models", headers={"X-API-Key": "one"})).status_code == 200
    assert (await network.beat()).status_code == 200


async def test_without_limits_nothing_is_refused(
    start_backend: StartBackend, start_node: StartNode, now: list[float]
) -> None:
    """The twin."""
    network = await start_backend(api_keys=["one"])
    await network.register(await start_node(StandIn()), "legal")
    assert {(await ask(network, "one")).status_code for _ in range(50)} == {200}


async def test_the_file_of_keys_is_followed(
    start_backend: StartBackend, start_node: StartNode, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n")
    network = await start_backend(api_keys_file=file, rates={"requests": 1})
    await network.register(await start_node(StandIn()), "legal")
    assert [(await ask(network, "one")).status_code for _ in range(2)] == [200, 429]
    file.write_text("another\n")
    assert (await ask(network, "one")).status_code == 401
    assert [(await ask(network, "another")).status_code for _ in range(2)] == [200, 429]
