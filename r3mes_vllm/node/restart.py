"""The way out when the engine is not well, and the way back.

Off the network, all streams ended as errors, vLLM's server ended; then `serve` starts again as the
same process, with the adapters it had. Under plain `vllm serve` the process ends with status 1, and
whoever supervises it starts it again.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar, NoReturn

import psutil
import uvicorn

from r3mes_vllm import report
from r3mes_vllm.errors import EngineError
from r3mes_vllm.settings import Settings

MOST = 5
WITHIN_S = 600.0
_PAUSE_S = 2.0
"""Before the second start in a row; twice as long before each one after that."""
LINGER_S = 3
"""For clients that take what was sent to them."""
_SHUTDOWN_S = 20.0
"""For vLLM's server to end; then this process does without."""


@dataclass(frozen=True)
class Again:
    """How this process started, so that it can start once more."""

    began: tuple[float, ...]
    """Earlier restarts, by `time.monotonic`, which goes on for the next program."""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    command: Sequence[str] = field(default_factory=lambda: [sys.executable, *sys.orig_argv[1:]])

    @property
    def recent(self) -> list[float]:
        return [it for it in self.began if time.monotonic() - it < WITHIN_S]

    def start(self, failure: "Failure") -> NoReturn:
        """Become the program again. Raises EngineError when that has been done too often."""
        recent = self.recent
        if len(recent) >= MOST:
            raise EngineError(
                f"{failure.reason}; it was started again {MOST} times in "
                f"{WITHIN_S / 60:.0f} minutes",
                hint="r3mes-vllm --debug serve ... shows vLLM's own log",
            )
        if not failure.adapters:
            raise EngineError(f"{failure.reason}; there is no adapter to go on with")
        if recent:
            time.sleep(_PAUSE_S * 2 ** (len(recent) - 1))
        then = Settings.model_construct(
            restarts=[*recent, time.monotonic()],
            restored=failure.adapters,
            followed=failure.followed,
            passing=failure.passing,
        )
        # It keeps the number of this process, which its supervisor knows.
        os.execve(  # noqa: S606
            self.command[0],
            list(self.command),
            # `environ` leaves an empty list out, and then the one before would be read again.
            {**self.environment, "R3MES_FOLLOWED": "", "R3MES_PASSING": "", **then.environ()},
        )


@dataclass(frozen=True)
class Failure:
    reason: str
    adapters: list[str]
    """`NAME=CID`, of those to go on with."""
    followed: list[str]
    """Names among them that the registry may lead to another CID."""
    passing: list[str] = field(default_factory=list)
    """Names among them that came on demand."""


class Restart:
    """Of this process."""

    again: ClassVar[Again | None] = None
    """None under plain `vllm serve`."""
    failure: ClassVar[Failure | None] = None
    forced: ClassVar[threading.Timer | None] = None
    ended: ClassVar[bool] = False
    """Somebody wants this process to end, meanwhile."""


def begin(failure: Failure) -> None:
    """Say what is wrong; from now on this process ends, if need be without vLLM's help."""
    Restart.failure = failure
    again = Restart.again
    then = f"starting again, number {len(again.recent) + 1}" if again else "ending"
    report.warn(f"{failure.reason}; the node leaves the network, streams end as errors; {then}")
    Restart.forced = threading.Timer(_SHUTDOWN_S, _without_server, [failure])
    Restart.forced.daemon = True
    Restart.forced.start()
    # vLLM's handler would shut down an engine that is gone.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _end)


def end(server: uvicorn.Server, linger_s: int = LINGER_S) -> None:
    """Let vLLM's server end by itself; what runs for `linger_s` seconds more ends as an error."""
    server.config.timeout_graceful_shutdown = linger_s
    server.should_exit = True


def follow(failure: Failure | None = None) -> None:
    """After vLLM's server has ended: start again if it did so for a failure."""
    failure = failure or Restart.failure
    if failure and Restart.again and not Restart.ended:
        if Restart.forced:
            Restart.forced.cancel()
        Restart.again.start(failure)


def end_unsupervised() -> None:
    """To be called when all else has ended: vLLM would end with status 0."""
    if Restart.failure and not Restart.again:
        asyncio.get_running_loop().call_soon(sys.exit, 1)


def reap() -> None:
    """To be called before this program has children: those of the program before end soon, and
    this process is their parent still."""
    for child in psutil.Process().children():
        threading.Thread(target=_wait, args=[child.pid], daemon=True).start()


def _wait(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _end() -> None:
    Restart.ended = True


def _without_server(failure: Failure) -> None:
    try:
        if Restart.again and not Restart.ended:
            Restart.again.start(failure)
    except EngineError as error:
        report.warn(str(error))
    os._exit(1)
