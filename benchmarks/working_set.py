"""Requests a second as the adapters in use outgrow the slots: the cliff.

    r3mes-vllm bench working-set [--rounds 5] [--only NAME] [--seconds 8]

Two servers, our node and stock `vllm serve`, with the same flags. All adapters lie on the disk, on
ours in its store, where requests name them by CID, on stock's as modules that it was started with.
Requests come at random moments whether answers are done or not; a request's adapter is drawn by:

    S1, S2    S-LoRA's shapes: its code draws by a power law, which with alpha 1 makes all alike
              likely; of rank 8, and of 8, 16, 32 and 64
    zipf      the n-th is asked for 1/n times as often as the first
    distinct, identical, uniform, skewed
              Punica's mixes: each another one, all the same, each of ceil(sqrt(n)) alike, and the
              n-th 1/1.5 times as often as the one before

Arrivals are Gamma with a variation of 1 (S-LoRA's default), of U[8, 512) tokens, on a CPU of
U[8, 32), and more a second than either side can do: else few adapters and many would keep the same
rate by themselves. Where that was not so a note says it.
"""

import asyncio
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np

from benchmarks.client import Answer, Asked, ask, at, session
from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.results import Target
from benchmarks.servers import Servers
from benchmarks.shapes import Shape, adapter, shape_of
from benchmarks.side_by_side import SETTLES_S
from tests.in_store import put_in_store

SHAPES = ("S1", "S2", "zipf", "distinct", "identical", "uniform", "skewed")
ALPHA, VARIATION, SKEW = 1.0, 1.0, 1.5
RANKS = {"S2": (8, 16, 32, 64)}
OF_SLOTS = (0.5, 1.0, 1.5, 2.0, 4.0)
"""Working sets: how many times the slots."""
MIXED = 2.0
"""That of Punica's mixes."""
WARMS_S = 3.0
AS_STOCK = {
    "R3MES_LOADS_WAITING": "10000",
    "R3MES_REQUESTS_AT_ONCE": "10000",
    "R3MES_LOAD_WAIT": "600",
    "R3MES_CACHE_SIZE": "2T",
}
"""Stock lets all wait and has all on the disk; the node would send some away and throw some out."""
DISK_LEFT = 2 << 30
"""Bytes that the machine keeps."""
BUSY = 0.9
"""A server that answers more than this part of what is asked a second could do more."""


@dataclass(frozen=True)
class Size:
    slots: int
    kept: int
    """Adapters in main memory."""
    counts: Sequence[int]
    """Adapters under the S1 and S2 shapes."""
    rate: float
    """Requests a second."""
    longest: int
    """Tokens of a prompt and of an answer, at most."""
    seconds: float
    seats: int = 64
    """Requests in a step. More than slots are no use to adapters that nobody else asks for."""


QUICK = Size(2, 8, (2, 6), 4.0, 16, 3)
CPU = Size(8, 64, (5, 100, 1000, 2000), 16.0, 32, 8)
GPU = Size(32, 256, (5, 100, 1000, 2000), 80.0, 512, 8, seats=32)


