"""Loads, unloads, switches and traffic for an hour: does anything grow?

    r3mes-vllm bench soak [--seconds 3600] [--rounds 5]

One node: streams of the base model and of an adapter that stays, with prompts and answers of all
lengths, while other adapters are put under a name, asked for, replaced by another version and taken
away. The first third of the time warms up, with what comes rarely first: all streams at once, with
the longest prompts. Each of the equal parts after it is a pair with the first of them. What memory
grows by in an hour is the slope of a line through the most of each minute after the warm-up: each
minute the engine gives back what is free in its heap.
"""

import asyncio
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression

import aiohttp
import psutil

from benchmarks.client import Asked, ask, session
from benchmarks.harness import Plan, Record, alone
from benchmarks.results import Target
from benchmarks.servers import Servers
from benchmarks.shapes import adapter, shape_of
from tests.in_store import put_in_store

ADAPTERS, STREAMS = 6, 4
LOOK_S, OF_S = 1.0, 60.0
"""Seconds between two looks, and those that the most is told of."""
LONGEST = 64
"""Prompt and answer of a stream, in tokens. A CPU's engine compiles products for the numbers of
tokens that a step has. With answers alike, streams would go on as they happened to begin: those
that ended in the same step would meet again in each, and the others never."""
BURSTS = 9
"""Of all streams at once, in the warm-up."""


@dataclass
class Part:
    """What a part of the time was like."""

    resident: list[tuple[float, float]] = field(default_factory=list)
    """When, in seconds, and the most of all the node's processes until then, in MiB."""
    descriptors: float = 0.0
    cycles: int = 0
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    requests: int = 0

    def saw(self, error: str) -> None:
        """Of a request; none if it has its answer."""
        self.requests += 1
        if error:
            self.errors[error[:60]] += 1

    @property
    def mib(self) -> float:
        """At its end."""
        return self.resident[-1][1]


