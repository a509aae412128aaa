"""A serving node for another program, such as a miner, to embed.

The node is `r3mes-vllm serve` in a process of its own: whatever becomes of the engine, the program
around it goes on, and no event loop waits for it. It ends with that program, however that ends.
"""

import asyncio
import logging
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import httpx

from r3mes_vllm import settings as all_settings
from r3mes_vllm.children import PROGRAM, end_with, kill_session, without_settings
from r3mes_vllm.errors import EngineError
from r3mes_vllm.settings import Settings

logger = logging.getLogger("r3mes_vllm.node")

OFF = "off: R3MES_ENABLE_SERVING_NODE is not true"

_POLL_S = 0.1
_ASKING_S = 2.0
_STOPS_S = 30.0
"""For a node to end when its requests have ended."""
_KILLED_S = 10.0
_LAST_LINES_S = 1.0
_LONGEST_LINE = 64 << 10
_LEVELS = (("error:", logging.ERROR), ("warning:", logging.WARNING))


@dataclass(frozen=True)
class NodeStatus:
    """What is known of a node at one moment."""

    enabled: bool
    """False: it never starts."""
    running: bool
    """Its process is there."""
    ready: bool
    """It gets traffic: the engine is well and an adapter is there."""
    reason: str
    """Why it is not ready; empty when it is."""
    url: str
    """Where this machine reaches it, without a trailing slash."""
    adapters: tuple[str, ...]
    """Names it serves now."""
    pid: int | None
    exit_code: int | None
    """Of the last process, when that has ended; negative for the signal that ended it."""


@dataclass
class _Life:
    """Of one process, which a thread watches from its start to its end."""

    process: subprocess.Popen[bytes] | None = None
    failure: OSError | None = None
    ended: bool = False
    stopping: bool = False


