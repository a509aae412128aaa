"""Nodes that die, stall, refuse, crawl and change their adapter, and an oracle.

    python -m tests.backend.chaos [--seconds 600] [--answers N] [--seed N] [--clients 40]
                                  [--nodes 12] [--database sqlite|postgresql] [--routers 1]

Ends after `seconds`, or as soon as `answers` are whole. Prints how many requests came to nodes, of
which none may come to one that has told another CID, and as JSON what became of the answers: how
many were whole, moved, and why others were refused or broke. Exit status 1 where an answer that a
client takes for complete is not, token for token, what the CID in its header says to that question,
or where that is not the CID that was asked for; where an answer broke or was refused though another
holder was left to give it; and where nothing was shown, since none moved, no node died or changed
its CID, or fewer were whole than asked for.
"""

import argparse
import asyncio
import itertools
import json
import logging
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from starlette.types import Message, Receive, Scope, Send

from r3mes_vllm.backend import following
from r3mes_vllm.backend.app import create_app
from r3mes_vllm.backend.dial import Timeouts
from r3mes_vllm.carry import HEADER, RESUME, unpack_past
from r3mes_vllm.settings import load
from tests.backend.framing import Framing
from tests.backend.oracle import FATES, Asking, Flight, Found, Lags, Told, cause
from tests.backend.stand_ins import LEGAL_CID, OTHER_CID, serving, wallet
from tests.peers import postgres
from tests.programs import verdict

CIDS = (LEGAL_CID, OTHER_CID)
TIMEOUTS = Timeouts(connect=1, first_byte=5, between_bytes=1)
SILENCE_S = 0.9 * TIMEOUTS.between_bytes
BEAT_S = 1.0
LAG_S = 2 * following._LOOK_S + 1.0
"""Until a router knows what another one was told."""
LONGEST = 24
"""Words of an answer."""
_LATE_S = 60.0
"""After `seconds`: for the answers that are under way."""
_CODE = re.compile(rb'"code": ?"([a-z_]+)"')


