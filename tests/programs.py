"""Real programs under test: started as a user starts them, on free loopback ports."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil


def free_port() -> int:
    """Not one of those that the kernel gives to outgoing connections meanwhile."""
    while True:
        port = random.SystemRandom().randrange(12000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def wait_until(
    condition: Callable[[], bool], seconds: float, what: str, told: Callable[[], str] = str
) -> None:
    """Poll until `condition`; a refused connection is not yet. `told` is shown if it never is."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s for {what}\n{told()[-3000:]}")


async def wait_until_async(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {what}")
        await asyncio.sleep(0.005)


def verdict(problems: Sequence[str]) -> int:
    """Of a long form, the exit status, after its `problems` were said."""
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


@dataclass
class Program:
    process: subprocess.Popen[bytes]
    log: Path
    url: str

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, path: str, seconds: float) -> None:
        def answers() -> bool:
            if self.has_ended:
                raise AssertionError(f"it ended with {self.process.returncode}:\n{self.output()}")
            return httpx.get(self.url + path).is_success

        wait_until(answers, seconds, self.url + path, self.output)

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 60) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextlib.contextmanager
def program(
    folder: Path,
    *arguments: str,
    url: str = "",
    env: Mapping[str, str] | None = None,
    module: str = "r3mes_vllm",
    cwd: Path | None = None,
) -> Iterator[Program]:
    """`r3mes-vllm ARGUMENTS`, or another program's, with a state and a cache of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("R3MES_")}
    environment |= {
        "R3MES_STATE_DIR": str(folder / "state"),
        "R3MES_CACHE_DIR": str(folder / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **(env or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{arguments[0]}-{time.monotonic_ns()}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running = Program(process, log, url)
    try:
        yield running
    except Exception as error:
        if process.poll() is not None:
            last = running.output()[-2000:]
            error.add_note(f"{' '.join(arguments[:1])} had ended with {process.returncode}: {last}")
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                for it in [*psutil.Process(process.pid).children(recursive=True), process]:
                    it.kill()
                process.wait()
