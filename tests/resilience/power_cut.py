"""Everything is killed at once, again and again, and comes back.

    python -m tests.resilience.power_cut [--cuts 200] [--nodes 3] [--seed N]
                                         [--database sqlite|postgresql]

A backend that is told of adapters and nodes all the time, its database's server if it has one, and
an adapter that is fetched from a gateway, all killed with SIGKILL at a random instant, `cuts`
times, every other time while the gateway gives the adapter; then a backend and a real node that
starts with that adapter, `nodes` times. After each cut the database must be whole and hold each
registration of an adapter that was ever acknowledged, among the versions of its name, the last one
of each name and of each node as what it is now; and the store nothing in part. In the end a node
answers. Prints as JSON what was cut, and exits with status 1 if that shows nothing.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from r3mes_vllm.adapters.store import Store
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.ipfs.pack import pack
from tests import tiny
from tests.adapters.crashing import Given, serve_car, wrong_in
from tests.backend.stand_ins import wallet
from tests.conftest import NODE_STARTS_S
from tests.peers.postgres import Postgres
from tests.programs import Program, free_port, program, verdict, wait_until, wait_until_async

RANK = 512
NAMES, WALLETS = 200, 20
BEGINS_S = 60.0
FETCH_S = 2.0
"""How long the gateway takes to give the adapter."""
CUT_S, NODE_S = 60.0, 120.0
"""What a cut may take at most, on average."""

_VERSIONS = "SELECT name, lora_versions.ipfs_hash FROM lora_versions JOIN loras ON loras.id=lora_id"
_LORAS = "SELECT name, ipfs_hash FROM loras"
_NODES = "SELECT wallet_address, available_lora_list FROM nodes"


class Database:
    """SQLite, or a server of PostgreSQL in `served`."""

    def __init__(self, folder: Path, served: Path | None = None) -> None:
        self._path = folder / "backend.sqlite3"
        self._postgres = Postgres(served) if served else None
        self._running = contextlib.ExitStack()
        self._name = ""
        if self._postgres:
            self._running.callback(self._postgres.stop)
            self._name = self._running.enter_context(self._postgres.database())

    def close(self) -> None:
        self._running.close()

    @property
    def url(self) -> str:
        return self._postgres.url(self._name) if self._postgres else f"sqlite:///{self._path}"

    def kill(self) -> None:
        if self._postgres:
            server = psutil.Process(self._postgres.pid)
            processes = [server, *server.children(recursive=True)]
            _kill(processes)
            psutil.wait_procs(processes[1:], timeout=BEGINS_S)
            self._postgres.stop()  # takes note of it

    def start(self) -> None:
        """Raises AssertionError if that can't be done, or it is not whole."""
        if self._postgres:
            self._postgres.start()
        elif self._path.exists():
            with contextlib.closing(sqlite3.connect(self._path)) as database:
                assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]

    def pairs(self, query: str) -> list[tuple[str, str]]:
        """None before its tables are there."""
        if self._postgres:
            if self._postgres.sql("SELECT to_regclass('nodes')", self._name) == [""]:
                return []
            lines = (it.partition("|") for it in self._postgres.sql(query, self._name))
            return [(one, other) for one, _, other in lines]
        if not self._path.exists():
            return []
        with contextlib.closing(sqlite3.connect(self._path)) as database:
            there = database.execute("SELECT 1 FROM sqlite_master WHERE name='nodes'").fetchall()
            return database.execute(query).fetchall() if there else []


