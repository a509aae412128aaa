"""What a network costs its registry: 1,000 nodes that beat every 30 s, and 10,000 adapters.

    r3mes-vllm bench beats [--rounds 5] [--seconds 30]

Two backends, programs of their own, on SQLite and on PostgreSQL, are measured in turn; their
processor time, and the database's, are read from the system. PostgreSQL is the tests' own
(`fsync=off` there: a disk's flush is no processor time, but makes each registration and beat take
that much longer).
"""

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import psutil
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send

from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.results import Target
from r3mes_vllm.identity import Identity
from r3mes_vllm.node.identify import prove
from r3mes_vllm.node.signer import Signer
from tests.backend.stand_ins import LEGAL_CID, serving, unused_port
from tests.peers.postgres import Postgres

EVERY_S = 30.0
AT_ONCE = 16
OURS, OTHER = "SQLite", "PostgreSQL"
PROGRAM = (
    "import json, sys; from r3mes_vllm.settings import load; "
    "from r3mes_vllm.backend.server import run; run(load(json.loads(sys.argv[1])))"
)
Call = Callable[[], Awaitable[object]]


class Lives:
    """What answers at the URLs of all nodes, each with a number for its path: who it is, and hello
    to any question."""

    def __init__(self, identities: list[Identity]) -> None:
        self._identities = identities

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        if scope["path"].endswith("/chat"):
            await request.body()
            await PlainTextResponse("hello")(scope, receive, send)
            return
        number = scope["path"].split("/")[1]
        url = f"{str(request.base_url).rstrip('/')}/{number}"
        nonce = (await request.json())["nonce"]
        proof = prove(self._identities[int(number)], nonce, url)
        await JSONResponse(proof.model_dump())(scope, receive, send)


class Node:
    """What a node of ours sends, signed."""

    def __init__(
        self, identity: Identity, url: str, http: httpx.AsyncClient, names: list[str]
    ) -> None:
        self._identity = identity
        self._url = url
        self._signer = Signer(self._identity)
        self._http = http
        self._adapters = {name: LEGAL_CID for name in names}

    async def register(self) -> None:
        names = [*self._adapters]
        await self._send("register", {"endpoint_url": self._url, "available_lora_list": names})

    async def beat(self) -> None:
        await self._send("heartbeat", {"status": "active", "current_load": 1, "version": "0.1.0"})

    async def _send(self, what: str, fields: Mapping[str, object]) -> None:
        path = f"/api/serving-node/{what}"
        named = {"wallet_address": self._identity.wallet_address, "adapters": self._adapters}
        body = json.dumps({**named, **fields}).encode()
        headers = self._signer.headers("POST", path, body) | {"Content-Type": "application/json"}
        (await self._http.post(path, content=body, headers=headers)).raise_for_status()


@dataclass
class Registered:
    """A backend with so many adapters and nodes, all of whom have registered."""

    http: httpx.AsyncClient
    nodes: list[Node]
    names: list[str]
    measured: dict[str, psutil.Process]
    registered_s: dict[str, float] = field(default_factory=dict)
    """How long all registrations took, adapters and nodes."""

    async def add(self, name: str) -> None:
        body = {"name": name, "ipfs_hash": LEGAL_CID, "category": "x", "rank": 16}
        await self._told("POST", "/api/lora/register", json=body)

    async def calls(self) -> dict[str, Call]:
        """What is timed, one call after the other."""
        listing = "/api/lora/list"
        known = {"If-None-Match": (await self._told("GET", listing)).headers["etag"]}
        nodes_url = "/api/serving-node/list"
        asked = {"message": "hi", "lora_name": "legal"}
        return {
            "heartbeat": self.nodes[0].beat,
            "register a node": self.nodes[0].register,
            "register an adapter": partial(self.add, self.names[0]),
            "route a question": partial(self._told, "POST", "/chat", json=asked),
            "list the adapters, unchanged": partial(self.http.get, listing, headers=known),
            "list the adapters": partial(self._told, "GET", listing),
            "list the nodes": partial(self._told, "GET", nodes_url),
            "list the nodes of an adapter": partial(
                self._told, "GET", f"{nodes_url}?lora=adapter-0"
            ),
        }

    async def _told(self, method: str, path: str, **more: object) -> httpx.Response:
        answer = await self.http.request(method, path, **more)  # type: ignore[arg-type]
        return answer.raise_for_status()


@contextlib.asynccontextmanager
async def registered(
    database: str, keys: Path, *, adapters: int, nodes: int, of_database: Sequence[int] = ()
) -> AsyncIterator[Registered]:
    """`of_database` is the process of a database of its own; `keys` is a folder."""
    async with contextlib.AsyncExitStack() as until_end:
        url, process = until_end.enter_context(backend(database))
        measured = {"router": psutil.Process(process.pid)}
        if of_database:
            measured["database"] = psutil.Process(of_database[0])
        http = await until_end.enter_async_context(
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=60)
        )
        names = [f"adapter-{number}" for number in range(adapters)]
        it = Registered(http, [], names, measured)
        began = time.monotonic()
        await each([partial(it.add, name) for name in [*names, "legal", "medical"]])
        it.registered_s["adapters"] = time.monotonic() - began
        identities = [Identity.load(keys / str(number)) for number in range(nodes)]
        lives = await until_end.enter_async_context(serving(Lives(identities)))
        it.nodes = [
            Node(one, f"{lives}/{i}", http, [names[i % len(names)], "legal", "medical"])
            for i, one in enumerate(identities)
        ]
        began = time.monotonic()
        await each([node.register for node in it.nodes])
        it.registered_s["nodes"] = time.monotonic() - began
        yield it


