"""Real nodes that are killed while they answer.

    python -m tests.killed_nodes [--kills 20] [--alone 3] [--seed N]

Two nodes with the tests' model, and a backend. One of the nodes is killed and started again beside
24 streams: `kills` times at a random instant of their first 50 ms, and as often when four streams
of it have begun. Then one node without another is killed when four streams have begun, `alone`
times. Prints as JSON how many answers there were, how many of them moved and how many could be
compared, and how many of the lone node's ended as errors. Exit status 1 unless each of the first is
whole, token for token, and none of the lone node's that it had begun looks complete without being
so; where nothing was shown, since none moved or ended as an error; and if it has not ended in time.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.conftest import NODE_STARTS_S
from tests.engine.poisoned import poisonous_model
from tests.programs import Program, free_port, program, verdict, wait_until, wait_until_async
from tests.test_lifecycle import family, node

STREAMS, TOKENS = 24, 150
BEGUN = 4
"""Streams of the node that is killed in mid-stream."""
EACH_S = 240.0
"""What a kill may take at most, on average, with the start of another node."""


@dataclass
class Stream:
    question: str
    said: str = ""
    first: str = ""
    """The wallet of the node that began it."""
    moved: bool = False
    ended: bool = False
    """As a whole answer does."""
    tokens: int | None = None
    said_why: str = ""
    """The code of the error that ended it."""


async def _ask(http: httpx.AsyncClient, stream: Stream, model: str) -> None:
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": stream.question}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with http.stream("POST", "/v1/chat/completions", json=asked) as answer:
            if answer.status_code != 200:
                assert answer.status_code in (502, 503)  # no node is left
                return
            stream.first = answer.headers["x-r3mes-node"]
            async for line in answer.aiter_lines():
                stream.moved |= line.startswith(": x-r3mes-nodes: ")
                stream.ended |= line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    stream.said_why = event.get("error", {}).get("code") or stream.said_why
                    for choice in event.get("choices", ()):
                        stream.said += choice["delta"].get("content") or ""
                    if event.get("usage"):
                        stream.tokens = event["usage"]["completion_tokens"]
    except httpx.RemoteProtocolError:
        stream.ended = False


@asynccontextmanager
async def asked(backend: str, model: str = "legal") -> AsyncIterator[list[Stream]]:
    """Streams that have just been asked for; all have ended when the context ends."""
    found = [Stream(f"what is number {number}?") for number in range(STREAMS)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=backend, timeout=120, limits=limits) as http:
        tasks = [asyncio.create_task(_ask(http, it, model)) for it in found]
        try:
            yield found
        finally:
            await asyncio.gather(*tasks)


def wallet_of(backend: str, url: str) -> str:
    """Of the node at `url`, as soon as it may be used."""
    found: dict[str, str] = {}

    def listed() -> bool:
        answer = httpx.get(f"{backend}/api/serving-node/list?lora=legal")
        found.update({it["endpoint_url"]: it["wallet_address"] for it in answer.json()["nodes"]})
        return url in found

    wait_until(listed, 20, "the registration")
    return found[url]


class Pair:
    """A backend and two nodes, by wallet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running = ExitStack()
        self.nodes: dict[str, Program] = {}

    async def __aenter__(self) -> "Pair":
        await asyncio.to_thread(self._begin)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._running.close)

    def _begin(self) -> None:
        self._model = poisonous_model(self._folder / "model")
        port = free_port()
        self.backend = self._running.enter_context(
            program(
                self._folder / "backend",
                *("backend", "--port", str(port), "--allow-private-nodes"),
                url=f"http://127.0.0.1:{port}",
            )
        ).url
        for _ in range(2):
            self.start()

    def start(self) -> None:
        """Another node, until it may be used."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        started = self._running.enter_context(node(folder, self._model, self.backend))
        started.wait_for("/ready", NODE_STARTS_S)
        self.nodes[wallet_of(self.backend, started.url)] = started


def kill(node: Program) -> list[psutil.Process]:
    """Its own process alone. Gives those that it had, which must end by themselves."""
    processes = family(node.process)
    node.process.kill()
    node.process.wait()
    return processes


async def certain(backend: str) -> dict[str, str]:
    """Answers by question, of those that come out the same whatever is computed beside them."""
    found = []
    for _ in range(3):
        async with asked(backend) as streams:
            pass
        found.append({it.question: it.said for it in streams})
    same = {q: said for q, said in found[0].items() if all(it[q] == said for it in found)}
    assert len(same) > STREAMS // 2
    return same


async def busy(streams: list[Stream]) -> str:
    """The node that several streams have begun at and not ended, as soon as there is one."""
    wallets = Counter[str]()

    def found() -> bool:
        wallets.clear()
        wallets.update(it.first for it in streams if it.said and not it.ended)
        return bool(wallets) and max(wallets.values()) >= BEGUN

    await wait_until_async(found, 60, "four streams of one node")
    return wallets.most_common()[0][0]


def assert_whole(streams: list[Stream], expected: dict[str, str]) -> None:
    for it in streams:
        assert it.ended
        assert it.tokens == TOKENS
        assert it.said == expected.get(it.question, it.said)


async def kill_nodes(folder: Path, *, kills: int, alone: int, seed: int) -> Counter[str]:
    """What became of the answers. Raises AssertionError when one is not what it must be, and
    TimeoutError."""
    chance, found = random.Random(seed), Counter[str]()
    limit_s = 2 * NODE_STARTS_S + EACH_S * (2 * kills + alone)
    async with asyncio.timeout(limit_s), Pair(folder) as pair:
        expected = await certain(pair.backend)
        for number in range(2 * kills):
            async with asked(pair.backend) as streams:
                if number % 2:
                    victim = await busy(streams)
                else:
                    await asyncio.sleep(0.05 * chance.random())
                    victim = chance.choice(list(pair.nodes))
                kill(pair.nodes.pop(victim))
            assert_whole(streams, expected)
            found["answers"] += len(streams)
            found["moved"] += sum(it.moved for it in streams)
            found["compared"] += sum(it.question in expected for it in streams)
            print(f"kill {number + 1} of {2 * kills}: {dict(found)}", file=sys.stderr, flush=True)
            await asyncio.to_thread(pair.start)
        kill(pair.nodes.pop(chance.choice(list(pair.nodes))))
        for number in range(alone):
            async with asked(pair.backend) as streams:
                kill(pair.nodes.pop(await busy(streams)))
            found += judged_alone(streams, expected)
            print(f"alone {number + 1} of {alone}: {dict(found)}", file=sys.stderr, flush=True)
            if number + 1 < alone:
                await asyncio.to_thread(pair.start)
    return found


def judged_alone(streams: list[Stream], expected: dict[str, str]) -> Counter[str]:
    """What became of the answers of a node that was killed while there was no other. Raises
    AssertionError where one in part looks complete."""
    assert_whole([it for it in streams if it.ended], expected)
    broken = [it for it in streams if it.said and not it.ended]
    assert all(it.tokens is None and it.said_why == "node_failed" for it in broken), broken
    assert not any(it.moved for it in broken)
    return Counter({"alone: answers": len(streams), "alone: errors": len(broken)})


def problems(found: Counter[str], kills: int, alone: int) -> list[str]:
    """Why a run that lost nothing has failed all the same, or shown nothing."""
    said = []
    for what, most in (("answers", 2 * kills), ("alone: answers", alone)):
        if not 0 < most * STREAMS == found[what]:
            said.append(f"{what}: {found[what]}, of {most * STREAMS}")
    if found["moved"] < kills:
        said.append(f"{found['moved']} answers moved in {kills} kills in mid-stream")
    if found["compared"] <= found["answers"] // 2:
        said.append(f"only {found['compared']} answers could be compared")
    if found["alone: errors"] < alone:
        said.append(f"{found['alone: errors']} answers of a lone node ended as errors")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--alone", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        found = asyncio.run(
            kill_nodes(Path(name), kills=options.kills, alone=options.alone, seed=options.seed)
        )
    print(json.dumps(dict(found) | {"seed": options.seed}), flush=True)
    return verdict(problems(found, options.kills, options.alone))


if __name__ == "__main__":
    sys.exit(main())
