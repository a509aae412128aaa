"""Programs that a benchmark starts, and ends with itself."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx

_STARTS_S = 300


@contextmanager
def running(module: str, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m MODULE ARGUMENTS`, without a word, until the context ends."""
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command, stdin=quiet, stdout=quiet, stderr=quiet, env=os.environ | environment
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


async def until_well(url: str) -> None:
    """Raises TimeoutError if nobody says at `url` within five minutes that all is well."""
    async with asyncio.timeout(_STARTS_S), httpx.AsyncClient(trust_env=False) as http:
        while True:
            with suppress(httpx.TransportError):
                if (await http.get(url)).is_success:
                    return
            await asyncio.sleep(0.1)
