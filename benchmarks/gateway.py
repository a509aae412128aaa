"""A trustless gateway on loopback that serves `CID.car` of a folder.

Prints its URL when it listens. A program of its own: it takes no time from the one that asks.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The URL of a gateway, until the context ends."""
    command = [sys.executable, "-m", "benchmarks.gateway", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(30)


async def _serve(folder: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        path = folder / f"{Path(request.match_info['cid']).name}.car"
        if not path.is_file() or request.query.get("format", "car") != "car":
            raise web.HTTPNotFound
        return web.FileResponse(path, headers={"Content-Type": "application/vnd.ipld.car"})

    app = web.Application()
    app.router.add_get("/ipfs/{cid}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
