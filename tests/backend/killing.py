"""Node processes killed with SIGKILL before and after the first token of their answers.

    python -m tests.backend.killing [--kills 100] [--seed N]

Two processes that answer like nodes of ours, one of which is killed and started again beside eight
streams: `kills` times before the first token, and as often after it. Prints as JSON how many
answers there were and how many of them moved; fails unless each is whole, token for token.
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import httpx

from r3mes_vllm.backend.app import create_app
from r3mes_vllm.backend.state import Backend
from r3mes_vllm.settings import load
from tests.backend.chaos import Node, words
from tests.backend.stand_ins import LEGAL_CID, serving, wallet
from tests.programs import free_port

STREAMS, FIRST_S = 8, 0.5
"""Streams at once; seconds until a node's first token."""


class _Calm(random.Random):
    """No mishaps, and each token in 10 ms."""

    def random(self) -> float:
        return 0.99


class _Slow(Node):
    async def __call__(self, scope: object, receive: object, send: object) -> None:
        await asyncio.sleep(FIRST_S)
        await super().__call__(scope, receive, send)  # type: ignore[arg-type]


async def kill_nodes(folder: Path, *, kills: int, seed: int) -> Counter[str]:
    """What became of the answers. Raises AssertionError when one is not whole."""
    chance, found = random.Random(seed), Counter[str]()
    given = {
        "allow_private_nodes": True,
        "database_url": f"sqlite:///{folder}/backend.sqlite3",
    }
    async with AsyncExitStack() as running:
        app = create_app(load(given))
        url = await running.enter_async_context(serving(app))
        http = httpx.AsyncClient(
            base_url=url,
            timeout=60,
            limits=httpx.Limits(keepalive_expiry=1),  # before the stand-in server closes
        )
        await running.enter_async_context(http)
        registered = {"name": "legal", "ipfs_hash": LEGAL_CID}
        (await http.post("/api/lora/register", json=registered)).raise_for_status()
        nodes = [_Process(number) for number in (1, 2)]
        for node in nodes:
            running.callback(node.kill)
            await node.start(http)
        for number in range(2 * kills):
            begun = number % 2 == 1
            for node in nodes:
                await node.beat(http)
            asking = [asyncio.create_task(_ask(http, f"q{number} {i}")) for i in range(STREAMS)]
            await asyncio.sleep(FIRST_S * (0.2 + 0.6 * chance.random() + begun))
            busy = [await node.in_flight(app.state.backend) for node in nodes]
            victim = nodes[busy.index(max(busy))]
            victim.kill()
            moved = sum(await asyncio.gather(*asking))
            found["answers"] += STREAMS
            found["moved"] += moved
            await victim.start(http)
    return found


class _Process:
    """A node's."""

    def __init__(self, number: int) -> None:
        self._number = number

    async def start(self, http: httpx.AsyncClient) -> None:
        port = free_port()
        command = [sys.executable, "-m", __spec__.name, "--node", str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        node = {
            "wallet_address": wallet(self._number),
            "endpoint_url": f"http://127.0.0.1:{port}",
            "available_lora_list": ["legal"],
            "adapters": {"legal": LEGAL_CID},
            "version": "0",
        }
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            await asyncio.sleep(0.05)
        (await http.post("/api/serving-node/register", json=node)).raise_for_status()

    async def beat(self, http: httpx.AsyncClient) -> None:
        beat = {"wallet_address": wallet(self._number), "status": "active", "current_load": 0}
        (await http.post("/api/serving-node/heartbeat", json=beat)).raise_for_status()

    async def in_flight(self, backend: Backend) -> int:
        node = await backend.registry.node(wallet(self._number))
        assert node
        return backend.balancer.state(node).in_flight

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


async def _ask(http: httpx.AsyncClient, question: str) -> bool:
    """Whether another node than the first went on with the answer."""
    asked = {
        "model": "legal",
        "stream": True,
        "messages": [{"role": "user", "content": question}],
    }
    answer = await http.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    lines = [it.removeprefix("data: ") for it in answer.text.splitlines() if "delta" in it]
    said = "".join(json.loads(it)["choices"][0]["delta"]["content"] for it in lines)
    assert said == "".join(words(LEGAL_CID, question))
    assert answer.text.count("data: [DONE]") == 1
    return ": x-r3mes-nodes: " in answer.text


async def _serve(port: int) -> None:
    import uvicorn

    config = uvicorn.Config(_Slow(0, _Calm()), port=port, log_level="critical")
    await uvicorn.Server(config).serve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--node", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node:
        asyncio.run(_serve(options.node))
        return
    print(f"seed {options.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        found = asyncio.run(kill_nodes(Path(name), kills=options.kills, seed=options.seed))
    print(json.dumps(dict(found) | {"seed": options.seed}))


if __name__ == "__main__":
    main()
