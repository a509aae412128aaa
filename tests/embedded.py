"""A backend, and a node of the tiny model that this program embeds, for the whole session.

The registry has `legal` and `medical`, and the node serves them by their CIDs.
"""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from r3mes_vllm import ServingNode
from r3mes_vllm.settings import Settings, load
from tests import tiny
from tests.conftest import NODE_STARTS_S
from tests.in_store import put_in_store
from tests.programs import Program, free_port, program, wait_until


@dataclass
class Embedded:
    folder: Path
    """With `cache`, `state`, and the folders of the adapters; `mine` is in no registry."""
    model: Path
    backend: Program
    settings: Settings
    node: ServingNode
    lines: list[str]
    """What the node said to its logger."""
    starting: str
    """Why it was not ready right after its start."""


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="session")
def embedded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    folder = tmp_path_factory.mktemp("embedded")
    backend_url = f"http://127.0.0.1:{(port := free_port())}"
    kept = _Kept()
    logger = logging.getLogger("r3mes_vllm.node")
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    with (
        pytest.MonkeyPatch.context() as patch,
        program(
            folder,
            *("backend", "--port", str(port), "--allow-private-nodes"),
            *("--database-url", f"sqlite:///{folder / 'backend.sqlite3'}"),
            url=backend_url,
        ) as backend,
    ):
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        backend.wait_for("/health", 30)
        for seed, name in enumerate(("legal", "medical")):
            adapter = tiny.make_adapter(folder / name, seed=seed)
            cid = asyncio.run(put_in_store(folder / "cache", adapter))
            lora = {"name": name, "ipfs_hash": cid, "description": "", "category": name}
            httpx.post(f"{backend_url}/api/lora/register", json=lora).raise_for_status()
        tiny.make_adapter(folder / "mine", seed=7)
        settings = load(
            {
                "enable_serving_node": True,
                "model": str(tiny_model),
                "loras": ["legal", "medical"],
                "backend_url": backend_url,
                "serving_node_host": "127.0.0.1",
                "serving_node_port": free_port(),
                "cache_dir": folder / "cache",
                "state_dir": folder / "state",
                "heartbeat_interval": 1,
            }
        )
        node = ServingNode(settings)
        began = node.start()
        family = []
        try:
            node.wait_ready(NODE_STARTS_S)
            wait_until(
                lambda: any("registered with" in it for it in kept.lines), 20, "the registration"
            )
            family = psutil.Process(node.status().pid).children(recursive=True)
            yield Embedded(folder, tiny_model, backend, settings, node, kept.lines, began.reason)
        finally:
            status = node.stop()
            logger.removeHandler(kept)
        assert status == 0
        assert not node.status().running
        assert family
        assert not psutil.wait_procs(family, timeout=10)[1]
