"""The way out that loses nothing: off the network, no new requests, and the end when those that run
have theirs."""

import asyncio
import signal

import uvicorn

from r3mes_vllm import report
from r3mes_vllm.node import restart
from r3mes_vllm.node.heartbeat import Registration
from r3mes_vllm.node.load import Load


class Interrupted:
    """Whether Ctrl-C ended this process."""

    seen = False


class Drain:
    """SIGTERM, Ctrl-C and `POST /drain` begin it; a second one ends what still runs."""

    def __init__(self, load: Load, timeout_s: float) -> None:
        self._load = load
        self._timeout = timeout_s
        self._begun = asyncio.Event()
        self._aborted = asyncio.Event()

    def begin(self) -> None:
        (self._aborted if self._load.draining else self._begun).set()
        self._load.draining = True
        restart.Restart.ended = True  # should the engine fail meanwhile

    def catch_signals(self) -> None:
        """In place of vLLM's handlers, which stop the engine under its requests."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.begin)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)

    async def run(
        self, server: uvicorn.Server, registration: Registration, network: asyncio.Task[None]
    ) -> None:
        """Once it was begun: end the server when nothing runs, or the time is over."""
        await self._begun.wait()
        report.say(
            f"draining: {self._load.running} requests run, for {self._timeout:g} s at most; "
            "a second signal aborts them"
        )
        network.cancel()
        await asyncio.gather(network, return_exceptions=True)
        telling = asyncio.create_task(registration.drain())
        waits = [asyncio.create_task(it) for it in (self._load.idle(), self._aborted.wait())]
        await asyncio.wait(waits, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._load.running:
            report.warn(f"{self._load.running} requests are aborted; their streams end as errors")
        await telling
        restart.end(server, linger_s=0 if self._load.running else restart.LINGER_S)

    def _interrupt(self) -> None:
        Interrupted.seen = True
        self.begin()