async def each(works: Sequence[Call], at_once: int = AT_ONCE) -> None:
    waiting = iter(works)

    async def worker() -> None:
        for work in waiting:
            await work()

    await asyncio.gather(*(worker() for _ in range(at_once)))


async def timed(work: Call, count: int) -> dict[str, float]:
    """Milliseconds of one call after the other: p50 and p99."""
    took = []
    for _ in range(count):
        began = time.perf_counter()
        await work()
        took.append((time.perf_counter() - began) * 1000)
    ranked = sorted(took)
    return {"p50": statistics.median(ranked), "p99": ranked[-(-count * 99 // 100) - 1]}


def seconds(process: psutil.Process) -> float:
    """Of processor time, with that of children, also if they have ended."""
    ended = process.cpu_times()
    total = float(ended.children_user + ended.children_system)
    for it in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            used = it.cpu_times()
            total += used.user + used.system
    return total


async def beating(of: Registered, for_s: float) -> float:
    """Cores that the beats of all cost, sent evenly, with those of the database."""
    before = sum(map(seconds, of.measured.values()))
    began, sent = time.monotonic(), 0
    async with asyncio.TaskGroup() as tasks:
        while time.monotonic() - began < for_s:
            tasks.create_task(of.nodes[sent % len(of.nodes)].beat())
            sent += 1
            due = began + sent * EVERY_S / len(of.nodes)
            await asyncio.sleep(max(due - time.monotonic(), 0))
    return (sum(map(seconds, of.measured.values())) - before) / (time.monotonic() - began)


async def idle(of: Registered, for_s: float) -> float:
    before = sum(map(seconds, of.measured.values()))
    await asyncio.sleep(for_s)
    return (sum(map(seconds, of.measured.values())) - before) / for_s


@contextlib.contextmanager
def backend(database: str) -> "Iterator[tuple[str, subprocess.Popen[str]]]":
    port = unused_port()
    settings = {"backend_port": port, "database_url": database, "allow_private_nodes": True}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(settings)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        assert "listens" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait(30)


def run(plan: Plan, record: Record) -> None:
    asyncio.run(_run(plan, record))


async def _run(plan: Plan, record: Record) -> None:
    adapters, nodes, calls = plan.pick((10_000, 1000, 200), (100, 10, 20))
    for_s = plan.lasts(EVERY_S, 3)
    record.describe(
        "none: no model", adapters=adapters, nodes=nodes, beat_every_s=EVERY_S, calls_each=calls
    )
    async with contextlib.AsyncExitStack() as until_end:
        folder = Path(until_end.enter_context(tempfile.TemporaryDirectory(prefix="r3mes-pg-")))
        filled = partial(registered, keys=folder / "keys", adapters=adapters, nodes=nodes)
        sides = {}
        try:
            postgres = Postgres(folder)
        except RuntimeError as error:
            record.leave_out(OTHER, str(error))
        else:
            until_end.callback(postgres.stop)
            url = postgres.url(until_end.enter_context(postgres.database()))
            sides[OTHER] = await until_end.enter_async_context(
                filled(url, of_database=[postgres.pid])
            )
        sides[OURS] = await until_end.enter_async_context(filled(f"sqlite:///{folder}/b.sqlite3"))
        for turn in range(plan.rounds):
            found = {}
            for kind, it in in_turn(turn, tuple(sides.items())):
                found[kind] = {
                    name: await timed(call, calls) for name, call in (await it.calls()).items()
                }
                cores = {"idle": await idle(it, for_s / 6), "beating": await beating(it, for_s)}
                found[kind] |= {"cores": cores}
            _note(record, nodes, found)


def _note(record: Record, nodes: int, found: dict[str, dict[str, dict[str, float]]]) -> None:
    one, other = found[OURS], found.get(OTHER)
    for name in one:
        if name == "cores" or not other:
            continue
        for part in ("p50", "p99"):
            record.pair(
                f"{name}, {part}",
                "ms",
                ours=one[name][part],
                peer=other[name][part],
                sides=(OURS, OTHER),
                better="lower",
                chart=f"SQLite, of what PostgreSQL takes: {part}",
            )
    for kind in found:
        cores = found[kind]["cores"]
        record.pair(
            f"{nodes} nodes beat, {kind} and backend",
            "cores",
            ours=cores["beating"],
            peer=cores["idle"],
            sides=("beating", "nobody beats"),
            better="lower",
            target=Target(of="ours", at_most=0.5),
        )


if __name__ == "__main__":
    alone("beats")
