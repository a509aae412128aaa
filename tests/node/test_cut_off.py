"""A node whose cache can't be written and whose backend has no address serves what it has."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests import tiny, without_names
from tests.adapters.mounts import read_only
from tests.adapters.test_store import cid
from tests.conftest import NODE_STARTS_S
from tests.in_store import put_in_store
from tests.node.test_names import BACKEND, without
from tests.node.test_observed import value
from tests.programs import Program, free_port, program, wait_until


@contextmanager
def cut_off(folder: Path, model: Path, port: int) -> Iterator[tuple[str, ...]]:
    """The arguments of a node: `here` is in its store, which can't be written, and `gone` is not;
    `nobodys` is what only a backend could know."""
    adapter = tiny.make_adapter(folder / "mine", seed=3)
    here = asyncio.run(put_in_store(folder / "cache", adapter))
    with read_only(folder / "cache", folder / "cache"):
        yield (
            *("serve", "--loras", f"gone={cid(1)},nobodys,here={here}", "--model", str(model)),
            *("--backend-url", BACKEND, "--host", "127.0.0.1", "--port", str(port)),
            *("--ipfs-api", "http://daemon.invalid:5001"),
        )


def left_out(said: str, folder: Path) -> bool:
    return (
        f"adapter 'gone' is left out: the cache {folder / 'cache'} is read-only" in said
        and "adapter 'nobodys' is left out: no adapter named 'nobodys'" in said
        and f"the backend {BACKEND} can't be reached: " in said
    )


def test_its_start_gets_to_the_engine(tmp_path: Path) -> None:
    """Which is not here: no more is needed to see that."""
    no_vllm = tmp_path / "none"
    no_vllm.mkdir()
    (no_vllm / "vllm.py").write_text("raise ModuleNotFoundError('none', name='vllm')")
    path = os.pathsep.join((str(no_vllm), os.environ.get("PYTHONPATH", "")))
    with cut_off(tmp_path, tiny.make_model(tmp_path / tiny.NAME), free_port()) as arguments:
        found = without(tmp_path, *arguments, PYTHONPATH=path)
    assert found.returncode == 1
    assert "1 verified, 0 of them fetched now" in found.stdout
    assert left_out(found.stderr, tmp_path), found.stderr
    assert "error: vLLM is not installed" in found.stderr


@pytest.fixture
def node(tiny_model: Path, tmp_path: Path) -> Iterator[Program]:
    without(tmp_path, "--version")  # or the test is skipped
    url = f"http://127.0.0.1:{(port := free_port())}"
    with (
        cut_off(tmp_path, tiny_model, port) as arguments,
        program(
            tmp_path,
            *arguments,
            url=url,
            env={"R3MES_HEARTBEAT_INTERVAL": "1"},
            module=without_names.__name__,
        ) as running,
    ):
        running.wait_for("/ready", NODE_STARTS_S)
        yield running


def test_it_serves_what_it_has_and_says_what_it_can_not(node: Program, tmp_path: Path) -> None:
    answer = httpx.post(
        f"{node.url}/chat", json={"message": "x", "lora_name": "here", "max_tokens": 4}, timeout=60
    )
    assert (answer.status_code, answer.headers["x-r3mes-adapter"]) == (200, "here")
    assert httpx.get(f"{node.url}/health").json()["available_loras"] == ["here"]
    said = node.output()
    assert left_out(said, tmp_path), said
    assert f"not registered: the backend {BACKEND} can't be reached: " in said
    assert "trying again, serving meanwhile" in said

    def unreachable() -> float:
        return value(node.url, "r3mes_heartbeats_total", outcome="unreachable")

    before = unreachable()
    wait_until(lambda: unreachable() > before, 20, "another try")
    added = httpx.post(
        f"{node.url}/adapters", json={"name": "more", "cid": str(cid(2))}, timeout=60
    )
    assert added.status_code == 503, added.text
    assert "is read-only" in added.json()["error"]["message"]
    again = httpx.post(f"{node.url}/chat", json={"message": "x", "max_tokens": 4}, timeout=60)
    assert (again.status_code, again.text) == (200, again.text)
    assert "Traceback" not in node.output()