class ServingNode:
    """A node by `settings`, off unless they have `enable_serving_node`.

    `engine_arguments` go to vLLM's own parser, as those after `--` on the command line. `output`
    says where the node's lines go: to the logger `r3mes_vllm.node`, or to this program's standard
    output and error. All methods may be called from any thread; those that wait have a twin that
    begins with `a` for async programs. As a context manager, sync or async, it starts the node
    without waiting for it, and stops it.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        engine_arguments: Sequence[str] = (),
        output: Literal["log", "inherit"] = "log",
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self._settings = settings
        self._command = [*program, "serve"]
        if engine_arguments:
            self._command += ["--", *engine_arguments]
        self._inherit = output == "inherit"
        self._lock = threading.Lock()
        self._life: _Life | None = None
        self._last_lines: deque[str] = deque(maxlen=20)

    @classmethod
    def from_env(
        cls,
        options: Mapping[str, Any] | None = None,
        *,
        config: Path | None = None,
        engine_arguments: Sequence[str] = (),
        output: Literal["log", "inherit"] = "log",
    ) -> Self:
        """A node by the variables `R3MES_...`, which is off unless R3MES_ENABLE_SERVING_NODE is
        `true`.

        `options` are settings by their TOML names, such as `{"loras": ["legal"]}`, and win over the
        environment, which wins over the TOML file `config`. Raises ConfigError for a wrong value.
        """
        settings = all_settings.load(options, config)
        for text in all_settings.misspelt():
            logger.warning("%s", text)
        return cls(settings, engine_arguments=engine_arguments, output=output)

    @property
    def enabled(self) -> bool:
        """Whether `start` does anything."""
        return self._settings.enable_serving_node

    @property
    def url(self) -> str:
        """Where this machine reaches the node, without a trailing slash."""
        return self._settings.local_url

    def start(self, *, wait_s: float | None = None) -> NodeStatus:
        """Start the node's process, unless it runs or the node is off; then say so in the log.

        Returns at once, or, with `wait_s`, when the node is ready. Raises EngineError when the
        process can't be started, and when it ended or was not ready after `wait_s` seconds; in the
        last case it runs on.
        """
        if not self.enabled:
            logger.info("the serving node is %s", OFF)
            return self.status()
        with self._lock:
            if self._life is None or self._life.ended:
                self._last_lines.clear()
                self._life = self._begin()
        return self.wait_ready(wait_s) if wait_s is not None else self.status()

    def wait_ready(self, seconds: float) -> NodeStatus:
        """The status as soon as the node is ready. Raises EngineError when it has ended, was never
        started, or is not ready after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            now = self.status()
            if now.ready or not now.running or time.monotonic() > deadline:
                return _ready(now, seconds)
            time.sleep(_POLL_S)

    def stop(self, *, drain_s: float | None = None) -> int | None:
        """End the node and all its processes; its exit code, or None if it was never started.

        It leaves the network at once and lets requests that run finish, for as long as
        `drain_timeout` of the settings says; what is there half a minute later, or `drain_s`
        seconds from now, is killed.
        """
        life = self._life
        if life is None or life.process is None:
            return None
        process = life.process
        if not life.ended:
            life.stopping = True
            with self._lock:
                if process.returncode is None:
                    process.terminate()
            allowed = self._settings.drain_timeout + _STOPS_S if drain_s is None else drain_s
            if not _until_ended(life, allowed):
                logger.warning("the serving node did not end in %g s and is killed", allowed)
                kill_session(process.pid)
                _until_ended(life, _KILLED_S)
        return process.returncode

    def status(self) -> NodeStatus:
        """How the node is now: asks it over HTTP, for 2 s at most. Raises nothing."""
        life = self._life
        process = life.process if life else None
        running = life is not None and process is not None and not life.ended
        exit_code = process.returncode if process and not running else None
        adapters: tuple[str, ...] = ()
        ready, reason = False, ""
        if not self.enabled:
            reason = OFF
        elif process is None:
            reason = "not started"
        elif running:
            ready, adapters, reason = self._asked()
        else:
            last = next(reversed(self._errors()), "")
            reason = f"ended with status {exit_code}" + (f": {last}" if last else "")
        return NodeStatus(
            enabled=self.enabled,
            running=running,
            ready=ready,
            reason=reason,
            url=self.url,
            adapters=adapters,
            pid=process.pid if process and running else None,
            exit_code=exit_code,
        )

    async def astart(self, *, wait_s: float | None = None) -> NodeStatus:
        """As `start`. When it is cancelled, the node runs on."""
        status = await asyncio.to_thread(self.start)
        return status if wait_s is None else await self.await_ready(wait_s)

    async def await_ready(self, seconds: float) -> NodeStatus:
        """As `wait_ready`."""
        deadline = time.monotonic() + seconds
        while True:
            now = await self.astatus()
            if now.ready or not now.running or time.monotonic() > deadline:
                return _ready(now, seconds)
            await asyncio.sleep(_POLL_S)

    async def astop(self, *, drain_s: float | None = None) -> int | None:
        """As `stop`."""
        return await asyncio.to_thread(self.stop, drain_s=drain_s)

    async def astatus(self) -> NodeStatus:
        """As `status`."""
        return await asyncio.to_thread(self.status)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await self.astart()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        # a cancelled program too leaves no node behind
        await asyncio.shield(self.astop())

    def _begin(self) -> _Life:
        """Raises EngineError."""
        life, begun = _Life(), threading.Event()
        # Its thread makes the process: the kernel ends that with the thread that made it.
        watching = threading.Thread(
            target=self._watch, args=(life, begun), name="serving node", daemon=True
        )
        watching.start()
        begun.wait()
        if life.failure:
            raise EngineError(
                f"the node can't be started: {life.failure.strerror}"
            ) from life.failure
        return life

    def _watch(self, life: _Life, begun: threading.Event) -> None:
        out = None if self._inherit else subprocess.PIPE
        try:
            life.process = process = subprocess.Popen(  # noqa: S603
                self._command,
                env=without_settings(os.environ) | self._settings.environ(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=None if self._inherit else subprocess.STDOUT,
                # Ctrl-C is for this program, which stops the node when it wants to.
                start_new_session=True,
                preexec_fn=end_with(os.getpid()),
            )
        except OSError as error:
            life.failure, life.ended = error, True
            begun.set()
            return
        begun.set()
        copying = None
        if process.stdout:
            copying = threading.Thread(
                target=self._copy, args=(process.stdout,), name="serving node output", daemon=True
            )
            copying.start()
        # `wait` would reap it, and its number might be another's before a signal is sent.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            process.wait()
        kill_session(process.pid)
        if copying:
            copying.join(_LAST_LINES_S)
        life.ended = True
        level = logging.INFO if life.stopping else logging.ERROR
        logger.log(level, "the serving node ended with status %d", process.returncode)

    def _copy(self, out: IO[bytes]) -> None:
        for raw in iter(lambda: out.readline(_LONGEST_LINE), b""):
            line = raw.decode(errors="replace").rstrip()
            self._last_lines.append(line)
            level = next((it for start, it in _LEVELS if line.startswith(start)), logging.INFO)
            logger.log(level, "%s", line)

    def _errors(self) -> list[str]:
        return [it.removeprefix("error: ") for it in self._last_lines if it.startswith("error:")]

    def _asked(self) -> tuple[bool, tuple[str, ...], str]:
        """Whether it is ready, its adapters, and why it is not."""
        try:
            # This machine's own node, by an address that no certificate names; no key is sent.
            with httpx.Client(
                base_url=self.url,
                timeout=_ASKING_S,
                trust_env=False,
                verify=False,  # noqa: S501
            ) as http:
                ready, health = http.get("/ready"), http.get("/health").json()
                reason = "" if ready.is_success else str(ready.json().get("reason"))
                if health.get("status") != "ok":
                    reason = str(health.get("reason") or reason)
                return ready.is_success, tuple(health.get("available_loras", ())), reason
        except httpx.HTTPError as error:
            return False, (), f"it does not answer at {self.url}: {type(error).__name__}"
        except (ValueError, AttributeError, TypeError):
            return False, (), f"what answers at {self.url} is no node"


def _ready(now: NodeStatus, waited_s: float) -> NodeStatus:
    """`now`, if the node is ready or off. Raises EngineError."""
    if now.ready or not now.enabled:
        return now
    if not now.running:
        raise EngineError(f"the node does not run: {now.reason}")
    raise EngineError(
        f"the node was not ready after {waited_s:g} s: {now.reason}",
        hint="its output goes to the logger r3mes_vllm.node",
    )


def _until_ended(life: _Life, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not life.ended and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return life.ended
