"""An engine of the backend's own: `r3mes-vllm serve` with a base model and no adapters, as a child.

It is in no network. It starts again when it ends, and ends with this process, however that ends.
"""

import asyncio
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from r3mes_vllm import report
from r3mes_vllm.backend.elsewhere import Where
from r3mes_vllm.children import PROGRAM, end_with, free_port, kill_session, without_settings
from r3mes_vllm.settings import EMBEDDED_MODEL, Settings

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 300.0
_STEADY_S = 600.0
"""After so long a life the next pause is the first again."""
_STOPS_S = 30.0
_LAST_LINES_S = 1.0
_PREFIX = "local model: "
_LONGEST_LINE = 64 << 10


class LocalModel:
    """Of the hub name or in the directory `model`. Close it with `aclose`."""

    def __init__(self, model: str, settings: Settings, *, program: Sequence[str] = PROGRAM) -> None:
        self.where: Where | None = None
        """Its server, once its process is there; that answers 503 until the engine is."""
        self._command = [
            *program,
            "serve",
            *([] if model == EMBEDDED_MODEL else ["--model", model]),
        ]
        self._environment = _environment(settings)
        self._key = self._environment["R3MES_API_KEYS"]
        self._pause_s = _FIRST_PAUSE_S
        self._task = asyncio.create_task(self._supervise(), name="local model")

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _supervise(self) -> None:
        while True:
            began = time.monotonic()
            try:
                ending = f"ended with status {await self._run()}"
            except OSError as error:
                ending = f"can't be started: {error}"
            if time.monotonic() - began > _STEADY_S:
                self._pause_s = _FIRST_PAUSE_S
            report.warn(f"the local model {ending}; it starts again in {self._pause_s:g} s")
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    async def _run(self) -> int:
        """One life of it. Raises OSError."""
        port = free_port()
        async with _told() as out:
            process = await asyncio.create_subprocess_exec(
                *(*self._command, "--host", "127.0.0.1", "--port", str(port)),
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                # Ctrl-C must not reach it before this backend has ended its answers.
                start_new_session=True,
                preexec_fn=end_with(os.getpid()),
            )
            self.where = Where(f"http://127.0.0.1:{port}/v1", self._key)
            try:
                return await process.wait()
            finally:
                self.where = None
                await _end(process)


def _environment(settings: Settings) -> dict[str, str]:
    """This process's own, with none of its settings."""
    return without_settings(os.environ) | {
        "R3MES_BASE_ONLY": "true",
        "R3MES_ON_DEMAND": "false",
        "R3MES_API_KEYS": secrets.token_urlsafe(32),  # other users of this machine have none
        "R3MES_CACHE_DIR": str(settings.cache_dir),
        "R3MES_STATE_DIR": str(settings.state_dir / "local-model"),
    }


async def _end(process: asyncio.subprocess.Process) -> None:
    """With all its processes, also those that outlived it."""
    if process.returncode is None:
        process.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOPS_S):
                await process.wait()
    kill_session(process.pid)
    await process.wait()


@asynccontextmanager
async def _told() -> AsyncIterator[int]:
    """A file descriptor: what is written there goes to the standard error, line by line."""
    read, write = os.pipe()
    reader = asyncio.StreamReader(_LONGEST_LINE)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb")
    )
    copying = asyncio.create_task(_copy(reader))
    try:
        yield write
    finally:
        os.close(write)
        await asyncio.wait({copying}, timeout=_LAST_LINES_S)
        copying.cancel()
        await asyncio.gather(copying, return_exceptions=True)
        transport.close()


async def _copy(reader: asyncio.StreamReader) -> None:
    while True:
        try:
            line = await reader.readline()
        except ValueError:
            continue  # too long, and left out
        if not line:
            return
        print(_PREFIX + line.decode(errors="replace").rstrip(), file=sys.stderr, flush=True)
