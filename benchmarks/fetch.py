"""Fetching an adapter from a gateway on loopback, against what sha256 alone does on one core.

    r3mes-vllm bench fetch [--rounds 5]

Each round hashes the CAR's bytes on one core, writes as many to the disk and waits for it, then
fetches the same bytes in a fresh process to verified files that can be opened, and waits for the
disk again, as the store does in the background. Medians and spread of what one round gives; the
peak of memory is the fetching process's, above what it needed before it began.
"""

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aiohttp import web

from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.results import Target
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.fetch import fetch
from r3mes_vllm.ipfs.pack import pack
from r3mes_vllm.ipfs.sources import GatewaySource
from r3mes_vllm.ipfs.tree import Limits


def run(plan: Plan, record: Record) -> None:
    size = plan.pick(1 << 30, 1 << 24)
    record.describe("none: no model", bytes=size, block_bytes=1 << 18, source="gateway on loopback")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapter").mkdir()
        with (folder / "adapter" / "adapter_model.safetensors").open("wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
        packed = folder / "adapter.car"
        cid = str(pack(folder / "adapter", packed))
        gateway = _child("--serve", str(packed))
        assert gateway.stdout
        url = gateway.stdout.readline().decode().strip()
        try:
            for turn in range(plan.rounds + 1):
                found: dict[str, float] = {}
                for side in in_turn(turn, ("alone", "fetched")):
                    if side == "alone":
                        found |= {"sha256_s": hashed(packed)} | _write(packed, folder / "written")
                    else:
                        found |= _fetched(url, cid, folder / f"into-{turn}", size)
                if turn:  # the first warms the page cache
                    _note(record, found)
        finally:
            gateway.terminate()
            gateway.wait()


def _fetched(url: str, cid: str, into: Path, size: int) -> dict[str, float]:
    child = _child("--fetch", url, cid, str(into), str(size))
    found: dict[str, float] = json.loads(child.communicate()[0])
    shutil.rmtree(into)
    return found


def _note(record: Record, found: dict[str, float]) -> None:
    for name, key, peer, other, target in (
        ("until it can be opened", "opened_s", "sha256 alone", "sha256_s", 0.6),
        ("until it is on the disk", "synchronised_s", "sha256 alone", "sha256_s", None),
        ("until it is on the disk", "synchronised_s", "writing alone", "disk_s", None),
    ):
        record.pair(
            name,
            "fetches/s",
            ours=1 / found[key],
            peer=1 / found[other],
            sides=("fetch", peer),
            target=Target(at_least=target) if target else None,
            chart="A fetch, of what hashing or writing the same bytes alone does",
        )
    record.pair(
        "memory above idle",
        "MiB",
        ours=found["peak"] / (1 << 20),
        peer=found["idle"] / (1 << 20),
        sides=("peak", "idle process"),
        better="lower",
        target=Target(of="ours", at_most=150),
    )


def _child(*arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks.fetch", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def hashed(path: Path) -> float:
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
    return {"opened_s": opened_s, "synchronised_s": synchronised_s, "peak": peak, "idle": idle}


def _memory(name: str) -> int:
    """Bytes, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        asyncio.run(_serve(Path(sys.argv[-1])))
    elif "--fetch" in sys.argv:
        asked_url, root, into_folder, bytes_ = sys.argv[-4:]
        asked = _fetch(asked_url, CID.parse(root), Path(into_folder), int(bytes_))
        print(json.dumps(asyncio.run(asked)))
    else:
        alone("fetch")
