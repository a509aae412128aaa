"""The router in front of four nodes of unequal speed, beside choosing blindly.

    r3mes-vllm bench routing-nodes [--rounds 5] [--seconds 30]

Real HTTP and the real backend; the nodes are programs without a model that make tokens at speeds of
1, 1, 2 and 4, two answers at a time, and keep the rest waiting. Requests come at random moments and
are of random length. The peers choose a node themselves, at random or in turn, and ask it directly.
"""

import asyncio
import contextlib
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
from starlette.types import Receive, Scope, Send

from benchmarks.client import at, session
from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.programs import running, until_well
from benchmarks.results import Target
from tests.backend.stand_ins import LEGAL_CID, serving, wallet
from tests.programs import free_port

SPEEDS = (1.0, 1.0, 2.0, 4.0)
SLOTS, TOKENS, TOKEN_S, LOAD = 2, 20, 0.02, 0.7
"""Answers at a time; mean tokens of an answer; of one at speed 1; of what the nodes can do."""
BEAT_S = 5.0


class Node:
    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._slots = asyncio.Semaphore(SLOTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        if not scope["path"].endswith("/chat"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        async with self._slots:
            for number in range(int(json.loads(body)["message"])):
                await asyncio.sleep(TOKEN_S / self._speed)
                if not number:
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": b"word ", "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def run(plan: Plan, record: Record) -> None:
    asyncio.run(_run(plan, record))


async def _run(plan: Plan, record: Record) -> None:
    for_s = plan.lasts(30, 3)
    record.describe(
        "none: no model",
        speeds=", ".join(f"{it:g}" for it in SPEEDS),
        slots=SLOTS,
        load=LOAD,
        seconds=for_s,
        mean_tokens=TOKENS,
    )
    async with contextlib.AsyncExitStack() as until_end:
        nodes = [await until_end.enter_async_context(serving(Node(it))) for it in SPEEDS]
        folder = Path(until_end.enter_context(tempfile.TemporaryDirectory()))
        port = free_port()
        until_end.enter_context(
            running(
                *("r3mes_vllm", "backend", "--port", str(port), "--allow-private-nodes"),
                *("--database-url", f"sqlite:///{folder / 'backend.sqlite3'}"),
            )
        )
        backend = f"http://127.0.0.1:{port}"
        await until_well(f"{backend}/health")
        http = await until_end.enter_async_context(session())
        await _register(http, backend, nodes)
        beating = asyncio.create_task(_beat(http, backend, len(nodes)))
        until_end.callback(beating.cancel)
        for turn in range(plan.rounds):
            seed = plan.seed + turn
            chance, cycle = random.Random(seed), itertools.cycle(nodes)
            choices: dict[str, Callable[[], str]] = {
                "the backend": lambda: backend,
                "random": lambda chance=chance: chance.choice(nodes),  # type: ignore[misc]
                "round robin": lambda cycle=cycle: next(cycle),  # type: ignore[misc]
            }
            found = {
                name: await _offered(http, choose, for_s, seed)
                for name, choose in in_turn(turn, tuple(choices.items()))
            }
            for peer in ("random", "round robin"):
                _note(record, found["the backend"], peer, found[peer])


async def _offered(
    http: aiohttp.ClientSession, choose: Callable[[], str], for_s: float, seed: int
) -> dict[str, float]:
    """Seconds until the first byte and the last."""
    rng = random.Random(seed)
    rate = LOAD * sum(SPEEDS) * SLOTS / (TOKENS * TOKEN_S)
    firsts: list[float] = []
    wholes: list[float] = []

    async def one(tokens: int) -> None:
        began, first = time.perf_counter(), 0.0
        body = {"message": str(tokens), "lora_name": "legal"}
        async with http.post(f"{choose()}/chat", json=body) as answer:
            answer.raise_for_status()
            async for _ in answer.content.iter_any():
                first = first or time.perf_counter() - began
        firsts.append(first)
        wholes.append(time.perf_counter() - began)

    ends = time.monotonic() + for_s
    async with asyncio.TaskGroup() as tasks:
        while time.monotonic() < ends:
            await asyncio.sleep(rng.expovariate(rate))
            tasks.create_task(one(1 + int(rng.expovariate(1 / TOKENS))))
    return {
        "first": statistics.mean(firsts),
        "first_p99": at(firsts, 0.99),
        "whole": statistics.mean(wholes),
        "whole_p99": at(wholes, 0.99),
    }


def _note(record: Record, ours: dict[str, float], peer: str, other: dict[str, float]) -> None:
    names = {
        "first": "until the first byte, mean",
        "first_p99": "until the first byte, p99",
        "whole": "whole answer, mean",
        "whole_p99": "whole answer, p99",
    }
    for key, name in names.items():
        record.pair(
            f"{name}, beside {peer}",
            "s",
            ours=ours[key],
            peer=other[key],
            sides=("the backend chooses", peer),
            better="lower",
            target=Target(at_most=1.0) if key.startswith("first") else None,
            chart="Four nodes of unequal speed",
        )


async def _register(http: aiohttp.ClientSession, backend: str, nodes: list[str]) -> None:
    adapters = {"adapters": {"legal": LEGAL_CID}, "available_lora_list": ["legal"]}
    for number, url in enumerate(nodes):
        body = {"wallet_address": wallet(number), "endpoint_url": url, **adapters}
        async with http.post(f"{backend}/api/serving-node/register", json=body) as answer:
            answer.raise_for_status()


async def _beat(http: aiohttp.ClientSession, backend: str, nodes: int) -> None:
    while True:
        for number in range(nodes):
            body = {"wallet_address": wallet(number), "status": "active", "current_load": 0}
            async with http.post(f"{backend}/api/serving-node/heartbeat", json=body) as answer:
                answer.raise_for_status()
        await asyncio.sleep(BEAT_S)


if __name__ == "__main__":
    alone("routing-nodes")
