"""What people and monitors look at."""

from pathlib import Path

import pytest

from tests.backend.conftest import StartNode
from tests.backend.stand_ins import LEGAL_CID, Network, StandIn, wallet


async def test_the_page_lists_nodes_and_adapters_as_text(network: Network) -> None:
    await network.register_lora("legal", LEGAL_CID)
    await network.register(
        "http://127.0.0.1:1", "legal", "<script>alert(1)</script>", base_model="<b>base</b>"
    )
    page = await network.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for text in ("legal", LEGAL_CID, wallet(1), "&lt;b&gt;base&lt;/b&gt;"):
        assert text in page.text
    assert "<script" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_it_is_well_while_its_database_answers(
    network: Network, tmp_path: Path, path: str
) -> None:
    await network.register("http://127.0.0.1:1", "legal")
    assert (await network.http.get(path)).json() == {"status": "ok", "nodes": 1}
    for file in tmp_path.glob("backend.sqlite3*"):
        file.write_bytes(b"this is no database" * 1000)
    broken = await network.http.get(path)
    assert broken.status_code == 503
    assert broken.json()["error"]["code"] == "database_down"
    assert "retry-after" in broken.headers


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
