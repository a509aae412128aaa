"""`r3mes-vllm doctor` beside the node that runs."""

import json
from pathlib import Path
from urllib.parse import urlsplit

from tests.cli.test_cli import run
from tests.conftest import Network


def test_it_finds_the_running_node_well(network: Network, tiny_model: Path, tmp_path: Path) -> None:
    node = urlsplit(network.node.url)
    before = sorted((network.folder / "state").iterdir())
    found = run(
        *("doctor", "--json", "--host", "127.0.0.1", "--port", str(node.port)),
        *("--backend-url", network.backend.url, "--model", str(tiny_model)),
        *("--loras", f"legal={network.folder / 'legal'}"),
        cwd=tmp_path,
        R3MES_STATE_DIR=str(network.folder / "state"),
        R3MES_CACHE_DIR=str(network.node_cache),
        R3MES_SERVING_NODE_URL=network.node.url,
    )
    told = {it["check"]: it for it in json.loads(found.stdout)}
    assert told["port free"]["message"].startswith("this node is running on ")
    assert told["public URL"]["message"] == f"the backend reaches {network.node.url}"
    for check in ("backend", "clock", "heartbeat", "model", "tokenizer", "adapters load"):
        assert told[check]["status"] == "ok", told[check]
    assert sorted((network.folder / "state").iterdir()) == before
