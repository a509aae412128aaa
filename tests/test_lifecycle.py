"""What is left of a node and of the demo when they end: nothing."""

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx
import psutil
import pytest

from tests import tiny
from tests.conftest import NODE_STARTS_S
from tests.programs import Program, free_port, program, wait_until, wait_until_async

AT_ONCE = ("--drain-timeout", "300", "--", "--max-num-seqs", "1024")
"""Options for a thousand streams."""


@contextmanager
def node(
    folder: Path, model: Path, backend: str = "http://127.0.0.1:9", *more: str
) -> Iterator[Program]:
    port = free_port()
    tiny.make_adapter(folder / "legal", seed=0)
    with program(
        folder,
        *("serve", "--loras", f"legal={folder / 'legal'}", "--model", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--backend-url", backend),
        *more,
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


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_engine_starts(
    tiny_model: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    with node(tmp_path, tiny_model) as running:
        wait_until(lambda: len(family(running.process)) > 2, 120, "the engine's processes")
        processes = family(running.process)
        assert running.stop(number, 30) == status
        assert "Traceback" not in running.output()
    assert_nothing_left(processes, tmp_path, int(running.url.rpartition(":")[2]))


@dataclass
class Stream:
    """One answer as it came; `done` when it ended as a whole one does."""

    tokens: int
    text: str = ""
    status: int = 0
    done: bool = False


async def _ask(session: aiohttp.ClientSession, url: str, stream: Stream) -> None:
    body = {
        "model": "legal",
        "prompt": "What is a contract?",
        "max_tokens": stream.tokens,
        "ignore_eos": True,
        "stream": True,
    }
    with suppress(aiohttp.ClientError):
        async with session.post(f"{url}/v1/completions", json=body) as response:
            stream.status = response.status
            async for line in response.content:
                stream.text += line.decode()
            stream.done = "[DONE]" in stream.text and '"finish_reason":"length"' in stream.text


@asynccontextmanager
async def streams(url: str, tokens: Sequence[int], begun: int) -> AsyncIterator[list[Stream]]:
    """Streams of which so many have begun; all have ended when the context ends."""
    asked = [Stream(it) for it in tokens]
    connector, patience = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=patience) as session:
        tasks = [asyncio.create_task(_ask(session, url, it)) for it in asked]
        await wait_until_async(lambda: sum(bool(it.text) for it in asked) >= begun, 120, "some")
        yield asked
        await asyncio.gather(*tasks)


async def _is_listed(backend: str) -> bool:
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{backend}/api/serving-node/list", params={"lora": "legal"})
    return bool(answer.json()["count"])


async def _unlisted_at(backend: str) -> float:
    """When the backend had no node any more, by the system's clock: told by another process, as
    this one has a thousand streams to read."""
    script = (
        f"while curl -s '{backend}/api/serving-node/list?lora=legal' | grep -q wallet; do "
        "sleep 0.02; done; date +%s.%N"
    )
    asking = await asyncio.create_subprocess_exec("sh", "-c", script, stdout=subprocess.PIPE)
    said, _ = await asking.communicate()
    return float(said)


async def test_sigterm_loses_none_of_a_thousand_streams(tiny_model: Path, tmp_path: Path) -> None:
    port = free_port()
    with (
        program(
            tmp_path / "backend",
            *("backend", "--port", str(port), "--allow-private-nodes"),
            url=(backend := f"http://127.0.0.1:{port}"),
        ),
        node(tmp_path, tiny_model, backend, *AT_ONCE) as running,
    ):
        running.wait_for("/ready", NODE_STARTS_S)
        while not await _is_listed(backend):
            await asyncio.sleep(0.05)
        processes = family(running.process)
        # the longest first, so that none is over when the last begins
        lengths = [500 - 2 * number // 5 for number in range(1000)]
        async with streams(running.url, lengths, begun=1000) as asked:
            running.process.send_signal(signal.SIGTERM)
            began, running_then = time.time(), sum(not it.done for it in asked if it.text)
            unlisted = await _unlisted_at(backend) - began
            async with httpx.AsyncClient() as client:
                refused = await client.post(f"{running.url}/chat", json={"message": "hello"})
                not_ready = await client.get(f"{running.url}/ready")
        print(f"{running_then} ran; {unlisted:.2f} s until the backend did not list it")
        assert running_then > 900
        assert all(it.done for it in asked)
        assert unlisted < 5  # 0.1 on a machine that does nothing else
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"]
        assert (not_ready.status_code, not_ready.json()["reason"]) == (503, "draining")
        assert running.process.wait(30) == 0
        assert "Traceback" not in running.output()
    assert_nothing_left(processes, tmp_path, int(running.url.rpartition(":")[2]))


async def test_ctrl_c_in_a_terminal_waits_for_streams_and_a_second_one_does_not(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A terminal sends SIGINT to the whole process group."""
    with node(tmp_path, tiny_model) as running:
        running.wait_for("/ready", NODE_STARTS_S)
        processes = family(running.process)
        async with streams(running.url, [5, 8000], begun=2) as (short, long):
            os.killpg(running.process.pid, signal.SIGINT)
            await wait_until_async(lambda: short.done, 30, "the short one")
            # the kernel makes one signal of two that the node has not yet taken
            await wait_until_async(lambda: "draining: " in running.output(), 30, "the drain")
            assert running.process.poll() is None
            os.killpg(running.process.pid, signal.SIGINT)
        assert not long.done
        assert "[DONE]" not in long.text
        assert running.process.wait(30) == 130
        assert "1 requests are aborted" in running.output()
        assert "Traceback" not in running.output()
    assert_nothing_left(processes, tmp_path, int(running.url.rpartition(":")[2]))


def test_the_demo_answers_from_two_adapters_and_leaves_nothing(tmp_path: Path) -> None:
    """The command of the README, with the real base model and the shipped adapters."""
    log = tmp_path / "demo.log"
    with log.open("wb") as file:
        demo = subprocess.Popen(
            [
                *(sys.executable, "-m", "r3mes_vllm", "demo", "--once"),
                # not those that the suite's other half looks at meanwhile
                *("--port", str(free_port()), "--backend-port", str(free_port())),
            ],
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
