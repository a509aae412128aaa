"""Everything is killed at once, again and again, and comes back.

    python -m tests.resilience.power_cut [--cuts 200] [--nodes 3] [--seed N]

A backend on SQLite that is told of adapters and nodes all the time, and an adapter that is fetched
from a gateway, all killed with SIGKILL at a random instant, `cuts` times; then a backend and a real
node that starts with that adapter, `nodes` times. After each cut the database must be whole and
hold all that was acknowledged, and the store nothing in part; in the end a node answers. Prints as
JSON what was cut.
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
from tests.adapters.crashing import serve_car, wrong_in
from tests.backend.stand_ins import wallet
from tests.conftest import NODE_STARTS_S
from tests.programs import Program, free_port, program, wait_until

RANK = 512
BEGINS_S = 60.0


@dataclass
class Machine:
    folder: Path
    chance: random.Random
    cut: Counter[str] = field(default_factory=Counter)
    acknowledged: dict[str, str] = field(default_factory=dict)
    """Adapters of the registry: their CIDs."""
    asked: dict[str, str] = field(default_factory=dict)
    """What the backend was told last; it may have kept that or not."""

    def __post_init__(self) -> None:
        self.adapter = tiny.make_adapter(self.folder / "adapter", seed=1, rank=RANK)
        self.cid = pack(self.adapter, self.folder / "adapter.car")
        self.model = tiny.make_model(self.folder / "model" / tiny.NAME)
        self.database = self.folder / "backend.sqlite3"
        self.gateway_port, self.port = free_port(), free_port()
        self.store = self.folder / "cache"

    @property
    def gateway(self) -> tuple[str, str]:
        return "--ipfs-gateway", f"http://127.0.0.1:{self.gateway_port}"

    def backend(self) -> contextlib.AbstractContextManager[Program]:
        arguments = ("backend", "--port", str(self.port), "--allow-private-nodes")
        url = f"http://127.0.0.1:{self.port}"
        database = f"sqlite:///{self.database}"
        return program(self.folder, *arguments, "--database-url", database, url=url)

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

    def check(self) -> None:
        """Raises AssertionError for what the cut left in part."""
        if self.database.exists():
            with contextlib.closing(sqlite3.connect(self.database)) as database:
                assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        if self.store.exists():
            assert wrong_in(Store(self.store), self.adapter) == []

    async def check_registry(self) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}") as http:
            listed = (await http.get("/api/lora/list")).json()
        found = {it["name"]: it["ipfs_hash"] for it in listed}
        for name, cid in self.acknowledged.items():
            assert found[name] in (cid, self.asked[name]), name
        self.acknowledged = found

    @contextlib.asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Tell the backend of adapters and nodes until it is gone."""
        task = asyncio.create_task(self._tell())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _tell(self) -> None:
        with contextlib.suppress(httpx.TransportError):
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}") as http:
                while True:
                    name = f"a{self.chance.randrange(20)}"
                    cid = str(CID.of(RAW, self.chance.randbytes(8)))
                    self.asked[name] = cid
                    lora = {"name": name, "ipfs_hash": cid}
                    (await http.post("/api/lora/register", json=lora)).raise_for_status()
                    self.acknowledged[name] = cid
                    self.cut["acknowledged"] += 1
                    node = {
                        "wallet_address": wallet(self.chance.randrange(5)),
                        "endpoint_url": "http://127.0.0.1:9",
                        "available_lora_list": [name],
                    }
                    (await http.post("/api/serving-node/register", json=node)).raise_for_status()


def kill(running: Program) -> None:
    """With all its processes."""
    with contextlib.suppress(psutil.NoSuchProcess):
        whole = psutil.Process(running.process.pid)
        for it in [whole, *whole.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                it.kill()
    running.process.wait()


@contextlib.contextmanager
def killed(running: contextlib.AbstractContextManager[Program]) -> Iterator[Program]:
    with running as it:
        try:
            yield it
        finally:
            kill(it)


async def cut_power(folder: Path, *, cuts: int, nodes: int, chance: random.Random) -> Counter[str]:
    """What was cut. Raises AssertionError when something was lost or left in part."""
    machine = Machine(folder, chance)
    gateway = asyncio.create_task(serve_car(folder / "adapter.car", machine.gateway_port))
    try:
        for number in range(cuts):
            await _cut(machine)
            print(f"{number + 1} of {cuts} cuts", file=sys.stderr, flush=True)
        for _ in range(nodes):
            await _cut_node(machine)
        await _serves(machine, with_node=bool(nodes))
    finally:
        gateway.cancel()
        await asyncio.gather(gateway, return_exceptions=True)
    return machine.cut


async def _cut(machine: Machine) -> None:
    with killed(machine.backend()) as backend:
        await asyncio.to_thread(backend.wait_for, "/health", BEGINS_S)
        await machine.check_registry()
        async with machine.telling():
            with killed(machine.fetch()) as fetch:
                await asyncio.sleep(machine.chance.uniform(0, 4))
                machine.cut["fetches that had ended"] += fetch.process.poll() == 0
                kill(backend)
    machine.cut["cuts"] += 1
    machine.check()
    if machine.store.exists() and Store(machine.store).stored():
        Store(machine.store).drop_unused()


async def _cut_node(machine: Machine) -> None:
    with killed(machine.backend()) as backend:
        await asyncio.to_thread(backend.wait_for, "/health", BEGINS_S)
        await machine.check_registry()
        async with machine.telling():
            with killed(machine.node(free_port())):
                await asyncio.sleep(machine.chance.uniform(0, 60))
                kill(backend)
    machine.cut["nodes"] += 1
    machine.check()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        chance = random.Random(options.seed)
        found = asyncio.run(
            cut_power(Path(name), cuts=options.cuts, nodes=options.nodes, chance=chance)
        )
    print(json.dumps(dict(found) | {"seed": options.seed}))


if __name__ == "__main__":
    main()