def run(plan: Plan, record: Record) -> None:
    shape = shape_of(plan.model, plan.quick)
    size = plan.pick(GPU if shape.dummy else CPU, QUICK)
    for_s = plan.seconds or size.seconds
    record.describe(
        "greedy, end of text ignored",
        dtype=plan.dtype,
        slots=size.slots,
        seats=size.seats,
        in_main_memory=size.kept,
        requests_per_s=size.rate,
        arrivals=f"Gamma, variation {VARIATION:g}",
        tokens=f"U[8, {size.longest})",
        seconds=for_s,
        alpha=ALPHA,
        node="lets all wait and drops none, as stock does",
    )
    for ranks in ((8,), RANKS["S2"]):
        cases = [it for it in _cases(size) if RANKS.get(it.shape, (8,)) == ranks]
        cases = [it for it in cases if plan.wants(it.name)]
        if not cases:
            continue
        with tempfile.TemporaryDirectory() as name, ExitStack() as until_end:
            folder = Path(name)
            if not (cases := _fitting(record, plan, shape, cases, ranks, folder)):
                continue
            most = max(it.adapters for it in cases)
            record.say(f"making {most} adapters of rank {ranks}")
            folders = {
                f"a{i}": adapter(
                    folder / "adapters" / str(i),
                    shape,
                    seed=plan.seed * 100_000 + i,
                    rank=ranks[i % len(ranks)],
                )
                for i in range(most)
            }
            servers = Servers(
                plan,
                folder,
                slots=size.slots,
                kept=size.kept,
                rank=max(ranks),
                seats=size.seats,
            )
            stock = until_end.enter_context(servers.stock(loras=folders))
            cids = asyncio.run(_stored(servers, folders))
            first = {"a0": folders["a0"]}
            node = until_end.enter_context(servers.node("--allow-cid", loras=first, **AS_STOCK))
            servers.ready()
            sides = {
                "ours": (node.url, [f"ipfs://{cid}" for cid in cids]),
                "stock vLLM": (stock.url, list(folders)),
            }
            asyncio.run(_measured(plan, record, size, for_s, cases, sides))


@dataclass(frozen=True)
class Case:
    shape: str
    adapters: int
    of_slots: float | None = None

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.adapters} adapters"


def _cases(size: Size) -> list[Case]:
    if size is QUICK:
        return [Case("S1", 2), Case("S1", 6), Case("S2", 4), Case("zipf", 4, 2.0)]
    counts = [Case(shape, count) for shape in ("S1", "S2") for count in size.counts]
    sets = [
        Case(shape, round(part * size.slots), part) for shape in ("S1", "zipf") for part in OF_SLOTS
    ]
    mixes = [Case(shape, round(MIXED * size.slots)) for shape in SHAPES[3:]]
    return [*counts, *sets, *mixes]


def _fitting(
    record: Record,
    plan: Plan,
    shape: Shape,
    cases: Sequence[Case],
    ranks: Sequence[int],
    folder: Path,
) -> list[Case]:
    """Those whose adapters find room on the disk twice: in the node's store, and where stock is
    given them."""
    each = 2 * shape.layers * sum(map(sum, shape.attention.values())) * sum(ranks) / len(ranks)
    room = shutil.disk_usage(folder).free - DISK_LEFT
    fitting = [it for it in cases if 2 * it.adapters * each < room]
    for case in cases:
        if case not in fitting:
            need = 2 * case.adapters * each / 1e9
            record.leave_out(case.name, f"they take {need:.0f} GB of disk")
    return fitting


async def _stored(servers: Servers, folders: Mapping[str, Path]) -> list[str]:
    cache, places = servers.folder / "node" / "cache", asyncio.Semaphore(os.cpu_count() or 1)

    async def stored(path: Path) -> str:
        async with places:
            return await put_in_store(cache, path)

    return await asyncio.gather(*(stored(path) for path in folders.values()))


async def _measured(
    plan: Plan,
    record: Record,
    size: Size,
    for_s: float,
    cases: Sequence[Case],
    sides: Mapping[str, tuple[str, list[str]]],
) -> None:
    async with session() as http:
        for url, names in sides.values():  # stock was started with them, ours reads at first use
            for name in names[: size.kept]:
                await ask(http, url, Asked(name, 8, 1))
            # and the first batch of several compiles its kernels
            await _offered(http, url, names, cases[0], size, WARMS_S, plan.seed)
        for turn in range(plan.rounds):
            ours: dict[Case, dict[str, float | None]] = {}
            for case in in_turn(turn, cases):
                found = {}
                for side, (url, names) in in_turn(turn, tuple(sides.items())):
                    await asyncio.sleep(SETTLES_S)
                    found[side] = await _offered(
                        http, url, names, case, size, for_s, plan.seed + turn
                    )
                ours[case] = found["ours"]
                _note(record, case, found["ours"], found["stock vLLM"])
                for side, of_side in found.items():
                    if (of_side["requests_per_s"] or 0) > BUSY * size.rate:
                        record.note(f"{case.name}: {side} could do more than was asked of it")
            _kept(record, plan, ours)


