"""What the backend adds to a stream: the same node, asked directly and through it, in turn.

    r3mes-vllm bench router [--rounds 10]

The node is a program that sends tokens in frames, as ours does, without a model; the backend is the
real one with that node and as many others registered, which beat meanwhile. First one request at a
time, then so many streams at once, each with a token every 40 ms.
"""

import asyncio
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvicorn

from benchmarks.client import at
from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.programs import running, until_well
from benchmarks.results import Target
from r3mes_vllm.carry import FRAMES, HEADER, Frame, Step
from tests.backend.stand_ins import LEGAL_CID, wallet
from tests.programs import free_port

SHORT, LONG = 10, 200
"""Tokens of a request alone, and of one of many."""
PAUSE_S = 0.04
BEAT_S = 30.0


def run(plan: Plan, record: Record) -> None:
    asyncio.run(_run(plan, record))


async def _run(plan: Plan, record: Record) -> None:
    requests, streams, nodes = plan.pick((200, 64, 1000), (20, 8, 10))
    record.describe("none: no model", requests=requests, streams=streams, other_nodes=nodes)
    with ExitStack() as until_end:
        folder = until_end.enter_context(tempfile.TemporaryDirectory())
        node_port, port = free_port(), free_port()
        until_end.enter_context(running("benchmarks.router", "--node", str(node_port)))
        database = f"sqlite:///{Path(folder) / 'backend.sqlite3'}"
        backend = until_end.enter_context(
            running(
                *("r3mes_vllm", "backend", "--port", str(port), "--allow-private-nodes"),
                *("--database-url", database),
            )
        )
        urls = {"direct": f"http://127.0.0.1:{node_port}", "routed": f"http://127.0.0.1:{port}"}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            for url in urls.values():
                await until_well(f"{url}/health")
            await _register(http, urls["routed"], urls["direct"], nodes)
            beating = asyncio.create_task(_beat(http, urls["routed"], nodes))
            for turn in range(plan.rounds):
                found = {
                    kind: await _measured(http, urls[kind], requests, streams, backend.pid)
                    for kind in in_turn(turn, ("direct", "routed"))
                }
                _note(record, streams, found["routed"], found["direct"])
            beating.cancel()


async def _measured(
    http: aiohttp.ClientSession, url: str, requests: int, streams: int, backend: int
) -> dict[str, float]:
    one = await _alone(http, url, requests)
    used = psutil.Process(backend).cpu_times()
    many = await _at_once(http, url, streams)
    now = psutil.Process(backend).cpu_times()
    cores = (now.user + now.system - used.user - used.system) / many["seconds"]
    return one | many | {"backend_cores": cores}


def _note(record: Record, streams: int, routed: dict[str, float], direct: dict[str, float]) -> None:
    sides = ("through the backend", "the node directly")
    names = {
        "p50": ("until the first byte, p50", 2.0),
        "p99": ("until the first byte, p99", 5.0),
        "whole_p50": (f"until the last of {SHORT} tokens, p50", None),
        "whole_p99": (f"until the last of {SHORT} tokens, p99", None),
    }
    for key, (name, added) in names.items():
        record.pair(
            name,
            "ms",
            ours=routed[key] * 1000,
            peer=direct[key] * 1000,
            sides=sides,
            better="lower",
            target=Target(of="added", at_most=added) if added else None,
            chart="What the backend adds, one request at a time",
        )
    record.pair(
        f"{streams} streams of {1 / PAUSE_S:g} tokens a second",
        "tokens/s",
        ours=routed["tokens_per_s"],
        peer=direct["tokens_per_s"],
        sides=sides,
    )
    record.pair(
        f"cores of the backend with {streams} streams",
        "cores",
        ours=routed["backend_cores"],
        peer=direct["backend_cores"],
        sides=("with streams", "with beats alone"),
        better="lower",
    )


async def _alone(http: aiohttp.ClientSession, url: str, requests: int) -> dict[str, float]:
    """Seconds until the first byte and the last one of requests without pauses, one at a time."""
    firsts, wholes = [], []
    for _ in range(requests):
        first, whole = await _ask(http, url, SHORT, pause=False)
        firsts.append(first)
        wholes.append(whole)
    return {
        "p50": at(firsts, 0.5),
        "p99": at(firsts, 0.99),
        "whole_p50": at(wholes, 0.5),
        "whole_p99": at(wholes, 0.99),
    }


async def _at_once(http: aiohttp.ClientSession, url: str, streams: int) -> dict[str, float]:
    began = time.perf_counter()
    await asyncio.gather(*(_ask(http, url, LONG, pause=True) for _ in range(streams)))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens_per_s": streams * LONG / seconds}


async def _ask(
    http: aiohttp.ClientSession, url: str, tokens: int, *, pause: bool
) -> tuple[float, float]:
    began, first = time.perf_counter(), 0.0
    asked = {"message": f"{tokens} {int(pause)}", "lora_name": "legal"}
    async with http.post(f"{url}/chat", json=asked) as answer:
        answer.raise_for_status()
        async for _ in answer.content.iter_any():
            first = first or time.perf_counter() - began
    return first, time.perf_counter() - began


async def _node(scope: Any, receive: Any, send: Any) -> None:
    """As our node, on `/chat`: so many tokens, with pauses or without."""
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if scope["path"] != "/chat":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        return
    tokens, pause = map(int, json.loads(body)["message"].split())
    framed = dict(scope["headers"]).get(HEADER.encode()) == FRAMES.encode()
    headers = [(b"content-type", b"text/plain"), (b"x-r3mes-cid", LEGAL_CID.encode())]
    headers += [(b"x-r3mes-adapter", b"legal")]
    headers += [(HEADER.encode(), FRAMES.encode())] if framed else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for token in range(tokens):
        word = b"token "
        piece = (
            Frame([Step([token], "length" if token == tokens - 1 else None)], word).pack()
            if framed
            else word
        )
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        if pause:
            await asyncio.sleep(PAUSE_S)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _register(http: aiohttp.ClientSession, backend: str, node: str, others: int) -> None:
    adapters = {"adapters": {"legal": LEGAL_CID}, "available_lora_list": ["legal"], "version": "0"}
    for number in range(others + 1):
        url = node if not number else f"http://127.0.0.1:{20000 + number}"
        it: dict[str, Any] = {"wallet_address": wallet(number), "endpoint_url": url}
        it |= adapters if not number else {"available_lora_list": [f"other{number}"]}
        async with http.post(f"{backend}/api/serving-node/register", json=it) as answer:
            answer.raise_for_status()


async def _beat(http: aiohttp.ClientSession, backend: str, others: int) -> None:
    while True:
        for number in range(others + 1):
            beat = {"wallet_address": wallet(number), "status": "active", "current_load": 0}
            async with http.post(f"{backend}/api/serving-node/heartbeat", json=beat) as answer:
                answer.raise_for_status()
            await asyncio.sleep(BEAT_S / (others + 1))


if __name__ == "__main__":
    if "--node" in sys.argv:
        uvicorn.run(_node, port=int(sys.argv[-1]), log_level="critical")
    else:
        alone("router")
