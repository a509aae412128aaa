"""Kill fetches of an adapter at random instants, and look at the store after each.

    python -m tests.adapters.crashing FOLDER [KILLS] [SEED] [--unsafe]

Prints a JSON object: how many were killed, how many had ended before, how many of those killed
left something to go on with, and what was wrong. A process of its own, so that its children start
by forking what is imported already. `--unsafe` writes adapters in place, to show what that does.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from r3mes_vllm.adapters import manifest
from r3mes_vllm.adapters.store import Damaged, Store
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS
from r3mes_vllm.ipfs import car
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.pack import pack
from tests import tiny
from tests.programs import free_port

RANK = 512


def main(folder: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    adapter = tiny.make_adapter(folder / "adapter", seed=1, rank=RANK)
    cid = pack(adapter, folder / "adapter.car")
    port = free_port()
    gateway = _forked(lambda: asyncio.run(serve_car(folder / "adapter.car", port)))
    wrong: list[str] = []
    found = {"killed": 0, "ended": 0, "resumed": 0}
    try:
        whole_s = _seconds_of(lambda: _fetch(folder / "warm", cid, port))
        while found["killed"] < kills:
            store = Store(folder / "store")
            left = sum(it.stat().st_blocks for it in (folder / "store").rglob("*.safetensors"))
            child = _forked(lambda: _fetch(folder / "store", cid, port))
            time.sleep(chance.uniform(0, 1.2 * whole_s))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            found["killed" if os.WIFSIGNALED(status) else "ended"] += 1
            found["resumed"] += bool(left) and not store.stored()
            wrong += wrong_in(store, adapter)
            if store.stored():
                store.drop_unused()
        os.waitpid(_forked(lambda: _fetch(folder / "store", cid, port)), 0)
        wrong += wrong_in(Store(folder / "store"), adapter)
        if not Store(folder / "store").stored():
            wrong.append("the last fetch, which nobody killed, left nothing")
    finally:
        os.kill(gateway, signal.SIGKILL)
        os.waitpid(gateway, 0)
    json.dump({**found, "wrong": wrong}, sys.stdout)


def _commit_in_place(self: Store, cid: CID, vetted: Path, notes: object = ()) -> None:
    into = self._adapters / str(cid)
    into.mkdir(exist_ok=True)
    files = {name: manifest.measured(vetted / name) for name in (CONFIG, WEIGHTS)}
    told = {"fetched_at": 0.0, "notes": [], "files": files}
    (into / manifest.MANIFEST).write_text(json.dumps(told))
    for name in (CONFIG, WEIGHTS):
        with (vetted / name).open("rb") as source, (into / name).open("wb") as target:
            while data := source.read(1 << 16):
                target.write(data)
                time.sleep(0.001)


def wrong_in(store: Store, adapter: Path) -> list[str]:
    """What is not as `adapter`, which was published, of all that is stored."""
    wrong = [it.problem for it in store.fsck() if isinstance(it, Damaged)]
    for it in store.stored():
        for name in (CONFIG, WEIGHTS):
            if (it.path / name).read_bytes() != (adapter / name).read_bytes():
                wrong.append(f"{name} in the store is not what was published")
    return wrong


def _fetch(store: Path, cid: CID, port: int) -> None:
    supply = Supply(
        Store(store), ipfs_api="http://127.0.0.1:9", gateways=[f"http://127.0.0.1:{port}"]
    )
    asyncio.run(supply.obtain(cid))


async def serve_car(path: Path, port: int) -> None:
    """A gateway that has what is in the CAR file."""
    blocks = car.CarFile(path)

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.query["format"] == "car":
            return web.FileResponse(path)
        return web.Response(body=blocks.block(CID.parse(request.match_info["cid"])))

    app = web.Application()
    app.router.add_get("/ipfs/{cid}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


def _forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - it must never come back as a second parent
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def _seconds_of(work: Callable[[], object]) -> float:
    """From fork to end."""
    for _ in range(20):
        began = time.monotonic()
        _, status = os.waitpid(_forked(work), 0)
        if os.WEXITSTATUS(status) == 0:
            return time.monotonic() - began
        time.sleep(0.5)  # the gateway is still starting
    raise TimeoutError("no fetch succeeds")


if __name__ == "__main__":
    if "--unsafe" in sys.argv:
        sys.argv.remove("--unsafe")
        Store.commit = _commit_in_place  # type: ignore[method-assign]
    main(Path(sys.argv[1]), int([*sys.argv, "100"][2]), int([*sys.argv, "0", "0"][3]))