async def _offered(
    http: aiohttp.ClientSession,
    url: str,
    names: Sequence[str],
    case: Case,
    size: Size,
    for_s: float,
    seed: int,
) -> dict[str, float | None]:
    """Requests a second that got their answer, and milliseconds until the first token."""
    rng = np.random.default_rng(seed)
    count = max(2, round(for_s * size.rate))
    pauses = rng.gamma(1 / VARIATION**2, VARIATION**2 / size.rate, count)
    lengths = rng.integers(8, size.longest, (count, 2))
    which = chosen(case.shape, case.adapters, count, seed)
    asked = [
        Asked(names[adapter], int(prompt), int(answer), number)
        for number, (adapter, (prompt, answer)) in enumerate(zip(which, lengths, strict=True))
    ]
    loop = asyncio.get_running_loop()
    began = loop.time()
    due = began + np.cumsum(pauses)

    async def one(number: int) -> Answer:
        await asyncio.sleep(max(due[number] - loop.time(), 0))
        return await ask(http, url, asked[number])

    answers = await asyncio.gather(*(one(number) for number in range(count)))
    took = loop.time() - began
    well = [it for it in answers if not it.error]
    firsts = [it.first_s * 1000 for it in well]
    return {
        "requests_per_s": len(well) / took,
        "failed": (count - len(well)) / count,
        "first_p50": at(firsts, 0.5) if firsts else None,
        "first_p99": at(firsts, 0.99) if firsts else None,
    }


def chosen(shape: str, adapters: int, requests: int, seed: int) -> list[int]:
    """Which adapter each request is for."""
    rng = np.random.default_rng(seed)
    if shape in ("S1", "S2"):
        return [int(it) for it in np.floor(rng.power(ALPHA, requests) * adapters)]
    if shape == "identical":
        return [0] * requests
    if shape == "distinct":
        return [number % adapters for number in range(requests)]
    if shape == "uniform":
        return [int(it) for it in rng.integers(0, math.ceil(math.sqrt(adapters)), requests)]
    places = np.arange(adapters)
    weights = 1 / (places + 1.0) if shape == "zipf" else SKEW ** -places.astype(float)
    return [int(it) for it in rng.choice(adapters, requests, p=weights / weights.sum())]


NAMES = {
    "requests_per_s": ("answers", "requests/s"),
    "first_p50": ("until the first token of those who queue, p50", "ms"),
    "first_p99": ("until the first token of those who queue, p99", "ms"),
    "failed": ("failed", "of all"),
}


def _note(
    record: Record, case: Case, ours: dict[str, float | None], stock: dict[str, float | None]
) -> None:
    for key, (name, unit) in NAMES.items():
        charted = case.of_slots is not None and key == "requests_per_s"
        record.pair(
            f"{case.name}: {name}",
            unit,
            ours=ours[key],
            peer=stock[key],
            sides=("ours", "stock vLLM"),
            better="higher" if key == "requests_per_s" else "lower",
            chart=f"The cliff: {name}, of stock's" if charted else "",
            series=case.shape,
            x=case.of_slots,
            x_axis="adapters in use, times the slots",
        )


def _kept(record: Record, plan: Plan, ours: Mapping[Case, dict[str, float | None]]) -> None:
    """S-LoRA's own figure: what is left of the rate with the fewest adapters."""
    for shape in ("S1", "S2"):
        cases = sorted(
            (it for it in ours if it.shape == shape and it.of_slots is None),
            key=lambda it: it.adapters,
        )
        for case in cases[1:]:
            aimed = plan.model.startswith("llama") and case == Case("S1", 2000)
            record.pair(
                f"{case.name}: answers",
                "requests/s",
                ours=ours[case]["requests_per_s"],
                peer=ours[cases[0]]["requests_per_s"],
                sides=(f"ours, {case.adapters} adapters", f"ours, {cases[0].adapters} adapters"),
                target=Target(at_least=0.95) if aimed and cases[0].adapters == 5 else None,
                chart="Rate kept as adapters become more",
                series=shape,
                x=case.adapters,
                x_axis="adapters",
            )


if __name__ == "__main__":
    alone("working-set")
