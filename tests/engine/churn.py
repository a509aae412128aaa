"""Load and unload adapters on a real node, over and over: does its memory stay where it is?

    python -m tests.engine.churn [--cycles 2000]

Prints as JSON the resident memory of the node with its engine every hundred cycles, in MiB, and its
slope after the first quarter, in MiB for a hundred cycles.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

import httpx
import numpy as np
import psutil

from tests import tiny
from tests.in_store import put_in_store
from tests.programs import free_port, program

EVERY = 100
ADAPTERS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), options.cycles)
    warm = found[len(found) // 4 :]
    slope = float(np.polyfit(range(len(warm)), warm, 1)[0])
    print(json.dumps({"mib": [round(it, 1) for it in found], "slope": round(slope, 3)}))


def measure(folder: Path, cycles: int) -> list[float]:
    model = tiny.make_model(folder / tiny.NAME)
    stays = tiny.make_adapter(folder / "stays", seed=0)
    cids = asyncio.run(_import(folder))
    url = f"http://127.0.0.1:{(port := free_port())}"
    found = []
    with program(
        folder,
        *("serve", "--loras", f"stays={stays}", "--model", str(model), "--host", "127.0.0.1"),
        *("--port", str(port), "--backend-url", "http://127.0.0.1:9"),
        url=url,
    ) as node:
        node.wait_for("/ready", 180)
        tree = psutil.Process(node.process.pid)
        with httpx.Client(base_url=url, timeout=60) as client:
            for cycle in range(cycles):
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
    main()