def run(plan: Plan, record: Record) -> None:
    shape = shape_of(plan.model, plan.quick)
    for_s = plan.lasts(3600, 18)
    record.describe(
        "greedy, end of text ignored",
        dtype=plan.dtype,
        seconds=for_s,
        slots=2,
        adapters=ADAPTERS,
        rank=8,
        streams=STREAMS,
        prompt_tokens=f"1 to {LONGEST}",
        answer_tokens=f"1 to {LONGEST}",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        servers = Servers(plan, folder, slots=2, kept=4, rank=8)
        made = [
            adapter(folder / f"a{number}", shape, seed=plan.seed * 100 + number)
            for number in range(ADAPTERS + 1)
        ]
        cids = asyncio.run(_stored(folder / "node" / "cache", made[1:]))
        with servers.node(loras={"stays": made[0]}) as node:
            servers.ready()
            tree = psutil.Process(node.process.pid)
            models = (servers.name, "stays")
            asyncio.run(_measured(plan, record, node.url, tree, models, cids, for_s))


async def _stored(cache: Path, folders: list[Path]) -> list[str]:
    return [await put_in_store(cache, folder) for folder in folders]


async def _measured(
    plan: Plan,
    record: Record,
    url: str,
    tree: psutil.Process,
    models: tuple[str, str],
    cids: list[str],
    for_s: float,
) -> None:
    warm_s = for_s / 3
    part_s = (for_s - warm_s) / (plan.rounds + 1)
    async with session() as http:
        warming = Part()
        for number in range(BURSTS):
            asked = (models, models[:1], models[1:])[number % 3]
            burst = (
                Asked(asked[i % len(asked)], LONGEST, 4, number + 1000 * i) for i in range(STREAMS)
            )
            for answer in await asyncio.gather(*(ask(http, url, it) for it in burst)):
                warming.saw(answer.error)
        before = await _part(http, url, tree, models, cids, warm_s)
        record.note(f"warm-up: {before.cycles} cycles, {before.mib:.0f} MiB")
        parts = [warming, before]
        first: Part | None = None
        resident = []
        for _ in range(plan.rounds + 1):
            it = await _part(http, url, tree, models, cids, part_s)
            if first is None:
                first = it
            else:
                _note(record, it, first, before)
            before = it
            parts.append(it)
            resident += it.resident
    errors = sum((it.errors for it in parts), Counter[str]())
    record.pair(
        "requests that failed, the warm-up's too",
        "of all",
        ours=errors.total() / sum(it.requests for it in parts),
        peer=None,
        sides=("all the time", "none"),
        better="lower",
        target=Target(of="ours", at_most=0),
    )
    for error, count in errors.most_common(5):
        record.note(f"{count} times {error}")
    slope = linear_regression(*zip(*resident, strict=True)).slope  # MiB a second
    record.pair(
        "memory an hour",
        "MB",
        ours=slope * 3600 * (1 << 20) / 1e6,
        peer=None,
        sides=("growth", "none"),
        better="lower",
        target=Target(of="ours", at_most=1.0),
    )


async def _part(
    http: aiohttp.ClientSession,
    url: str,
    tree: psutil.Process,
    models: tuple[str, str],
    cids: list[str],
    for_s: float,
) -> Part:
    part, chance = Part(), random.Random(for_s)
    ends = time.monotonic() + for_s

    async def stream(number: int) -> None:
        count = 0
        while time.monotonic() < ends:
            count += 1
            lengths = chance.randint(1, LONGEST), chance.randint(1, LONGEST)
            asked = Asked(models[number % 2], *lengths, number + 1000 * count)
            answer = await ask(http, url, asked)
            part.saw(answer.error)

    async def churn() -> None:
        while time.monotonic() < ends:
            cid, other = (cids[(part.cycles + i) % len(cids)] for i in (0, 1))
            for method, path, body in (
                ("POST", "/adapters", {"name": "passing", "cid": cid}),
                ("POST", "/chat", {"message": "hi", "lora_name": "passing", "max_tokens": 4}),
                ("POST", "/adapters", {"name": "passing", "cid": other}),
                ("POST", "/chat", {"message": "hi", "lora_name": "passing", "max_tokens": 4}),
                ("DELETE", "/adapters/passing", None),
            ):
                try:
                    async with http.request(method, url + path, json=body) as answer:
                        await answer.read()
                    part.saw("" if answer.ok else f"{method} {path}: {answer.status}")
                except aiohttp.ClientError as error:
                    part.saw(f"{method} {path}: {error}")
                    await asyncio.sleep(1)
            part.cycles += 1

    async def look() -> None:
        while (left := ends - time.monotonic()) > 0:
            most, until = 0.0, time.monotonic() + min(left, OF_S)
            while time.monotonic() < until:
                await asyncio.sleep(LOOK_S)
                most = max(most, _resident(tree))
            part.resident.append((time.monotonic(), most))

    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(look())
        tasks.create_task(churn())
        for number in range(STREAMS):
            tasks.create_task(stream(number))
    part.seconds = time.monotonic() - began
    part.descriptors = float(sum(it.num_fds() for it in _processes(tree)))
    return part


def _processes(tree: psutil.Process) -> list[psutil.Process]:
    return [tree, *tree.children(recursive=True)]


def _resident(tree: psutil.Process) -> float:
    return float(sum(it.memory_info().rss for it in _processes(tree)) / (1 << 20))


def _note(record: Record, part: Part, first: Part, before: Part) -> None:
    sides = ("later part", "first part")
    chart = "A node after hours, of the same node at the start"
    record.pair(
        "memory",
        "MiB",
        ours=part.mib,
        peer=first.mib,
        sides=sides,
        better="lower",
        chart=chart,
    )
    record.pair(
        "memory a hundred cycles",
        "MiB",
        ours=(part.mib - before.mib) / max(part.cycles, 1) * 100,
        peer=None,
        sides=("growth in a part", "none"),
        better="lower",
        target=Target(of="ours", at_most=1.0),
    )
    record.pair(
        "open descriptors",
        "descriptors",
        ours=part.descriptors,
        peer=first.descriptors,
        sides=sides,
        better="lower",
        target=Target(at_most=1.1),
        chart=chart,
    )
    record.pair(
        "loads, switches, unloads",
        "cycles/s",
        ours=part.cycles / part.seconds,
        peer=first.cycles / first.seconds,
        sides=sides,
        chart=chart,
    )
    record.pair(
        "requests that failed",
        "of all",
        ours=sum(part.errors.values()) / part.requests,
        peer=sum(first.errors.values()) / first.requests,
        sides=sides,
        better="lower",
        target=Target(of="ours", at_most=0),
    )


if __name__ == "__main__":
    alone("soak")
