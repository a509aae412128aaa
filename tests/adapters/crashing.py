"""Kill fetches of an adapter at random instants, and look at the store after each.

    python -m tests.adapters.crashing FOLDER [KILLS] [SEED] [--unsafe]

Prints its seed, and a JSON object: how many were killed, how many had ended before, how many of
those killed left something to go on with, and what was wrong. Exit status 1 if anything was, or if
too few were killed, or so early that they left nothing. A process of its own, so that its children
start by forking what is imported already. `--unsafe` writes adapters in place, to show what that
does.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aiohttp import web

from r3mes_vllm.adapters import manifest
from r3mes_vllm.adapters.store import Damaged, Lease, Store
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS
from r3mes_vllm.ipfs import car
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.pack import pack
from tests import tiny
from tests.programs import free_port, verdict

RANK = 512
LONGEST_S = 120
"""Of a fetch: one that has not ended by then never would."""
_PIECE = 1 << 16
_RESUMED = 0.05
"""Of those killed, that must have left something to go on with."""


def main(folder: Path, kills: int, seed: int) -> int:
    print(f"seed {seed}", file=sys.stderr, flush=True)
    found, wrong = run(folder, kills, seed)
    json.dump({**found, "seed": seed, "wrong": wrong}, sys.stdout)
    return verdict(problems(found, wrong, kills))


def problems(found: dict[str, int], wrong: list[str], kills: int) -> list[str]:
    """Why the run has failed, or shown nothing."""
    said = [f"{len(wrong)} times wrong: {it}" for it in sorted(set(wrong))]
    if not 0 < kills <= found["killed"]:
        said.append(f"{found['killed']} were killed, of {kills}")
    if found["resumed"] <= _RESUMED * found["killed"]:
        said.append(f"{found['resumed']} left something to go on with: they were killed too early")
    return said


def run(folder: Path, kills: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """What became of the fetches, and what was wrong."""
    chance = random.Random(seed)
    adapter = tiny.make_adapter(folder / "adapter", seed=1, rank=RANK)
    cid = pack(adapter, folder / "adapter.car")
    port = free_port()
    gateway = _forked(
        lambda: asyncio.run(serve_car(folder / "adapter.car", port)),
        longest_s=(kills + 5) * LONGEST_S,  # should this process be killed
    )
    wrong: list[str] = []
    found = {"killed": 0, "ended": 0, "resumed": 0}
    try:
        whole_s = min(
            _seconds_of(partial(_fetch, folder / warm, cid, port)) for warm in ("warm", "warmer")
        )
        while found["killed"] < kills and found["ended"] <= 4 * kills:
            store = Store(folder / "store")
            left = sum(it.stat().st_blocks for it in (folder / "store").rglob("*.safetensors"))
            child = _forked(lambda: _fetch(folder / "store", cid, port))
            time.sleep(chance.uniform(0, 1.2 * whole_s))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            # The machine's pace changes: about one in four should end before it is killed.
            whole_s *= 1.02 if os.WIFSIGNALED(status) else 0.95
            found["killed" if os.WIFSIGNALED(status) else "ended"] += 1
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                wrong.append("a fetch that nobody had killed yet failed")
            found["resumed"] += bool(left) and not store.stored()
            wrong += wrong_in(store, adapter)
            if store.stored():
                store.drop_unused()
        _, status = os.waitpid(_forked(lambda: _fetch(folder / "store", cid, port)), 0)
        if status:
            wrong.append(f"the last fetch, which nobody killed, ended with {status}")
        wrong += wrong_in(Store(folder / "store"), adapter)
        if not Store(folder / "store").stored():
            wrong.append("the last fetch, which nobody killed, left nothing")
    finally:
        os.kill(gateway, signal.SIGKILL)
        os.waitpid(gateway, 0)
    return found, wrong


def _commit_in_place(self: Store, cid: CID, vetted: Path, notes: Sequence[str] = ()) -> Lease:
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
    lease = self.lease(cid)
    assert lease
    return lease


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


@dataclass
class Given:
    """What a gateway gave."""

    bytes: int = 0


async def serve_car(
    path: Path, port: int, *, takes_s: float = 0.0, given: Given | None = None
) -> None:
    """A gateway that has what is in the CAR file, and gives all of it in `takes_s` seconds."""
    blocks, size = car.CarFile(path), path.stat().st_size
    given = given or Given()

    async def answer(request: web.Request) -> web.StreamResponse:
        is_car = request.query["format"] == "car"
        cid = CID.parse(request.match_info["cid"])
        if (data := path.read_bytes() if is_car else blocks.block(cid)) is None:
            raise web.HTTPNotFound
        response = web.StreamResponse()
        response.content_length = len(data)
        with suppress(ConnectionResetError):  # who fetched it was killed
            await response.prepare(request)
            for start in range(0, len(data), _PIECE):
                await response.write(piece := data[start : start + _PIECE])
                given.bytes += len(piece)
                if takes_s:
                    await asyncio.sleep(takes_s * len(piece) / size)
            await response.write_eof()
        return response

    app = web.Application()
    app.router.add_get("/ipfs/{cid}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


def _forked(work: Callable[[], object], longest_s: int = LONGEST_S) -> int:
    """The child, which SIGALRM ends after `longest_s` seconds."""
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(longest_s)
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
    by_chance = str(random.SystemRandom().randrange(10**6))
    given = [*sys.argv[2:], *("100", by_chance)[len(sys.argv[2:]) :]]
    sys.exit(main(Path(sys.argv[1]), int(given[0]), int(given[1])))
