"""Node processes killed with SIGKILL before and after the first token of their answers.

    python -m tests.backend.killing [--kills 100] [--seed N]

Two processes that answer like nodes of ours, one of which is killed and started again beside eight
streams: `kills` times before the first token, and as often after it. Then one of them alone, killed
`kills` times in mid-stream. Prints as JSON how many answers there were, how many the killed nodes
had, how many moved, and how many of the lone node's ended as errors. Exit status 1 unless each of
the first is whole, token for token, and each of the lone node's, unless it is whole, an error to
whoever reads it; and where nothing was shown, since a killed node had no answer under way.
"""

import argparse
import asyncio
import json
import logging
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from r3mes_vllm.backend.app import create_app
from r3mes_vllm.backend.state import Backend
from r3mes_vllm.settings import load
from tests.backend.chaos import Node, words
from tests.backend.stand_ins import LEGAL_CID, serving, wallet
from tests.programs import free_port, verdict

STREAMS, FIRST_S = 8, 0.5
"""Streams at once; seconds until a node's first token."""
WORDS = 40
"""Of an answer, each in 10 ms."""
KILL_S = 60.0
"""What a kill may take at most, on average."""


class _Calm(random.Random):
    """No mishaps, and each token in 10 ms."""

    def random(self) -> float:
        return 0.99


class _Slow(Node):
    async def __call__(self, scope: object, receive: object, send: object) -> None:
        await asyncio.sleep(FIRST_S)
        await super().__call__(scope, receive, send)  # type: ignore[arg-type]


async def kill_nodes(folder: Path, *, kills: int, seed: int) -> Counter[str]:
    """What became of the answers. Raises AssertionError when one is not what it must be, and
    TimeoutError."""
    chance, found = random.Random(seed), Counter[str]()
    given = {
        "allow_private_nodes": True,
        "database_url": f"sqlite:///{folder}/backend.sqlite3",
    }
    async with asyncio.timeout(3 * kills * KILL_S), AsyncExitStack() as running:
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
            found["killed in mid-stream" if begun else "killed before a token"] += max(busy)
            found["moved"] += sum(await asyncio.gather(*asking))
            found["answers"] += STREAMS
            await victim.start(http)
        (lone, other) = nodes
        other.kill()
        await other.leave(http)
        for number in range(kills):
            await lone.beat(http)
            alone = [_Alone(f"alone {number} {i}", events=bool(i % 2)) for i in range(STREAMS)]
            asking_alone = [asyncio.create_task(it.ask(http)) for it in alone]
            await asyncio.sleep(FIRST_S * (1.2 + 0.4 * chance.random()))
            under_way = [it for it in alone if it.is_under_way]
            lone.kill()
            await asyncio.gather(*asking_alone)
            found["alone: killed in mid-stream"] += len(under_way)
            found["alone: errors"] += sum(it.ended == "error" for it in under_way)
            found["alone: whole"] += sum(it.ended == "whole" for it in under_way)
            await lone.start(http)
    return found


def problems(found: Counter[str], kills: int) -> list[str]:
    """Why a run that lost nothing has failed all the same, or shown nothing."""
    said = []
    if found["answers"] != 2 * kills * STREAMS:
        said.append(f"{found['answers']} answers, of {2 * kills * STREAMS} asked for")
    for what in (
        *("killed before a token", "killed in mid-stream", "moved"),
        *("alone: killed in mid-stream", "alone: errors"),
    ):
        if found[what] < max(kills, 1):
            said.append(f"{what}: {found[what]} answers in {kills} kills, which shows nothing")
    # One whose end was on its way when the node was killed is whole.
    if found["alone: errors"] + found["alone: whole"] != found["alone: killed in mid-stream"]:
        said.append("not all that a lone node had under way ended as errors")
    if found["alone: errors"] < 0.9 * found["alone: killed in mid-stream"]:
        said.append("too many of a lone node's answers had ended before it was killed")
    return said


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

    async def leave(self, http: httpx.AsyncClient) -> None:
        left = {"wallet_address": wallet(self._number)}
        (await http.post("/api/serving-node/deregister", json=left)).raise_for_status()

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
    assert said == "".join(words(LEGAL_CID, question, WORDS))
    assert answer.text.count("data: [DONE]") == 1
    return ": x-r3mes-nodes: " in answer.text


@dataclass
class _Alone:
    """An answer that nobody can go on with."""

    question: str
    events: bool
    body: bytes = b""
    ended: str = ""
    """As an "error", "refused", or "whole"."""

    @property
    def is_under_way(self) -> bool:
        return bool(self.body) and not self.ended

    async def ask(self, http: httpx.AsyncClient) -> None:
        """Raises AssertionError where a part of the answer looks like all of it."""
        asked: dict[str, object] = {"message": self.question, "lora_name": "legal"}
        if self.events:
            messages = [{"role": "user", "content": self.question}]
            asked = {"model": "legal", "stream": True, "messages": messages}
        path = "/v1/chat/completions" if self.events else "/chat"
        try:
            async with http.stream("POST", path, json=asked) as answer:
                async for piece in answer.aiter_raw():
                    self.body += piece
        except httpx.RemoteProtocolError:
            self.ended = "error"
            assert b"[DONE]" not in self.body
            # Plain text has no room for an error: its connection ends before its end.
            assert not self.events or b"event: error" in self.body, self.body
            return
        self.ended = "whole" if answer.status_code == 200 else "refused"
        said = "".join(words(LEGAL_CID, self.question, WORDS)).encode()
        is_all = self.body.count(b"[DONE]") == 1 if self.events else self.body == said
        assert self.ended == "refused" or is_all, self.body


async def _serve(port: int) -> None:
    import uvicorn

    config = uvicorn.Config(_Slow(0, _Calm(), length=WORDS), port=port, log_level="critical")
    await uvicorn.Server(config).serve()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--node", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node:
        asyncio.run(_serve(options.node))
        return 0
    print(f"seed {options.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        found = asyncio.run(kill_nodes(Path(name), kills=options.kills, seed=options.seed))
    print(json.dumps(dict(found) | {"seed": options.seed}), flush=True)
    return verdict(problems(found, options.kills))


if __name__ == "__main__":
    logging.getLogger("r3mes_vllm").setLevel(logging.ERROR)  # nodes break off all the time
    sys.exit(main())