@dataclass
class Machine:
    folder: Path
    chance: random.Random
    database: Database
    cut: Counter[str] = field(default_factory=Counter)
    acknowledged: set[tuple[str, str]] = field(default_factory=set)
    """Each adapter's name and CID."""
    last: dict[str, str] = field(default_factory=dict)
    """What of each adapter and node was acknowledged last."""
    asked: dict[str, str] = field(default_factory=dict)
    """What the backend was told last of each; it may have kept that or not."""
    given: Given = field(default_factory=Given)
    has_power: bool = True

    def __post_init__(self) -> None:
        self.adapter = tiny.make_adapter(self.folder / "adapter", seed=1, rank=RANK)
        self.cid = pack(self.adapter, self.folder / "adapter.car")
        self.model = tiny.make_model(self.folder / "model" / tiny.NAME)
        self.gateway_port, self.port = free_port(), free_port()
        self.store = self.folder / "cache"

    @property
    def gateway(self) -> tuple[str, str]:
        return "--ipfs-gateway", f"http://127.0.0.1:{self.gateway_port}"

    def backend(self) -> contextlib.AbstractContextManager[Program]:
        arguments = ("backend", "--port", str(self.port), "--allow-private-nodes")
        url = f"http://127.0.0.1:{self.port}"
        return program(self.folder, *arguments, "--database-url", self.database.url, url=url)

    def fetch(self) -> contextlib.AbstractContextManager[Program]:
        return program(
            self.folder,
            *("adapter", "pull", str(self.cid), "--model", str(self.model), *self.gateway),
        )

    def node(self, port: int) -> contextlib.AbstractContextManager[Program]:
        return program(
            self.folder,
            *("serve", "--loras", f"legal={self.cid}", "--model", str(self.model), *self.gateway),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--backend-url", f"http://127.0.0.1:{self.port}"),
            url=f"http://127.0.0.1:{port}",
        )

    def incoming(self) -> set[tuple[str, int, int]]:
        """The files of fetches that have not ended."""
        files = [it for it in (self.store / "incoming").rglob("*") if it.is_file()]
        return {(str(it), it.stat().st_size, it.stat().st_mtime_ns) for it in files}

    def cut_power(self, *running: Program) -> None:
        self.has_power = False
        kills = [*(it.kill_all for it in map(_Killed, running)), self.database.kill]
        for kill in self.chance.sample(kills, len(kills)):
            kill()

    def check(self) -> None:
        """Start the database's server. Raises AssertionError for what the cut left in part, or
        took."""
        self.database.start()
        if self.store.exists():
            assert wrong_in(Store(self.store), self.adapter) == []
        versions = set(self.database.pairs(_VERSIONS))
        assert self.acknowledged <= versions, sorted(self.acknowledged - versions)[:5]
        found = dict(self.database.pairs(_LORAS))
        found |= {it: json.dumps(json.loads(of)) for it, of in self.database.pairs(_NODES)}
        for name, value in self.last.items():
            assert found.get(name) in (value, self.asked[name]), name
        self.last = {name: value for name, value in found.items() if name in self.asked}

    async def check_registry(self) -> None:
        """The backend must tell what its database has."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}") as http:
            listed = (await http.get("/api/lora/list")).json()
        found = {it["name"]: it["ipfs_hash"] for it in listed}
        assert found == dict(self.database.pairs(_LORAS))

    @contextlib.asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Tell the backend of adapters and nodes until it is gone. Raises AssertionError when it
        refuses before."""
        self.has_power = True
        task = asyncio.create_task(self._tell())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _tell(self) -> None:
        with contextlib.suppress(httpx.TransportError):
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}") as http:
                while True:
                    name = f"a{self.chance.randrange(NAMES)}"
                    cid = str(CID.of(RAW, self.chance.randbytes(8)))
                    lora = {"name": name, "ipfs_hash": cid}
                    await self._register(http, "/api/lora/register", lora, name, cid)
                    self.acknowledged.add((name, cid))
                    self.cut["acknowledged adapters"] += 1
                    address = wallet(self.chance.randrange(WALLETS))
                    node = {
                        "wallet_address": address,
                        "endpoint_url": "http://127.0.0.1:9",
                        "available_lora_list": [name],
                    }
                    told = json.dumps([name])
                    await self._register(http, "/api/serving-node/register", node, address, told)
                    self.cut["acknowledged nodes"] += 1

    async def _register(
        self, http: httpx.AsyncClient, path: str, body: object, key: str, value: str
    ) -> None:
        """Raises TransportError also if the database is gone."""
        self.asked[key] = value
        answer = await http.post(path, json=body)
        if not self.has_power and answer.status_code == 503:
            raise httpx.ReadError(answer.text)
        assert answer.is_success, answer.text
        self.last[key] = value


