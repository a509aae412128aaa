"""The whole path on one machine: backend, node, two adapters by CID, two streamed answers."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from r3mes_vllm import settings
from r3mes_vllm.adapters import shipped
from r3mes_vllm.children import ended
from r3mes_vllm.errors import R3mesError
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.report import console, say
from r3mes_vllm.wire import RegisterLora

QUESTIONS = {"legal": "What is a contract?", "medical": "What is a fever?"}

_BACKEND_STARTS_S = 60.0
_NODE_STARTS_S = 600.0
_STOPS_S = 30.0
_PR_SET_PDEATHSIG = 1


class DemoFailed(R3mesError):
    code = "demo"


def run(*, once: bool, node_port: int, backend_port: int) -> None:
    """Start both programs, ask both questions, serve until Ctrl-C unless `once`.

    Raises DemoFailed when one of them ends by itself. Nothing is left running.
    """
    signal.signal(signal.SIGTERM, ended)
    state = settings.load().state_dir / "demo"
    state.mkdir(parents=True, exist_ok=True)
    backend_port = _free_port(backend_port)
    node_port = _free_port(node_port, taken=backend_port)
    backend_url, node_url = f"http://127.0.0.1:{backend_port}", f"http://127.0.0.1:{node_port}"
    database = f"sqlite:///{state / 'backend.sqlite3'}"
    with contextlib.ExitStack() as running:
        backend = running.enter_context(
            _program(
                state,
                *("backend", "--host", "127.0.0.1", "--port", str(backend_port)),
                *("--database-url", database, "--allow-private-nodes"),
            )
        )
        _wait_for(f"{backend_url}/health", backend, _BACKEND_STARTS_S)
        asyncio.run(_register_loras(backend_url))
        node = running.enter_context(
            _program(
                state,
                *("serve", "--loras", ",".join(QUESTIONS), "--backend-url", backend_url),
                *("--host", "127.0.0.1", "--port", str(node_port)),
                *("--", "--max-model-len", "2048"),
            )
        )
        for name in QUESTIONS:
            _wait_for_holder(backend_url, name, node)
        asyncio.run(_ask_all(backend_url))
        say(f"\nbackend  {backend_url}    chat, /v1 and the list of nodes")
        say(f"node     {node_url}    /chat, /v1 (OpenAI), /health")
        if once:
            return
        say("Serving until Ctrl-C.")
        while node.poll() is None and backend.poll() is None:
            time.sleep(0.2)
        raise DemoFailed("the node or the backend ended by itself; its last lines are above")


@contextlib.contextmanager
def _program(state: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `r3mes-vllm ARGUMENTS`; on leaving, end it and wait for it."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("R3MES_") or name == "R3MES_CACHE_DIR"
    }
    environment |= {"R3MES_STATE_DIR": str(state)}
    environment.pop("BACKEND_PORT", None)
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "r3mes_vllm", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        # Ctrl-C must not reach it directly: the node says goodbye while the backend still listens.
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOPS_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port(first: int, taken: int | None = None) -> int:
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                if port != taken:
                    return port
    raise DemoFailed(f"no free port from {first} to {first + 99}", hint="pass --port")


async def _register_loras(backend_url: str) -> None:
    async with BackendClient(backend_url) as client:
        for adapter in shipped.adapters():
            await client.register_lora(
                RegisterLora(
                    name=adapter.name,
                    ipfs_hash=adapter.cid,
                    description=adapter.description,
                    category=adapter.category,
                )
            )


def _wait_for(url: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    _until(lambda: httpx.get(url, trust_env=False).is_success, url, process, seconds)


def _wait_for_holder(backend_url: str, adapter: str, process: subprocess.Popen[bytes]) -> None:
    url = f"{backend_url}/api/serving-node/list"

    def listed() -> bool:
        answer = httpx.get(url, params={"lora": adapter}, trust_env=False)
        return answer.is_success and answer.json()["count"] > 0

    _until(listed, f"a node with {adapter}", process, _NODE_STARTS_S)


def _until(
    condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes], seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if condition():
                return
        time.sleep(0.1)
    if process.returncode is not None:
        raise DemoFailed(f"it ended with status {process.returncode}, waiting for {what}")
    raise DemoFailed(f"waited {seconds:.0f} s for {what}")


async def _ask_all(backend_url: str) -> None:
    """All at once, as the engine takes them; the answers are shown as they come, in order."""
    pieces = {name: asyncio.Queue[str | None]() for name in QUESTIONS}
    async with httpx.AsyncClient(base_url=backend_url, timeout=120, trust_env=False) as client:
        asked = {
            name: asyncio.create_task(_ask(client, name, question, pieces[name]))
            for name, question in QUESTIONS.items()
        }
        try:
            for name, question in QUESTIONS.items():
                say(f"\n[{name}] {question}")
                while (text := await pieces[name].get()) is not None:
                    console().print(text, end="", markup=False)
                say(f"\n  {await asked[name]}")
        finally:
            for task in asked.values():
                task.cancel()
            await asyncio.gather(*asked.values(), return_exceptions=True)


async def _ask(
    client: httpx.AsyncClient, adapter: str, question: str, pieces: asyncio.Queue[str | None]
) -> str:
    """Who answered; the answer itself goes into `pieces`, with None after its last one."""
    body = {"message": question, "lora_name": adapter, "temperature": 0}
    try:
        async with client.stream("POST", "/chat", json=body) as answer:
            if not answer.is_success:
                said = await answer.aread()
                raise DemoFailed(f"{adapter} did not answer: {answer.status_code} {said!r}")
            async for text in answer.aiter_text():
                pieces.put_nowait(text)
            served_by = answer.headers.get("x-r3mes-node", "?")
            cid = answer.headers.get("x-r3mes-cid", "?")
            return f"adapter {cid}, node {served_by}"
    finally:
        pieces.put_nowait(None)
