"""Fixtures shared by all tests: one real backend and one real node on the CPU for the session."""

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import tiny
from tests.programs import Program, free_port, program, wait_until

pytest_plugins = [
    "tests.embedded",
    "tests.peers.chromium",
    "tests.peers.helia",
    "tests.peers.js_ipfs",
    "tests.peers.libkubo",
    "tests.peers.postgres",
]

# A shell that starts the tests in the background has them ignore Ctrl-C, and so their programs.
signal.signal(signal.SIGINT, signal.default_int_handler)

NODE_STARTS_S = 300
HEARTBEAT_S = 1.0
REFRESH_S = 1.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a real engine run where a GPU is too, on the CUDA build."""
    for item in items:
        if "tiny_model" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model") / tiny.NAME)


@dataclass
class Network:
    """A backend and a node with the adapters `legal` and `medical`, of random weights."""

    folder: Path
    node_cache: Path
    backend: Program
    node: Program
    backend_arguments: tuple[str, ...]
    running: ExitStack

    def keep(self, program: AbstractContextManager[Program]) -> Program:
        """Start another program, which ends with the network."""
        return self.running.enter_context(program)


@pytest.fixture(scope="session")
def network(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    folder = tmp_path_factory.mktemp("network")
    backend_url = f"http://127.0.0.1:{(backend_port := free_port())}"
    node_url = f"http://127.0.0.1:{(node_port := free_port())}"
    adapters = ",".join(
        f"{name}={tiny.make_adapter(folder / name, seed=seed)}"
        for seed, name in enumerate(("legal", "medical"))
    )
    backend_arguments = (
        *("backend", "--port", str(backend_port), "--allow-private-nodes"),
        *("--database-url", f"sqlite:///{folder / 'backend.sqlite3'}"),
    )
    with ExitStack() as running:
        backend = running.enter_context(program(folder, *backend_arguments, url=backend_url))
        node = running.enter_context(
            program(
                folder,
                *("serve", "--loras", adapters, "--model", str(tiny_model)),
                *("--backend-url", backend_url, "--host", "127.0.0.1", "--port", str(node_port)),
                # as many slots as adapters: stock vLLM then mixes up the rows
                *("--max-loras", "2", "--allow-cid"),
                *("--", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
                url=node_url,
                env={
                    "R3MES_HEARTBEAT_INTERVAL": str(HEARTBEAT_S),
                    "R3MES_REGISTRY_REFRESH": str(REFRESH_S),
                },
            )
        )
        backend.wait_for("/health", 30)
        node.wait_for("/ready", NODE_STARTS_S)
        wait_until(lambda: "registered with" in node.output(), 20, "the registration")
        yield Network(folder, folder / "cache", backend, node, backend_arguments, running)
