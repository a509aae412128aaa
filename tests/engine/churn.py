"""Load and unload adapters on a real node, over and over: does its memory stay where it is?

    python -m tests.engine.churn [--cycles 2000]

Prints as JSON the resident memory of the node with its engine every hundred cycles, in MiB, and its
slope after the first quarter, in MiB for a hundred cycles. Exit status 1 if that is over a limit,
if there were too few cycles to tell, or if it has not ended in time. Nothing in it is by chance.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import psutil

from tests import tiny
from tests.conftest import NODE_STARTS_S
from tests.in_store import put_in_store
from tests.programs import free_port, program

EVERY = 100
ADAPTERS = 3
MOST_SLOPE = 1.0
"""MiB for a hundred cycles."""
FEWEST = 6
"""Samples after the warm-up, for a slope that is one."""
EACH_S = 10.0
"""What a cycle may take at most, on average."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), options.cycles)
    slope = slope_of(found)
    told = {"mib": [round(it, 1) for it in found], "slope": slope and round(slope, 3)}
    print(json.dumps(told), flush=True)
    if problem := problem_of(slope):
        print(problem, file=sys.stderr)
    return int(bool(problem))


def slope_of(mib: list[float]) -> float | None:
    """From one sample to the next, after the first quarter; None if they are too few."""
    warm = mib[len(mib) // 4 :]
    return float(np.polyfit(range(len(warm)), warm, 1)[0]) if len(warm) >= FEWEST else None


def problem_of(slope: float | None) -> str:
    if slope is None:
        return f"too few cycles to tell: at least {EVERY * (FEWEST + 1)}"
    if slope > MOST_SLOPE:
        return f"memory grows by {slope:.2f} MiB in {EVERY} cycles; at most {MOST_SLOPE:g}"
    return ""


def measure(folder: Path, cycles: int) -> list[float]:
    model = tiny.make_model(folder / tiny.NAME)
    stays = tiny.make_adapter(folder / "stays", seed=0)
    cids = asyncio.run(_import(folder))
    url = f"http://127.0.0.1:{(port := free_port())}"
    found = []
    until = time.monotonic() + NODE_STARTS_S + EACH_S * cycles
    with program(
        folder,
        *("serve", "--loras", f"stays={stays}", "--model", str(model), "--host", "127.0.0.1"),
        *("--port", str(port), "--backend-url", "http://127.0.0.1:9"),
        url=url,
    ) as node:
        node.wait_for("/ready", NODE_STARTS_S)
        tree = psutil.Process(node.process.pid)
        with httpx.Client(base_url=url, timeout=60) as client:
            for cycle in range(cycles):
                if time.monotonic() > until:
                    raise TimeoutError(f"after {cycle} cycles of {cycles}")
                body = {"name": "passing", "cid": cids[cycle % ADAPTERS]}
                client.post("/adapters", json=body).raise_for_status()
                asked = {"message": "hi", "lora_name": "passing", "max_tokens": 2}
                client.post("/chat", json=asked).raise_for_status()
                client.delete("/adapters/passing").raise_for_status()
                if cycle % EVERY == EVERY - 1:
                    processes = (tree, *tree.children(recursive=True))
                    found.append(sum(it.memory_info().rss for it in processes) / (1 << 20))
                    print(f"{cycle + 1}: {found[-1]:.1f} MiB", file=sys.stderr, flush=True)
    return found


async def _import(folder: Path) -> list[str]:
    """The adapters in the node's store, under no name."""
    made = [tiny.make_adapter(folder / str(seed), seed=seed) for seed in range(1, ADAPTERS + 1)]
    return [await put_in_store(folder / "cache", adapter) for adapter in made]


if __name__ == "__main__":
    sys.exit(main())
