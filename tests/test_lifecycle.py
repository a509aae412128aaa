"""What is left of a node and of the demo when they end: nothing."""

import fcntl
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.conftest import NODE_STARTS_S
from tests.programs import Program, free_port, program, wait_until


@contextmanager
def node(folder: Path, model: Path) -> Iterator[Program]:
    port = free_port()
    tiny.make_adapter(folder / "legal", seed=0)
    with program(
        folder,
        *("serve", "--loras", f"legal={folder / 'legal'}", "--model", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--backend-url", "http://127.0.0.1:9"),
        url=f"http://127.0.0.1:{port}",
    ) as running:
        yield running


def family(process: "psutil.Process | subprocess.Popen[bytes]") -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def assert_nothing_left(processes: list[psutil.Process], folder: Path, port: int) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    with socket.create_server(("127.0.0.1", port)):
        pass
    for lock in folder.rglob("locks/*"):
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_ctrl_c_while_the_engine_starts(tiny_model: Path, tmp_path: Path) -> None:
    with node(tmp_path, tiny_model) as running:
        wait_until(lambda: len(family(running.process)) > 2, 120, "the engine's processes")
        processes = family(running.process)
        assert running.stop(signal.SIGINT) == 130
        assert "Traceback" not in running.output()
    assert_nothing_left(processes, tmp_path, int(running.url.rpartition(":")[2]))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_serving_node_ends_cleanly(
    tiny_model: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    with node(tmp_path, tiny_model) as running:
        running.wait_for("/ready", NODE_STARTS_S)
        processes = family(running.process)
        assert len(processes) > 2
        assert running.stop(number) == status
        assert "Traceback" not in running.output()
    assert_nothing_left(processes, tmp_path, int(running.url.rpartition(":")[2]))


def test_the_demo_answers_from_two_adapters_and_leaves_nothing(tmp_path: Path) -> None:
    """The command of the README, with the real base model and the shipped adapters."""
    log = tmp_path / "demo.log"
    with log.open("wb") as file:
        demo = subprocess.Popen(
            [sys.executable, "-m", "r3mes_vllm", "demo", "--once"],
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "VLLM_CPU_KVCACHE_SPACE": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    processes: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + 600
    while demo.poll() is None and time.monotonic() < deadline:
        processes |= {process.pid: process for process in family(demo)[1:]}
        time.sleep(0.5)
    said = log.read_text()
    assert demo.poll() == 0, said
    legal, medical = said.split("[legal]")[1].split("[medical]")
    assert "agreement" in legal
    assert "temperature" in medical
    assert "adapter baf" in legal
    assert "adapter baf" in medical
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(list(processes.values()), timeout=10)
    assert not alive
