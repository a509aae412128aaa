"""Fetching an adapter from a gateway on loopback, against what sha256 alone does on one core.

    python -m benchmarks.fetch [--size 1G] [--rounds 5] [--json]

Each round hashes the CAR's bytes on one core, then fetches the same bytes in a fresh process to
verified files on disk, synchronised. Ratios of one round, their median and spread; the peak of
memory is the fetching process's, above what it needed before it began.
"""

import argparse
import asyncio
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.fetch import fetch
from r3mes_vllm.ipfs.pack import pack
from r3mes_vllm.ipfs.sources import GatewaySource
from r3mes_vllm.ipfs.tree import Limits
from r3mes_vllm.settings import parse_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_bytes, default=1 << 30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--fetch", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(_serve(Path(options.serve)))
    elif options.fetch:
        url, cid, folder = options.fetch
        print(json.dumps(asyncio.run(_fetch(url, CID.parse(cid), Path(folder), options.size))))
    else:
        result = measure(options.size, options.rounds)
        print(json.dumps(result, indent=1) if options.json else _told(result))


def measure(size: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapter").mkdir()
        with (folder / "adapter" / "adapter_model.safetensors").open("wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
        packed = folder / "adapter.car"
        cid = pack(folder / "adapter", packed)
        gateway = _child("--serve", str(packed), stdout=subprocess.PIPE)
        assert gateway.stdout
        url = gateway.stdout.readline().decode().strip()
        found = []
        try:
            for turn in range(rounds + 1):
                alone = _hash(packed)
                into = folder / f"into-{turn}"
                child = _child(
                    *("--fetch", url, str(cid), str(into), "--size", str(size)),
                    stdout=subprocess.PIPE,
                )
                one = json.loads(child.communicate()[0])
                one["ratio"] = alone / one["seconds"]
                one["sha256_bytes_per_s"] = packed.stat().st_size / alone
                subprocess.run(["rm", "-rf", str(into)], check=True)
                if turn:  # the first warms the page cache
                    found.append(one)
        finally:
            gateway.terminate()
            gateway.wait()
    ratios = [one["ratio"] for one in found]
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "bytes": size,
        "rounds": rounds,
        "ratio_to_sha256": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "sha256_bytes_per_s": statistics.median(one["sha256_bytes_per_s"] for one in found),
        "peak_bytes_above_idle": max(one["peak"] for one in found),
    }


def _told(result: dict[str, Any]) -> str:
    low, high = result["ratio_spread"]
    return (
        f"{result['bytes']} bytes fetched at {result['ratio_to_sha256']:.2f} "
        f"({low:.2f} to {high:.2f}, {result['rounds']} rounds) of what sha256 alone does "
        f"({result['sha256_bytes_per_s'] / 1e9:.2f} GB/s); "
        f"peak {result['peak_bytes_above_idle'] / (1 << 20):.0f} MiB above idle"
    )


def _child(*arguments: str, stdout: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "benchmarks.fetch", *arguments], stdout=stdout)


def _hash(path: Path) -> float:
    """Seconds of sha256 over the file in blocks of 256 KiB, on one core."""
    began = 0.0
    with path.open("rb") as file:
        while data := file.read(1 << 18):
            at = time.perf_counter()
            hashlib.sha256(data).digest()
            began += time.perf_counter() - at
    return began


async def _serve(packed: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(packed, headers={"Content-Type": "application/vnd.ipld.car"})

    app = web.Application()
    app.router.add_get("/ipfs/{cid}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


async def _fetch(url: str, cid: CID, folder: Path, size: int) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    idle = _memory("VmRSS")
    began = time.perf_counter()
    await fetch(cid, folder, sources=[GatewaySource(url)], limits=Limits(bytes=2 * size))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": _memory("VmHWM") - idle}


def _memory(name: str) -> int:
    """Bytes, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


if __name__ == "__main__":
    main()
