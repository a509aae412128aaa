"""Pins on the IPFS daemon: what was fetched is kept from its garbage collection."""

import asyncio
from dataclasses import replace

from r3mes_vllm.errors import AdapterError, SourceFailed
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.http import exchange
from r3mes_vllm.ipfs.sources import KuboSource
from r3mes_vllm.ipfs.tree import Limits
from r3mes_vllm.report import warn

_AT_ONCE = 4


class Pins:
    """Used in one event loop."""

    def __init__(self, daemon: KuboSource, limits: Limits) -> None:
        self._daemon = daemon
        # The daemon answers when it has taken all: until then no byte comes.
        self._limits = replace(limits, stall_s=limits.total_s)
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._pinned: set[CID] = set()
        """By this program."""
        self._tasks: dict[CID, asyncio.Task[None]] = {}

    def begin(self, cid: CID) -> None:
        """Pin it while others go on: an adapter that is here is good without. A failure is a
        warning, and tried again the next time."""
        if cid not in self._pinned and cid not in self._tasks:
            self._tasks[cid] = asyncio.create_task(self._pin_or_warn(cid))

    async def pin(self, cid: CID) -> None:
        """Raises AdapterError."""
        async with self._gate, exchange(self._limits) as connections:
            try:
                await self._daemon.pin(cid, connections)
            except SourceFailed as error:
                raise AdapterError(
                    f"{cid} is here, but is not pinned: {error}",
                    hint=f"is the IPFS daemon running? ipfs pin add {cid}",
                ) from error
        self._pinned.add(cid)

    async def wait(self) -> None:
        """For all that were begun."""
        await asyncio.gather(*self._tasks.values())

    async def aclose(self) -> None:
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pin_or_warn(self, cid: CID) -> None:
        try:
            await self.pin(cid)
        except AdapterError as error:
            warn(f"{error} ({error.hint})")
        finally:
            del self._tasks[cid]
