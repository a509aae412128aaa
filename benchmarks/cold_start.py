"""From a CID that is nowhere here to the first token, and what running streams feel of it.

    r3mes-vllm bench cold-start [--rounds 5] [--only gateway]

Our node is asked for `ipfs://CID` of an adapter that it has never seen and that lies in a daemon,
at a gateway, or in its own store. The peer is stock `vllm serve`: the same bytes are copied into a
new folder (as `snapshot_download` does from a local cache; from the store: not), then
`load_lora_adapter`, then the same question. Each round asks for several adapters, each another one;
its quantiles are of those. Where the time goes is read from the node's own histograms; beside it
stands what the same question takes when the adapter is there, and the rest.
"""

import asyncio
import math
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
from benchmarks.results import Target, told
from benchmarks.servers import Servers
from benchmarks.shapes import Shape, adapter, served_rank, shape_of
from benchmarks.side_by_side import SETTLES_S
from r3mes_vllm.ipfs.pack import pack
from tests.in_store import put_in_store
from tests.peers.js_ipfs import JsIpfs, js_ipfs

SOURCES = ("gateway", "store", "daemon")
"""The one that needs Node.js last."""
RANKS = {"smol": 82, "llama-1b": 36, "llama-8b": 10}
"""On all linear layers: 50, 51 and 52 MB in bf16."""
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
    for source in filter(plan.wants, SOURCES):
        with tempfile.TemporaryDirectory() as name:
            try:
                _Cold(plan, record, shape, rank, source, Path(name)).run()
            except _NoDaemon as error:
                record.leave_out(source, f"there is no js-ipfs: {error}")


class _NoDaemon(Exception):
    """It wants Node.js, npm and, where none was installed yet, the network."""


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
            all_took: dict[str, list[float]] = {"ours": [], "stock": []}
            try:
                for turn in range(plan.rounds + 1):
                    self._turn(turn, node.url, stock.url, publish, all_took)
            finally:
                for side, took in all_took.items():
                    if took:
                        parts = [f"{it} {told(at(took, part))} s" for it, part in QUANTILES.items()]
                        record_of = f"{self.source}, {side}, all {len(took)} cold starts"
                        self.record.note(f"{record_of}: {', '.join(parts)}")

    def _turn(
        self,
        turn: int,
        node: str,
        stock: str,
        publish: Callable[[Path], str],
        all_took: dict[str, list[float]],
    ) -> None:
        made = [self._another(publish) for _ in range(self.plan.pick(EACH, 2) if turn else 2)]
        found = asyncio.run(self._round(turn, node, stock, made))
        if turn:  # the first warms up
            hashing = [hashed(path / "adapter_model.safetensors") for _, path in made]
            self._note(found["ours"], found["stock"], sum(hashing) / len(hashing))
            for side, took in all_took.items():
                took += found[side]["took"]
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

    async def _round(
        self, turn: int, node: str, stock: str, made: list[tuple[str, Path]]
    ) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        async with session() as http:
            for side in in_turn(turn, ("ours", "stock")):
                url = node if side == "ours" else stock
                await asyncio.sleep(SETTLES_S)
                before = await _phases(http, url) if side == "ours" else {}
                took, warm = [], []
                async with _streaming(http, url, self.base) as running:
                    for cid, path in made:
                        if side == "ours":
                            took.append(await _first(http, url, f"ipfs://{cid}"))
                            warm.append(await _first(http, url, f"ipfs://{cid}"))
                        else:
                            took.append(await self._stock(http, url, path))
                for it in running:
                    if it.error:
                        raise RuntimeError(f"a stream beside it failed: {it.error}")
                after = await _phases(http, url) if side == "ours" else {}
                gaps = [1000 * gap for it in running for gap in it.gaps]
                found[side] = {
                    "took": took,
                    "warm": warm,
                    "gap": max(gaps, default=0.0),
                    "usual": at(gaps or [0.0], 0.5),
                    "phases": {it: (after[it] - before[it]) / len(made) for it in after},
                }
        return found

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
        first = await _first(http, url, path.name)
        await _first(http, url, path.name)  # as ours is asked, beside the other streams
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
            slowest = math.ceil(len(ours["took"]) * part) == len(ours["took"])
            note(
                f"{self.source}: until the first token, {name}",
                "s",
                ours=at(ours["took"], part),
                peer=at(stock["took"], part),
                sides=("ours", peer),
                better="lower",
                target=Target(of="ours", at_most=COLD_S) if cold else None,
                setting=f"the slowest of {len(ours['took'])}" if slowest else "",
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
        warm = sum(ours["warm"]) / len(ours["warm"])
        phases: dict[str, float] = ours["phases"]
        for part_name, seconds in (
            ("fetch, verified as it comes", phases["fetch"]),
            *((phase, phases[phase]) for phase in PHASES[1:]),
            ("asked again, when it is there", warm),
            ("the rest", whole - sum(phases.values()) - warm),
            ("verify, sha256 of the same bytes alone", hashing),
        ):
            note(
                f"{self.source}: {part_name}",
                "s",
                ours=seconds,
                peer=whole,
                sides=("mean of this part", "mean of the whole"),
                better="lower",
                chart=f"Where a cold start from the {self.source} goes",
            )


async def _first(http: aiohttp.ClientSession, url: str, model: str) -> float:
    """Seconds until the first token of a short answer."""
    answer = await ask(http, url, Asked(model, 4, 2))
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
    with ExitStack() as until_end:
        try:
            daemon = until_end.enter_context(contextmanager(started)(Factory()))
        except RuntimeError as error:
            raise _NoDaemon(str(error).partition("\n")[0]) from error
        yield daemon


if __name__ == "__main__":
    alone("cold-start")