@dataclass
class _Killed:
    """A program, with all its processes."""

    running: Program

    def kill_all(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            whole = psutil.Process(self.running.process.pid)
            _kill([whole, *whole.children(recursive=True)])
        self.running.process.wait()


def _kill(processes: list[psutil.Process]) -> None:
    for it in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            it.kill()


@contextlib.contextmanager
def killed(running: contextlib.AbstractContextManager[Program]) -> Iterator[Program]:
    with running as it:
        try:
            yield it
        finally:
            _Killed(it).kill_all()


async def cut_power(
    folder: Path, *, cuts: int, nodes: int, chance: random.Random, served: Path | None = None
) -> Counter[str]:
    """What was cut, with PostgreSQL in `served`. Raises AssertionError when something was lost or
    left in part, and TimeoutError."""
    database = Database(folder, served)
    try:
        machine = Machine(folder, chance, database)
        limit_s = CUT_S * (cuts + 1) + NODE_S * nodes + NODE_STARTS_S
        async with asyncio.timeout(limit_s):
            await _cut_again_and_again(machine, cuts, nodes)
    finally:
        database.close()
    return machine.cut


async def _cut_again_and_again(machine: Machine, cuts: int, nodes: int) -> None:
    car = machine.folder / "adapter.car"
    gateway = asyncio.create_task(
        serve_car(car, machine.gateway_port, takes_s=FETCH_S, given=machine.given)
    )
    try:
        for number in range(cuts):
            await _cut(machine, while_given=bool(number % 2))
            print(f"{number + 1} of {cuts} cuts", file=sys.stderr, flush=True)
        for _ in range(nodes):
            await _cut_node(machine)
        await _serves(machine, with_node=bool(nodes))
    finally:
        gateway.cancel()
        await asyncio.gather(gateway, return_exceptions=True)


async def _cut(machine: Machine, *, while_given: bool) -> None:
    before, given = machine.incoming(), machine.given.bytes
    with killed(machine.backend()) as backend:
        await asyncio.to_thread(backend.wait_for, "/health", BEGINS_S)
        await machine.check_registry()
        async with machine.telling():
            with killed(machine.fetch()) as fetch:
                if while_given:
                    # or it had all but the last step, and asks for nothing
                    has_begun = lambda: machine.given.bytes > given or fetch.has_ended  # noqa: E731
                    await wait_until_async(has_begun, BEGINS_S, "the first byte of the adapter")
                    await asyncio.sleep(machine.chance.uniform(0, 0.9 * FETCH_S))
                else:
                    await asyncio.sleep(machine.chance.uniform(0, 4 + FETCH_S))
                has_ended = fetch.has_ended
                assert not fetch.process.returncode, fetch.output()
                machine.cut_power(backend, fetch)
    machine.cut["cuts"] += 1
    machine.cut["fetches that had ended"] += has_ended
    machine.cut["fetches under way"] += not has_ended and machine.incoming() != before
    machine.check()
    if machine.store.exists() and Store(machine.store).stored():
        Store(machine.store).drop_unused()


async def _cut_node(machine: Machine) -> None:
    with killed(machine.backend()) as backend:
        await asyncio.to_thread(backend.wait_for, "/health", BEGINS_S)
        await machine.check_registry()
        async with machine.telling():
            with killed(machine.node(free_port())) as node:
                await asyncio.sleep(machine.chance.uniform(0, 60))
                machine.cut["nodes that were ready"] += await _is_ready(node)
                machine.cut_power(backend, node)
    machine.cut["nodes"] += 1
    machine.check()


async def _is_ready(node: Program) -> bool:
    with contextlib.suppress(httpx.TransportError):
        async with httpx.AsyncClient() as http:
            return (await http.get(f"{node.url}/ready", timeout=5)).is_success
    return False


async def _serves(machine: Machine, *, with_node: bool) -> None:
    with machine.backend() as backend, machine.fetch() as fetch:
        await asyncio.to_thread(backend.wait_for, "/health", BEGINS_S)
        await machine.check_registry()
        await asyncio.to_thread(fetch.process.wait, BEGINS_S)
        assert fetch.process.returncode == 0, fetch.output()
        assert [it.cid for it in Store(machine.store).stored()] == [machine.cid]
        machine.check()
        if not with_node:
            return
        with machine.node(free_port()) as node:
            await asyncio.to_thread(node.wait_for, "/ready", NODE_STARTS_S)
            asked = {"message": "hi", "lora_name": "legal", "max_tokens": 4}

            def is_answered() -> bool:
                answer = httpx.post(f"{backend.url}/chat", json=asked, timeout=60)
                return answer.is_success and answer.headers["x-r3mes-cid"] == str(machine.cid)

            await asyncio.to_thread(wait_until, is_answered, 30, "an answer", node.output)


def problems(found: Counter[str], *, cuts: int, nodes: int) -> list[str]:
    """Why a run that lost nothing has shown nothing."""
    said = []
    for what, least in (
        *(("cuts", cuts), ("nodes", nodes)),
        *(("acknowledged adapters", max(cuts, 1)), ("acknowledged nodes", max(cuts, 1))),
        ("fetches under way", max(cuts // 3, 1)),
    ):
        if found[what] < least:
            said.append(f"{what}: {found[what]}, of at least {least}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr)
    # PostgreSQL runs as another user, who must be able to enter its folder.
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryDirectory(prefix="r3mes-pg-") as served,
    ):
        found = asyncio.run(
            cut_power(
                Path(name),
                cuts=options.cuts,
                nodes=options.nodes,
                chance=random.Random(options.seed),
                served=Path(served) if options.database == "postgresql" else None,
            )
        )
    print(json.dumps(dict(found) | {"seed": options.seed, "database": options.database}))
    return verdict(problems(found, cuts=options.cuts, nodes=options.nodes))


if __name__ == "__main__":
    sys.exit(main())
