"""What monitors look at."""

from pathlib import Path

import pytest

from r3mes_vllm import __version__
from tests.backend.conftest import StartNode
from tests.backend.signing import until
from tests.backend.stand_ins import Network, StandIn


async def test_it_is_ready_while_its_database_answers(network: Network, tmp_path: Path) -> None:
    await network.register("http://127.0.0.1:1", "legal")
    for path in ("/health", "/ready"):
        said = (await network.http.get(path)).json()
        assert said == {"status": "ok", "nodes": 1, "version": __version__}
    for file in tmp_path.glob("backend.sqlite3*"):
        file.write_bytes(b"this is no database" * 1000)

    async def is_not_ready() -> bool:
        return (await network.http.get("/ready")).status_code == 503

    await until(is_not_ready)
    broken = await network.http.get("/ready")
    assert broken.json()["error"]["code"] == "database_down"
    assert "retry-after" in broken.headers
    # It goes on with the nodes that it knows.
    well = await network.http.get("/health")
    assert well.status_code == 200
    assert well.json()["nodes"] == 1
    assert well.json()["database_down_since"] == "2026-01-01T00:00:00Z"


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/metrics", "/v1/models"])
async def test_head_is_answered_as_get_without_a_body(network: Network, path: str) -> None:
    got, head = await network.http.get(path), await network.http.head(path)
    assert (got.status_code, head.status_code) == (200, 200)
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    assert int(head.headers["content-length"]) > 0
    assert (await network.http.head("/chat")).status_code == 405
    assert (await network.http.head("/nothing")).status_code == 404


async def test_the_metrics_have_few_labels_whoever_asks_what(
    network: Network, start_node: StartNode
) -> None:
    await network.register(await start_node(StandIn()), "legal")
    assert (await network.http.post("/chat", json={"message": "hi"})).status_code == 200
    for number in range(5):
        await network.http.get(f"/random-{number}")
        await network.http.get(f"/v1/models/random-{number}")
        await network.http.request("PROPFIND", "/chat")
    text = (await network.http.get("/metrics")).text
    assert 'requests_total{method="POST",route="/chat",status="2xx"} 1.0' in text
    assert 'method="GET",route="unmatched",status="4xx"} 5.0' in text
    assert 'method="other",route="/chat",status="4xx"} 5.0' in text
    assert "random" not in text
    assert "r3mes_backend_live_nodes 1.0" in text
    assert "r3mes_backend_live_adapters 1.0" in text
