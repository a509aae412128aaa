"""Fetching an adapter from a gateway on loopback, against what sha256 alone does on one core.

    python -m benchmarks.fetch [--size 1G] [--rounds 5] [--json]

Each round hashes the CAR's bytes on one core, writes as many to the disk and waits for it, then
fetches the same bytes in a fresh process to verified files that can be opened, and waits for the
disk again, as the store does in the background. Medians and spread of what one round gives; the
peak of memory is the fetching process's, above what it needed before it began.
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
                one: dict[str, float] = {"sha256_s": _hash(packed)}
                one |= _write(packed, folder / "written")
                into = folder / f"into-{turn}"
                child = _child(
                    *("--fetch", url, str(cid), str(into), "--size", str(size)),
                    stdout=subprocess.PIPE,
                )
                one |= json.loads(child.communicate()[0])
                one["ratio"] = one["sha256_s"] / one["opened_s"]
                one["ratio_synchronised"] = one["sha256_s"] / one["synchronised_s"]
                subprocess.run(["rm", "-rf", str(into)], check=True)
                if turn:  # the first warms the page cache
                    found.append(one)
        finally:
            gateway.terminate()
            gateway.wait()
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "bytes": size,
        "rounds": rounds,
        "peak_bytes_above_idle": max(one.pop("peak") for one in found),
        **{name: _spread([one[name] for one in found]) for name in found[0]},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _told(result: dict[str, Any]) -> str:
    def spread(name: str) -> str:
        it = result[name]
        return f"{it['median']:.2f} ({it['least']:.2f} to {it['most']:.2f})"

    return (
        f"{result['bytes']} bytes, medians of {result['rounds']} rounds, seconds:\n"
        f"  sha256 alone      {spread('sha256_s')}\n"
        f"  disk alone        {spread('disk_s')}, of which its own thread "
        f"{spread('disk_cpu_s')}\n"
        f"  fetched: open     {spread('opened_s')}\n"
        f"  fetched: on disk  {spread('synchronised_s')}\n"
        f"sha256 alone / fetched: {spread('ratio')} until it can be opened, "
        f"{spread('ratio_synchronised')} until it is on the disk\n"
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


def _write(source: Path, target: Path) -> dict[str, float]:
    """Seconds of writing the file anew and waiting for the disk, and the thread's own of them."""
    size = source.stat().st_size
    data = os.urandom(1 << 21)
    began, of_thread = time.perf_counter(), time.thread_time()
    with target.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        for at in range(0, size, len(data)):
            os.pwrite(file.fileno(), data[: size - at], at)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return {"disk_s": seconds, "disk_cpu_s": time.thread_time() - of_thread}


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
    got = await fetch(cid, folder, sources=[GatewaySource(url)], limits=Limits(bytes=2 * size))
    opened = [path.open("rb") for path in got.iterdir()]
    opened_s = time.perf_counter() - began
    peak = _memory("VmHWM") - idle
    for file in opened:
        os.fsync(file.fileno())
    synchronised_s = time.perf_counter() - began
    return {"opened_s": opened_s, "synchronised_s": synchronised_s, "peak": peak}


def _memory(name: str) -> int:
    """Bytes, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


if __name__ == "__main__":
    main()
