"""Sources racing for the blocks of a tree: whoever has a block first wins, and all are checked.

The first source streams all it has; when it is slow the next one is asked as well, block by block
from the other end.
"""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from r3mes_vllm.errors import (
    BadCAR,
    BlockMismatch,
    ContentNotFound,
    SourceBusy,
    SourceFailed,
    SourceLacks,
    SourceShaky,
)
from r3mes_vllm.ipfs.asking import Asking
from r3mes_vllm.ipfs.car import BLOCK_LIMIT, LentBlock
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.http import Exchange
from r3mes_vllm.ipfs.sources import Source
from r3mes_vllm.ipfs.tree import Tree, Way

_TICK_S = 0.25
_HEDGE_S = 1.0
"""The next source is asked too when for so long no block came, or when so much time will be
needed `_OVERTAKE` times over."""

_OVERTAKE = 5.0
_BATCH = BLOCK_LIMIT
"""Bytes of the buffers that blocks are read into: small enough for the processor's cache."""

_UNDER_WAY = 4
"""Buffers being hashed or written while one more is filled: the memory of a fetch."""

_REFUSALS = 5
"""In a row, after which a busy source is not waited for."""

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    bytes_verified: int
    """Of the files."""
    bytes_declared: int | None
    """None until the first block of a file is here; it grows with each file."""
    source: str
    """That gave the last block."""
    waited_s: float
    """Since the last block."""