def words(cid: str, question: str, count: int | None = None) -> list[str]:
    """What the adapter of `cid` says."""
    chance = random.Random(f"{cid} {question}")
    count = count or chance.randint(1, LONGEST)
    return [f"{chance.choice('äbcdéfgh')}{chance.randrange(1000)} " for _ in range(count)]


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
    length: int | None = None
    """Of its answers in words, where all are as long."""
    told: Told = field(default_factory=Told)
    asked: dict[str, Asking] = field(default_factory=dict)
    """By question."""
    found: Found = field(default_factory=Found)

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

    def _note(self, question: str) -> Flight:
        """That it came here, and whether it should have."""
        flight = Flight(self.number)
        if asking := self.asked.get(question):
            asking.flights.append(flight)
            self.found.counts["routed"] += 1
            if asking.cid not in self.told.possible(asking.at):
                self.found.wrong.append(f"{question} of {asking.cid} came to node {self.number}")
        return flight

    async def _answer(self, headers: dict[bytes, bytes], body: bytes, send: Send) -> None:
        request = json.loads(body.rpartition(b"\n")[2])
        question = request.get("message") or request["messages"][0]["content"]
        flight = self._note(question)
        mishap = self.chance.random()
        if not self.alive or mishap < 0.02:
            flight.fate = "refuses"
            await self._plain(send, self.chance.choice([500, 503, 429, 404]), b"no")
            return
        cid = self.cid
        asked = request.get("model") or request["lora_name"]
        if (asking := self.asked.get(question)) and asking.cid != cid:
            flight.fate = "has another version"
        if "@" in asked and not asked.endswith(cid):
            await self._plain(send, 404, b"no such version")
            return
        self.found.counts["answered by a version not told yet"] += flight.fate in FATES
        told = {"X-R3MES-Adapter": "legal", "X-R3MES-CID": cid}
        said = words(cid, question, self.length)
        framing = Framing(headers=told, words=said, created=self.number)
        carry = headers[HEADER.encode()].decode()
        # What another node has said is computed at once, and the client hears nothing of it.
        known = len(unpack_past(body)[0].steps or ()) if carry == RESUME else 0
        frames, answer = framing.frames(body, carry)
        raw = [(k.lower().encode(), v.encode()) for k, v in answer.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        dies = self.chance.randrange(len(frames)) if mishap < 0.12 else None
        stalls = self.chance.randrange(len(frames)) if 0.12 <= mishap < 0.15 else None
        for number, frame in enumerate(frames):
            if number >= known:
                flight.moves(SILENCE_S)
            if number == dies or not self.alive:
                flight.fate = "dies" if self.alive else "is gone"
                cut = self.chance.randrange(len(frame))
                await send(_more(frame[:cut]))
                self.found.counts["deaths"] += 1
                raise Gone
            if number == stalls:
                flight.fate = "is silent"
                await asyncio.sleep(2 * TIMEOUTS.between_bytes)
            await asyncio.sleep(self.chance.random() * 0.01 * (number >= known))
            await send(_more(frame))
        flight.says_all(SILENCE_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _plain(self, send: Send, status: int, body: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def live(self, routers: Sequence[httpx.AsyncClient], goes_on: Callable[[], bool]) -> None:
        """Register and beat; be gone now and then, come back with the other CID now and then."""
        while goes_on():
            if self.chance.random() < 0.05 and self.number > 2:  # two are always there
                self.alive = False
                await asyncio.sleep(self.chance.random() * 3 * BEAT_S)
                self.alive = True
            if self.chance.random() < 0.3 and self.number > 2:
                before, self.cid = self.cid, self.chance.choice(CIDS)
                self.found.counts["switches"] += self.cid != before
                await asyncio.sleep(self.chance.random() * BEAT_S)  # nobody knows it yet
            node = {
                "wallet_address": wallet(self.number),
                "endpoint_url": self.url,
                "available_lora_list": ["legal"],
                "adapters": {"legal": self.cid},
                "version": "0",
            }
            telling = self.told.tells(self.cid)
            with suppress(httpx.TransportError):
                http = self.chance.choice(routers)
                answer = await http.post("/api/serving-node/register", json=node)
                if answer.is_success:
                    self.told.taken(telling)
            await asyncio.sleep(BEAT_S * (0.5 + self.chance.random()))


def _more(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


@dataclass
class Clients:
    routers: Sequence[httpx.AsyncClient]
    nodes: Sequence[Node]
    asked: dict[str, Asking]
    found: Found
    lags: Lags
    numbers: Iterator[int] = field(default_factory=itertools.count)

    async def ask(self, chance: random.Random, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            question = f"q{next(self.numbers)}"
            model = f"legal@{chance.choice(CIDS)}" if chance.random() < 0.3 else "legal"
            # a plain name is what is registered
            asking = self.asked[question] = Asking(model.partition("@")[2] or LEGAL_CID)
            try:
                await self._ask(chance, question, model, asking)
            finally:
                del self.asked[question]

    async def _ask(self, chance: random.Random, question: str, model: str, asking: Asking) -> None:
        if events := chance.random() < 0.5:
            messages = [{"role": "user", "content": question}]
            asked: dict[str, Any] = {"model": model, "messages": messages, "stream": True}
        else:
            asked = {"message": question, "lora_name": model}
        path = "/v1/chat/completions" if events else "/chat"
        body, status = b"", "no status"
        try:
            async with chance.choice(self.routers).stream("POST", path, json=asked) as answer:
                status = str(answer.status_code)
                async for piece in answer.aiter_raw():
                    body += piece
        except httpx.TransportError as error:
            if events and b"[DONE]" in body:
                self.found.wrong.append(f"{question} broke and looks complete: {body!r}")
            code = _CODE.search(body) if events else None
            said = code[1].decode() if code else "plain text"
            if status != "200" or (events and not code):
                said = f"{type(error).__name__} at {status}, and no event says so"
            self.found.counts[f"broken: {said}: {self._cause(asking)}"] += 1
            return
        if status != "200":
            code = _CODE.search(body)
            said = f"{status} {code[1].decode()}" if code else f"{status} of a node"
            self.found.counts[f"refused: {said}: {self._cause(asking)}"] += 1
            return
        if wrong := not_whole(question, asking.cid, answer.headers, body, events=events):
            self.found.wrong.append(wrong)
            return
        self.found.counts["whole"] += 1
        self.found.counts["moved"] += b": x-r3mes-nodes: " in body

    def _cause(self, asking: Asking) -> str:
        holders = [it.number for it in self.nodes if it.told.holds(asking.cid, asking.at)]
        return cause(
            asking,
            holders,
            silence_s=SILENCE_S,
            patience_s=0.9 * TIMEOUTS.first_byte,
            lag_s=self.lags.longest(asking.at),
        )


def not_whole(question: str, cid: str, headers: httpx.Headers, body: bytes, *, events: bool) -> str:
    """Why this is not the answer of `cid`, or nothing."""
    if (said := headers["x-r3mes-cid"]) != cid:
        return f"{question} of {cid} was answered by {said}"
    text = body.decode(errors="replace")
    if events:
        if body.count(b"data: [DONE]") != 1:
            return f"{question} looks complete without its end: {text!r}"
        lines = [it.removeprefix("data: ") for it in text.splitlines() if "delta" in it]
        text = "".join(json.loads(it)["choices"][0]["delta"]["content"] for it in lines)
    if text != "".join(words(cid, question)):
        return f"{question} of {cid} was answered with {text!r}"
    return ""


@contextmanager
def database(folder: Path, kind: str) -> Iterator[str]:
    """The URL of an empty one."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/backend.sqlite3"
        return
    with postgres.started() as server, server.database() as made:
        yield server.url(made)


async def chaos(
    where: str,
    *,
    seconds: float,
    seed: int,
    clients: int,
    nodes: int,
    answers: int = 0,
    routers: int = 1,
) -> Found:
    """What became of the answers, with a backend of `routers` on the database `where`."""
    chance, found = random.Random(seed), Found()
    asked: dict[str, Asking] = {}
    until = time.monotonic() + seconds

    def goes_on() -> bool:
        is_enough = bool(answers) and found.counts["whole"] >= answers
        return time.monotonic() < until and not is_enough

    async with asyncio.timeout(seconds + _LATE_S), AsyncExitStack() as running:
        clients_of = []
        for _ in range(routers):
            app = create_app(
                load({"allow_private_nodes": True, "database_url": where}), timeouts=TIMEOUTS
            )
            url = await running.enter_async_context(serving(app))
            limits = httpx.Limits(max_connections=None, keepalive_expiry=1)  # before the server's
            http = httpx.AsyncClient(base_url=url, timeout=30, limits=limits, trust_env=False)
            clients_of.append(await running.enter_async_context(http))
        registered = {"name": "legal", "ipfs_hash": LEGAL_CID}
        (await clients_of[0].post("/api/lora/register", json=registered)).raise_for_status()
        lag_s = LAG_S if routers > 1 else 0.0
        network = [
            Node(
                number,
                random.Random(chance.random()),
                CIDS[number % 2],
                told=Told(lag_s),
                asked=asked,
                found=found,
            )
            for number in range(1, nodes + 1)
        ]
        async with asyncio.TaskGroup() as tasks:
            for node in network:
                node.url = await running.enter_async_context(serving(node))
                tasks.create_task(node.live(clients_of, goes_on))
            await asyncio.sleep(BEAT_S + lag_s)
            tasks.create_task((lags := Lags()).watch(goes_on))
            asking = Clients(clients_of, network, asked, found, lags)
            for _ in range(clients):
                tasks.create_task(asking.ask(random.Random(chance.random()), goes_on))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--answers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--nodes", type=int, default=12)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--routers", type=int, default=1)
    given = vars(parser.parse_args())
    print(f"seed {given['seed']}", file=sys.stderr)
    kind = given.pop("database")
    with tempfile.TemporaryDirectory() as name, database(Path(name), kind) as where:
        found = asyncio.run(chaos(where, **given))
    told = {"seed": given["seed"], "database": kind, "routers": given["routers"]}
    print(json.dumps(dict(sorted(found.counts.items())) | told))
    print(f"{found.counts['routed']} routed, {len(found.wrong)} wrong", flush=True)
    return verdict(found.problems(answers=given["answers"]))


if __name__ == "__main__":
    logging.getLogger("r3mes_vllm").setLevel(logging.ERROR)  # nodes break off all the time
    sys.exit(main())
