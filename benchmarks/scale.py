"""How the backend's calls grow with what is registered.

    r3mes-vllm bench scale [--rounds 5]

Three backends on SQLite, programs of their own with 100, 1,000 and 10,000 adapters and a tenth as
many nodes, are asked in turn, one call after the other; each pair is of a larger one and the
smallest. All nodes have signed and answered for their URL.
"""

import asyncio
import contextlib
import tempfile
from pathlib import Path

import psutil

from benchmarks.backend_beats import EVERY_S, Registered, beating, registered, timed
from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.results import Target

SIZES = (100, 1000, 10_000)
"""Adapters; a tenth as many nodes."""
CALLS = 100


def run(plan: Plan, record: Record) -> None:
    asyncio.run(_run(plan, record))


async def _run(plan: Plan, record: Record) -> None:
    sizes, calls = plan.pick((SIZES, CALLS), ((20, 50, 200), 10))
    record.describe(
        "none: no model", database="SQLite", nodes_per_adapter=0.1, calls_each=calls, routers=1
    )
    async with contextlib.AsyncExitStack() as until_end:
        folder = Path(until_end.enter_context(tempfile.TemporaryDirectory()))
        backends: list[tuple[int, Registered]] = []
        for size in sizes:
            record.say(f"registering {size} adapters and {size // 10} nodes")
            database = f"sqlite:///{folder}/{size}.sqlite3"
            it = await until_end.enter_async_context(
                registered(database, folder / "keys", adapters=size, nodes=size // 10)
            )
            backends.append((size, it))
            took = it.registered_s
            record.note(
                f"{size} adapters registered in {took['adapters']:.1f} s, {size // 10} nodes in "
                f"{took['nodes']:.1f} s, sixteen at a time"
            )
        for turn in range(plan.rounds):
            found = {}
            for size, it in in_turn(turn, backends):
                found[size] = await _measured(it, calls, plan.lasts(EVERY_S / 3, 2))
            for size in sizes[1:]:
                _note(record, size, found[size], found[sizes[0]])


async def _measured(it: Registered, calls: int, for_s: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, call in (await it.calls()).items():
        took = await timed(call, calls)
        found |= {f"{name}, {part}": value for part, value in took.items()}
    found["cores while all beat"] = await beating(it, for_s)
    found["memory"] = _memory(it.measured["router"])
    return found


def _memory(process: psutil.Process) -> float:
    """MiB."""
    return float(process.memory_info().rss) / (1 << 20)


def _note(record: Record, size: int, larger: dict[str, float], smallest: dict[str, float]) -> None:
    units = {"cores while all beat": "cores", "memory": "MiB"}
    for name, value in larger.items():
        cores = name in units and size == SIZES[-1] and units[name] == "cores"
        charted = name.endswith("p50")
        record.pair(
            f"{name}: {size:,} adapters",
            units.get(name, "ms"),
            ours=value,
            peer=smallest[name],
            sides=(f"{size:,} adapters", "the smallest"),
            better="lower",
            target=Target(of="ours", at_most=0.5) if cores else None,
            chart="How a call grows with what is registered, p50" if charted else "",
            series=name.removesuffix(", p50"),
            x=size,
            x_axis="adapters; a tenth as many nodes",
        )


if __name__ == "__main__":
    alone("scale")