class OnThread:
    """Calls on one thread, in their order."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread

    async def __call__(self, call: Callable[..., T], *args: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, call, *args)


class Race:
    def __init__(
        self,
        tree: Tree,
        exchange: Exchange,
        in_tree: OnThread,
        in_hash: OnThread,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._tree = tree
        self._exchange = exchange
        self._limits = exchange.limits
        self._in_tree = in_tree
        self._in_hash = in_hash
        self._progress = progress
        self._working: dict[asyncio.Task[None], Source] = {}
        self._said: dict[str, str] = {}
        self._lie: BlockMismatch | None = None
        self._claimed: dict[CID, int] = {}
        self._ended: list[tuple[Source, int]] = []
        """Sources that had no more to give, and how much was here when they ended."""
        self._used = 0
        self._wasted: defaultdict[str, float] = defaultdict(float)
        """By source: blocks that came without one of use, in shares of what the limits allow."""
        self._news = asyncio.Event()
        self._asking = 0
        """Requests under way, of all sources."""
        self._began = self._last_block = self._last_start = time.monotonic()
        self._last_source = ""

    @property
    def said(self) -> str:
        """What the sources answered that did not help."""
        return "; ".join(self._said.values())

    async def complete(self, sources: Sequence[Source]) -> None:
        """Ask until nothing is wanted. Raises the last lie or ContentNotFound."""
        waiting = list(sources)
        try:
            while not self._tree.complete:
                self._reap(waiting)
                if not self._working and not waiting:
                    # What came since they ended may link to what they have.
                    waiting += [source for source, used in self._ended if used < self._used]
                    self._ended = [it for it in self._ended if it[0] not in waiting]
                if (not self._working or self._slow()) and not self._start_next(waiting):
                    self._give_up_if_hopeless(waiting)
                if self._working:
                    await asyncio.wait(
                        self._working, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED
                    )
                else:
                    await asyncio.sleep(_TICK_S)
                self._tell()
        finally:
            for task in self._working:
                task.cancel()
            await asyncio.gather(*self._working, return_exceptions=True)
        self._tell()

    def _reap(self, waiting: list[Source]) -> None:
        for task in [task for task in self._working if task.done()]:
            source = self._working.pop(task)
            try:
                task.result()
            except BlockMismatch as error:
                source.standing.lied()
                self._lie = error
                self._said[source.name] = str(error)
            except SourceBusy as error:
                source.standing.busy(error.retry_after)
                self._said[source.name] = str(error)
                waiting.append(source)
            except (SourceFailed, BadCAR) as error:
                self._said[source.name] = str(error)
                self._ended.append((source, self._used))
            else:
                self._said.setdefault(source.name, f"{source.name} does not have all of it")
                self._ended.append((source, self._used))

    def _start_next(self, waiting: list[Source]) -> bool:
        ready = next((it for it in waiting if not it.standing.wait_s), None)
        if ready is None:
            return False
        waiting.remove(ready)
        self._working[asyncio.create_task(self._ask(ready))] = ready
        self._last_start = time.monotonic()
        return True

    def _slow(self) -> bool:
        now = time.monotonic()
        if now - self._last_start < _HEDGE_S:
            return False
        if now - self._last_block > _HEDGE_S or not self._tree.placed:
            return True
        rate = self._tree.placed / (now - self._began)
        return (self._tree.declared - self._tree.placed) / rate > _OVERTAKE

    def _give_up_if_hopeless(self, waiting: Sequence[Source]) -> None:
        """Nobody is at work, and nobody may be asked soon."""
        if self._working:
            return
        patient = [it.standing for it in waiting if it.standing.refusals < _REFUSALS]
        pauses = [standing.wait_s for standing in patient]
        if pauses and min(pauses) <= self._limits.stall_s:
            return
        for source in waiting:
            wait, reason = source.standing.wait_s, source.standing.reason
            self._said.setdefault(
                source.name, f"{source.name} is left alone for {wait:.0f} s: {reason}"
            )
        said = self.said or "there is no source to ask"
        if self._lie is not None:
            raise BlockMismatch(f"{self._tree.root}: {said}") from self._lie
        missing = next(iter(self._tree.wanted), self._tree.root)
        raise ContentNotFound(
            f"nobody offered {missing}, asked for {time.monotonic() - self._began:.0f} s: {said}",
            hint="is the publisher online? Another gateway: --ipfs-gateway URL",
        )

    def _tell(self) -> None:
        if self._progress:
            tree = self._tree
            waited = time.monotonic() - self._last_block
            self._progress(Progress(tree.placed, tree.declared or None, self._last_source, waited))

    async def _ask(self, source: Source) -> None:
        """All that one source has: a CAR if nothing is here yet, then block by block."""
        asking = Asking(source, self._limits.stall_s)
        if self._tree.root in self._tree.wanted and not isinstance(self._tree, Way):
            try:
                await self._stream(source)
            except SourceBusy:
                raise
            except (SourceFailed, BadCAR) as error:
                # It may have ended early, or not know CARs: the rest is asked for by name.
                self._said[source.name] = str(error)
                asking.cars = not isinstance(error, SourceLacks)
            asking.since = time.monotonic()
        await _all(self._by_name(asking) for _ in range(source.at_once))
        if asking.busy is not None:
            raise asking.busy

    async def _stream(self, source: Source) -> None:
        """Receiving, hashing and writing go on at the same time, a buffer each."""
        under_way: deque[asyncio.Task[int]] = deque()
        free: list[memoryview] = []
        failure: SourceFailed | BadCAR | None = None
        self._asking += 1
        try:
            try:
                async with source.car(self._tree.root, self._exchange) as fill:
                    while True:
                        buffer = free.pop() if free else memoryview(bytearray(_BATCH))
                        patience_s = _TICK_S if self._tree.placed else 0.0
                        if not (blocks := await fill(buffer, patience_s)):
                            break
                        under_way.append(asyncio.create_task(self._take(source, blocks)))
                        under_way[-1].add_done_callback(partial(_give_back, free, buffer))
                        if len(under_way) < _UNDER_WAY:
                            continue
                        if not await under_way.popleft() and len(self._working) > 1:
                            return  # another brings the same: ask for what is missing
            except (SourceFailed, BadCAR) as error:
                failure = error  # after what came before it
            while under_way:
                await under_way.popleft()
            if failure is not None:
                raise failure
        finally:
            await asyncio.gather(*under_way, return_exceptions=True)
            self._asking -= 1
            self._wake()

    async def _by_name(self, asking: Asking) -> None:
        """Block by block, until there is nothing left that this source could be asked for."""
        # Nothing is wanted for a moment, too, while a node is read that links to more.
        while not self._tree.complete and asking.busy is None:
            if asking.full:
                await self._news.wait()
                continue
            # While another is at work, from the far end.
            cid = asking.pick(self._tree.wanted, self._claimed, from_start=len(self._working) == 1)
            if cid is None:
                if not self._asking:
                    return
                await self._news.wait()
                continue
            self._asking += 1
            try:
                await self._ask_for(asking, cid)
            finally:
                self._asking -= 1
                self._wake()

    async def _ask_for(self, asking: Asking, cid: CID) -> None:
        """Raises SourceFailed and BadCAR when the source is asked no more."""
        asking.times[cid] = asking.times.get(cid, 0) + 1
        self._claimed[cid] = self._claimed.get(cid, 0) + 1
        asking.under_way += 1
        try:
            await self._get(asking, cid)
        except SourceBusy as error:
            asking.refused(error)  # those under way may still come
            return
        except (SourceFailed, BadCAR) as error:
            failure = error
        else:
            asking.gave()
            return
        finally:
            asking.under_way -= 1
            self._claimed[cid] -= 1
        if not isinstance(failure, SourceLacks):
            self._said[asking.source.name] = str(failure)
        self._said.setdefault(asking.source.name, str(failure))
        if asking.busy is not None:
            return
        if isinstance(failure, SourceShaky):
            await self._pause(asking, cid, failure)
        elif asking.failed():
            raise failure

    async def _pause(self, asking: Asking, cid: CID, failure: SourceShaky) -> None:
        """Others may be asked for the block meanwhile."""
        pause_s = asking.shaken(cid, failure)
        if pause_s is None:
            raise failure
        self._wake()
        asking.pausing += 1
        try:
            await asyncio.sleep(pause_s)
        finally:
            asking.pausing -= 1

    async def _get(self, asking: Asking, cid: CID) -> None:
        source = asking.source
        if asking.raw is not False:
            try:
                block = cid, await source.block(cid, self._exchange)
            except SourceLacks:
                if asking.raw or not asking.cars:
                    raise
            else:
                asking.raw = True
                await self._take(source, [block])
                return
        try:
            await self._get_in_car(source, cid)
        except SourceLacks as error:
            asking.cars = error.answered == 404
            raise
        asking.raw = False

    async def _get_in_car(self, source: Source, cid: CID) -> None:
        """For those that give nothing but CARs; what else is in it is read while it is of use."""
        buffer, wanted = memoryview(bytearray(_BATCH)), self._tree.wanted
        async with source.car(cid, self._exchange, alone=True) as fill:
            while blocks := await fill(buffer, 0.0):
                if not await self._take(source, blocks) and cid not in wanted:
                    return
        if cid in wanted:
            raise SourceFailed(f"{source.name} does not have {cid}")

    async def _take(self, source: Source, blocks: Sequence[LentBlock]) -> int:
        """How many of them were of use. Raises BlockMismatch, after those before the lie."""
        checked = await self._in_hash(_check, blocks, source.name)
        source.standing.gave(sum(len(data) for _, data in checked.sound))
        used = await self._in_tree(self._tree.offer, checked.sound)
        if checked.lie is not None:
            raise checked.lie
        self._used += used
        if used:
            self._last_block, self._last_source = time.monotonic(), source.name
            source.standing.useful()
        else:
            self._count_waste(source, blocks)
        self._wake()
        return used

    def _count_waste(self, source: Source, blocks: Sequence[LentBlock]) -> None:
        """Raises SourceFailed when it is as much as a tree may hold."""
        came = sum(len(data) for _, data in blocks)
        share = len(blocks) / self._limits.blocks + came / self._limits.bytes
        self._wasted[source.name] += share
        if self._wasted[source.name] > 1:
            raise SourceFailed(f"{source.name} sends what nobody asked for")

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _give_back(free: list[memoryview], buffer: memoryview, _: object) -> None:
    free.append(buffer)


@dataclass(frozen=True)
class _Checked:
    sound: Sequence[LentBlock]
    lie: BlockMismatch | None


def _check(blocks: Sequence[LentBlock], source: str) -> _Checked:
    """The blocks before the first that is not what its CID says: the only way into the tree."""
    for at, (cid, data) in enumerate(blocks):
        try:
            cid.check(data, source)
        except BlockMismatch as error:
            return _Checked(blocks[:at], error)
    return _Checked(blocks, None)


async def _all(calls: Iterable[Coroutine[None, None, None]]) -> None:
    """Run them at once; the first failure ends the others and is raised."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
