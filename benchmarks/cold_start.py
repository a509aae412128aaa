"""From a CID that is nowhere here to the first token, and what running streams feel of it.

    r3mes-vllm bench cold-start [--rounds 5] [--only gateway]

Our node is asked for `ipfs://CID` of an adapter that it has never seen and that lies in a daemon,
at a gateway, or in its own store. The peer is stock `vllm serve`: the same bytes are copied into a
new folder (as `snapshot_download` does from a local cache; from the store: not), then
`load_lora_adapter`, then the same question. Each round asks for several adapters, each another one;
its quantiles are of those. Where the time goes is read from the node's own histograms.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import gateway
from benchmarks.client import Answer, Asked, ask, at, session
from benchmarks.fetch import hashed
from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.results import Target
from benchmarks.servers import Servers
from benchmarks.shapes import Shape, adapter, served_rank, shape_of
from r3mes_vllm.ipfs.pack import pack
from tests.in_store import put_in_store
from tests.peers.js_ipfs import JsIpfs, js_ipfs

SOURCES = ("gateway", "daemon", "store")
RANKS = {"smol": 80, "llama-1b": 32, "llama-8b": 8}
"""On all linear layers: 49, 45 and 42 MB in bf16."""
PHASES = ("fetch", "vet", "stage", "place")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
EACH, STREAMS = 10, 4
"""Cold starts in a round; streams of the base model meanwhile."""
GAP_MS, COLD_S = 50.0, 1.0
"""Targets on a GPU."""


def run(plan: Plan, record: Record) -> None:
    shape = shape_of(plan.model, plan.quick)
    rank = RANKS.get(shape.name, 8)
    record.describe(
        "greedy, end of text ignored",
        dtype=plan.dtype,
        rank=rank,
        modules="all linear",
        cold_starts_a_round=plan.pick(EACH, 2),
        streams_meanwhile=STREAMS,
    )
    for source in SOURCES:
        if plan.wants(source):
            with tempfile.TemporaryDirectory() as name:
                _Cold(plan, record, shape, rank, source, Path(name)).run()


class _Cold:
    """The cold starts from one source."""

    def __init__(
        self, plan: Plan, record: Record, shape: Shape, rank: int, source: str, folder: Path
    ) -> None:
        self.plan, self.record, self.shape, self.rank = plan, record, shape, rank
        self.source, self.folder = source, folder
        self.number = 0
        self.base = ""

    def run(self) -> None:
        plan, folder = self.plan, self.folder
        servers = Servers(plan, folder, slots=4, kept=8, rank=max(8, served_rank(self.rank)))
        self.base = servers.name
        (published := folder / "published").mkdir()
        small = adapter(folder / "small", self.shape, seed=plan.seed)
        with ExitStack() as until_end:
            options = ["--allow-cid", "--load-wait", "300"]
            publish: Callable[[Path], str]
            if self.source == "gateway":
                url = until_end.enter_context(gateway.serving(published))
                options += ["--ipfs-gateway", url, "--ipfs-api", "http://127.0.0.1:9"]
                publish = self._for_gateway
            elif self.source == "daemon":
                daemon = until_end.enter_context(_daemon(folder))
                options += ["--ipfs-api", daemon.api]
                publish = daemon.add
            else:
                cache = folder / "node" / "cache"
                options += ["--ipfs-api", "http://127.0.0.1:9"]
                publish = lambda path: asyncio.run(put_in_store(cache, path))  # noqa: E731
            stock = until_end.enter_context(servers.stock(loras={"small": small}))
            node = until_end.enter_context(servers.node(*options, loras={"small": small}))
            servers.ready()
            for turn in range(plan.rounds):
                made = [self._another(publish) for _ in range(plan.pick(EACH, 2))]
                asyncio.run(self._round(turn, node.url, stock.url, made))
                for _, path in made:
                    shutil.rmtree(path)

    def _another(self, publish: Callable[[Path], str]) -> tuple[str, Path]:
        """A new adapter: its CID and its folder."""
        self.number += 1
        path = adapter(
            self.folder / f"large-{self.number}",
            self.shape,
            seed=self.plan.seed * 1000 + self.number,
            rank=self.rank,
            modules=self.shape.linear,
        )
        return publish(path), path

    def _for_gateway(self, path: Path) -> str:
        packed = self.folder / "packed.car"
        cid = str(pack(path, packed))
        packed.rename(self.folder / "published" / f"{cid}.car")
        return cid

    async def _round(self, turn: int, node: str, stock: str, made: list[tuple[str, Path]]) -> None:
        found: dict[str, dict[str, Any]] = {}
        async with session() as http:
            for side in in_turn(turn, ("ours", "stock")):
                url = node if side == "ours" else stock
                before = await _phases(http, url) if side == "ours" else {}
                async with _streaming(http, url, self.base) as running:
                    took = [
                        await self._ours(http, url, cid, path)
                        if side == "ours"
                        else await self._stock(http, url, path)
                        for cid, path in made
                    ]
                after = await _phases(http, url) if side == "ours" else {}
                gaps = [1000 * gap for it in running for gap in it.gaps]
                found[side] = {
                    "took": took,
                    "gap": max(gaps, default=0.0),
                    "usual": at(gaps or [0.0], 0.5),
                    "phases": {it: (after[it] - before[it]) / len(made) for it in after},
                }
        hashing = sum(hashed(path / "adapter_model.safetensors") for _, path in made) / len(made)
        self._note(found["ours"], found["stock"], hashing)

    async def _ours(self, http: aiohttp.ClientSession, url: str, cid: str, path: Path) -> float:
        return _first(await ask(http, url, Asked(f"ipfs://{cid}", 4, 2)))

    async def _stock(self, http: aiohttp.ClientSession, url: str, path: Path) -> float:
        began = time.perf_counter()
        copied = path
        if self.source != "store":
            copied = path.with_name(f"{path.name}-copied")
            await asyncio.to_thread(shutil.copytree, path, copied)
        body = {"lora_name": path.name, "lora_path": str(copied)}
        async with http.post(f"{url}/v1/load_lora_adapter", json=body) as answer:
            answer.raise_for_status()
        copying = time.perf_counter() - began
        first = _first(await ask(http, url, Asked(path.name, 4, 2)))
        async with http.post(f"{url}/v1/unload_lora_adapter", json=body) as answer:
            answer.raise_for_status()
        if copied != path:
            shutil.rmtree(copied)
        return copying + first

    def _note(self, ours: dict[str, Any], stock: dict[str, Any], hashing: float) -> None:
        note, aimed = self.record.pair, self.plan.model.startswith("llama")
        peer = "stock vLLM from disk" if self.source == "store" else "copy, stock vLLM"
        for name, part in QUANTILES.items():
            cold = aimed and self.source == "gateway" and name == "p99"
            note(
                f"{self.source}: until the first token, {name}",
                "s",
                ours=at(ours["took"], part),
                peer=at(stock["took"], part),
                sides=("ours", peer),
                better="lower",
                target=Target(of="ours", at_most=COLD_S) if cold else None,
                chart="From a cold adapter to its first token",
            )
        note(
            f"{self.source}: longest gap of {STREAMS} other streams",
            "ms",
            ours=ours["gap"],
            peer=stock["gap"],
            sides=("ours", peer),
            better="lower",
            target=Target(of="ours", at_most=GAP_MS) if aimed else None,
            chart="What other streams feel of cold starts",
        )
        note(
            f"{self.source}: median gap of them",
            "ms",
            ours=ours["usual"],
            peer=stock["usual"],
            sides=("ours", peer),
            better="lower",
        )
        whole = sum(ours["took"]) / len(ours["took"])
        for phase in PHASES:
            if phase in ours["phases"]:
                note(
                    f"{self.source}: {phase}{', verified as it comes' if phase == 'fetch' else ''}",
                    "s",
                    ours=ours["phases"][phase],
                    peer=whole,
                    sides=("mean of the phase", "mean of the whole"),
                    better="lower",
                    chart=f"Where a cold start from the {self.source} goes",
                )
        note(
            f"{self.source}: verify, sha256 of the same bytes alone",
            "s",
            ours=hashing,
            peer=whole,
            sides=("hashing alone", "mean of the whole"),
            better="lower",
            chart=f"Where a cold start from the {self.source} goes",
        )


def _first(answer: Answer) -> float:
    if answer.error:
        raise RuntimeError(f"a cold start failed: {answer.error}")
    return answer.first_s


async def _phases(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Seconds in each phase of all loads so far."""
    async with http.get(f"{url}/metrics") as answer:
        text = await answer.text()
    found = dict.fromkeys(PHASES, 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "r3mes_adapter_load_seconds_sum":
                found[sample.labels["phase"]] = sample.value
    return found


@asynccontextmanager
async def _streaming(
    http: aiohttp.ClientSession, url: str, model: str
) -> AsyncIterator[list[Answer]]:
    """Streams that run meanwhile; what they were like is there when the context has ended."""
    answers: list[Answer] = []
    ends = False

    async def client(number: int) -> None:
        while not ends:
            answers.append(await ask(http, url, Asked(model, 16, 400, number)))

    async with asyncio.TaskGroup() as tasks:
        for number in range(STREAMS):
            tasks.create_task(client(number))
        await asyncio.sleep(1)
        yield answers
        ends = True


@contextmanager
def _daemon(folder: Path) -> Iterator[JsIpfs]:
    """js-ipfs, as the tests have it."""

    class Factory:
        def mktemp(self, name: str) -> Path:
            (folder / name).mkdir()
            return folder / name

    started: Any = getattr(js_ipfs, "__wrapped__", None) or js_ipfs._get_wrapped_function()
    with contextmanager(started)(Factory()) as daemon:
        yield daemon


if __name__ == "__main__":
    alone("cold-start")
