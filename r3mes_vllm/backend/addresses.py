"""Checked addresses of nodes' hosts, kept between requests.

Who can't be looked up now is dialled at the address that was checked last: a resolver that fails or
is slow makes no node unreachable, nor does a name whose own server keeps it waiting.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from r3mes_vllm.backend.endpoints import Resolve, host_of, public_address
from r3mes_vllm.backend.refusals import BadInput, Unresolved

_FRESH_S = 10.0
_PAUSE_S = 2.0
"""In which a name that could not be looked up, and has no address, is not looked up again."""
_SLOW_S = 0.5
"""For so long a lookup is waited for where there is an address."""
_GOOD_S = 3600.0
_MOST = 4096


@dataclass
class _Kept:
    address: str | None
    """None while it is not known."""
    found: float
    fresh_until: float


class Addresses:
    """Close it with `aclose`."""

    def __init__(self, resolve: Resolve, clock: Callable[[], float] = time.monotonic) -> None:
        self._resolve = resolve
        self._clock = clock
        self._kept = OrderedDict[str, _Kept]()
        self._looking: dict[str, asyncio.Task[str]] = {}

    async def aclose(self) -> None:
        tasks = list(self._looking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def of(self, url: httpx.URL) -> str:
        """That of `url`'s host. Raises Unresolved if it can't be had now, and BadInput as
        `public_address` does."""
        host, now = host_of(url), self._clock()
        kept = self._kept.get(host)
        if kept and now >= kept.found + _GOOD_S:
            kept = None
        if kept and now < kept.fresh_until:
            if kept.address is None:
                raise Unresolved(f"{host} could not be looked up just now")
            return kept.address
        good = kept.address if kept else None
        try:
            async with asyncio.timeout(_SLOW_S if good else None):
                return await asyncio.shield(self._look(url, host))
        except (TimeoutError, Unresolved):
            if good is None:
                self._keep(host, _Kept(None, now, self._clock() + _PAUSE_S))
                raise
            if kept:
                kept.fresh_until = self._clock() + _FRESH_S
            return good

    def _look(self, url: httpx.URL, host: str) -> asyncio.Task[str]:
        """One at a time for each host, whoever waits for it."""
        task = self._looking.get(host)
        if task is None:
            task = self._looking[host] = asyncio.create_task(self._found(url, host), name="lookup")
            task.add_done_callback(lambda it: self._looked(host, it))
        return task

    def _looked(self, host: str, task: asyncio.Task[str]) -> None:
        del self._looking[host]
        if not task.cancelled():
            task.exception()  # perhaps nobody waits for it any more

    async def _found(self, url: httpx.URL, host: str) -> str:
        try:
            address = await public_address(url, self._resolve)
        except Unresolved:
            raise
        except BadInput:
            self._kept.pop(host, None)
            raise
        now = self._clock()
        self._keep(host, _Kept(address, now, now + _FRESH_S))
        return address

    def _keep(self, host: str, kept: _Kept) -> None:
        self._kept[host] = kept
        self._kept.move_to_end(host)
        if len(self._kept) > _MOST:
            self._kept.popitem(last=False)
