"""Settings of a node that nobody else has."""

from pathlib import Path
from typing import Any

from r3mes_vllm.settings import Settings, load
from tests.programs import free_port


def settings(tmp_path: Path, **given: Any) -> Settings:
    port = free_port()
    return load(
        {
            "serving_node_host": "127.0.0.1",
            "serving_node_port": port,
            "serving_node_url": f"http://127.0.0.1:{port}",
            "cache_dir": tmp_path / "cache",
            "state_dir": tmp_path / "state",
            "backend_url": "http://127.0.0.1:9",
        }
        | given
    )
