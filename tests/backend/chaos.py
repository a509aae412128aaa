"""Nodes that die, stall, refuse, crawl and change their adapter, and an oracle.

    python -m tests.backend.chaos [--seconds 600] [--seed N] [--clients 20] [--nodes 12]

Prints as JSON how many answers were whole, moved, refused and broken. It fails where an answer that
a client takes for complete is not, token for token, what the CID in its header says to that
question, or where that is not the CID that was asked for, or where none moved at all.
"""

import argparse
import asyncio
import collections
import json
import random
import sys
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.types import Message, Receive, Scope, Send

from r3mes_vllm.backend.app import create_app
from r3mes_vllm.backend.dial import Timeouts
from r3mes_vllm.carry import HEADER
from r3mes_vllm.settings import load
from tests.backend.framing import Framing
from tests.backend.stand_ins import LEGAL_CID, OTHER_CID, serving, wallet

CIDS = (LEGAL_CID, OTHER_CID)
TIMEOUTS = Timeouts(connect=1, first_byte=5, between_bytes=0.5)
BEAT_S = 1.0


def words(cid: str, question: str) -> list[str]:
    """What the adapter of `cid` says."""
    chance = random.Random(f"{cid} {question}")
    return [f"{chance.choice('äbcdéfgh')}{chance.randrange(1000)} " for _ in range(40)]


class Gone(Exception):
    pass


@dataclass
class Node:
    """A node of ours whose process may be gone for a while."""

    number: int
    chance: random.Random
    cid: str = LEGAL_CID
    alive: bool = True
    url: str = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"] == "/identity":
            await self._plain(send, 404, b"")
            return
        try:
            await self._answer(dict(scope["headers"]), body, send)
        except Gone:
            return  # unfinished: the server closes the connection

    async def _answer(self, headers: dict[bytes, bytes], body: bytes, send: Send) -> None:
        mishap = self.chance.random()
        if not self.alive or mishap < 0.02:
            await self._plain(send, self.chance.choice([500, 503, 429, 404]), b"no")
            return
        cid = self.cid
        request = json.loads(body.rpartition(b"\n")[2])
        asked = request.get("model") or request["lora_name"]
        if "@" in asked and not asked.endswith(cid):
            await self._plain(send, 404, b"no such version")
            return
        question = request.get("message") or request["messages"][0]["content"]
        told = {"X-R3MES-Adapter": "legal", "X-R3MES-CID": cid}
        framing = Framing(headers=told, words=words(cid, question), created=self.number)
        frames, answer = framing.frames(body, headers[HEADER.encode()].decode())
        raw = [(k.lower().encode(), v.encode()) for k, v in answer.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        dies = self.chance.randrange(len(frames)) if mishap < 0.12 else None
        stalls = self.chance.randrange(len(frames)) if 0.12 <= mishap < 0.15 else None
        for number, frame in enumerate(frames):
            if number == dies or not self.alive:
                cut = self.chance.randrange(len(frame))
                await send(_more(frame[:cut]))
                raise Gone
            if number == stalls:
                await asyncio.sleep(3 * TIMEOUTS.between_bytes)
            await asyncio.sleep(self.chance.random() * 0.01)
            await send(_more(frame))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _plain(self, send: Send, status: int, body: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def live(self, http: httpx.AsyncClient, until: float) -> None:
        """Register and beat; be gone now and then, come back with the other CID now and then."""
        while time.monotonic() < until:
            if self.chance.random() < 0.05 and self.number > 2:  # two are always there
                self.alive = False
                await asyncio.sleep(self.chance.random() * 3 * BEAT_S)
                self.alive = True
            if self.chance.random() < 0.05 and self.number > 2:
                self.cid = self.chance.choice(CIDS)
            node = {
                "wallet_address": wallet(self.number),
                "endpoint_url": self.url,
                "available_lora_list": ["legal"],
                "adapters": {"legal": self.cid},
                "version": "0",
            }
            with suppress(httpx.TransportError):
                await http.post("/api/serving-node/register", json=node)
            await asyncio.sleep(BEAT_S * (0.5 + self.chance.random()))


def _more(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def client(
    http: httpx.AsyncClient, chance: random.Random, until: float, found: collections.Counter[str]
) -> None:
    while time.monotonic() < until:
        question, events = f"q{chance.randrange(10_000)}", chance.random() < 0.5
        model = f"legal@{chance.choice(CIDS)}" if chance.random() < 0.3 else "legal"
        if events:
            messages = [{"role": "user", "content": question}]
            asked: dict[str, Any] = {"model": model, "messages": messages, "stream": True}
        else:
            asked = {"message": question, "lora_name": model}
        path = "/v1/chat/completions" if events else "/chat"
        body = b""
        try:
            async with http.stream("POST", path, json=asked) as answer:
                async for piece in answer.aiter_raw():
                    body += piece
        except httpx.RemoteProtocolError:
            found["broken"] += 1
            if events and b"[DONE]" in body:
                raise AssertionError("a broken answer looks complete") from None
            continue
        if answer.status_code != 200:
            found[f"refused {answer.status_code}"] += 1
            continue
        cid = answer.headers["x-r3mes-cid"]
        if cid != (model.partition("@")[2] or LEGAL_CID):  # a plain name is what is registered
            raise AssertionError(f"{model} was answered by {cid}")
        text = body.decode()
        if events:
            found["moved"] += ": x-r3mes-nodes: " in text
            lines = [it.removeprefix("data: ") for it in text.splitlines() if "delta" in it]
            text = "".join(json.loads(it)["choices"][0]["delta"]["content"] for it in lines)
            if body.count(b"data: [DONE]") != 1:
                raise AssertionError("an answer without its end looks complete")
        if text != "".join(words(cid, question)):
            raise AssertionError(f"{question} of {cid}: {text!r}")
        found["whole"] += 1


async def chaos(
    folder: Path, *, seconds: float, seed: int, clients: int, nodes: int
) -> collections.Counter[str]:
    """How many answers ended how. Raises AssertionError when one is not what it should be."""
    chance, found = random.Random(seed), collections.Counter[str]()
    given = {
        "allow_private_nodes": True,
        "database_url": f"sqlite:///{folder}/backend.sqlite3",
    }
    async with AsyncExitStack() as running:
        app = create_app(load(given), timeouts=TIMEOUTS)
        url = await running.enter_async_context(serving(app))
        limits = httpx.Limits(max_connections=None)
        http = httpx.AsyncClient(base_url=url, timeout=30, limits=limits)
        await running.enter_async_context(http)
        registered = {"name": "legal", "ipfs_hash": LEGAL_CID}
        (await http.post("/api/lora/register", json=registered)).raise_for_status()
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as tasks:
            for number in range(1, nodes + 1):
                node = Node(number, random.Random(chance.random()), CIDS[number % 2])
                node.url = await running.enter_async_context(serving(node))
                tasks.create_task(node.live(http, until))
            await asyncio.sleep(BEAT_S)
            for _ in range(clients):
                asking = client(http, random.Random(chance.random()), until, found)
                tasks.create_task(asking)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=12)
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        found = asyncio.run(chaos(Path(name), **vars(options)))
    print(json.dumps(dict(found) | {"seed": options.seed}))
    if not found["moved"]:
        sys.exit("nothing moved")


if __name__ == "__main__":
    main()
