"""Fetch what a CID names: ask sources one after the other, keep what verifies, prove completeness.

A 200 and a clean end mean nothing: an export of a missing CID is both. Only the walk from the
root over verified blocks says that all is here. Blocks that were kept stay, so that an interrupted
fetch goes on where it was.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from r3mes_vllm.errors import BadCAR, BlockMismatch, ContentNotFound, ContentTooLarge, SourceFailed
from r3mes_vllm.ipfs import tree
from r3mes_vllm.ipfs.blockstore import BlockStore
from r3mes_vllm.ipfs.cid import CID, DAG_PB
from r3mes_vllm.ipfs.sources import Source
from r3mes_vllm.ipfs.tree import Limits
from r3mes_vllm.ipfs.unixfs import read

_AT_ONCE = 8
_WAITING_LIMIT = 32 << 20
"""Bytes of a CAR that came before the block that links to them."""


@dataclass(frozen=True)
class Progress:
    bytes_verified: int
    bytes_declared: int | None
    source: str


async def fetch(
    root: CID,
    into: Path,
    *,
    blocks: BlockStore,
    sources: Sequence[Source],
    limits: Limits | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Fetch the tree under `root` to `into`: a new directory, or a file if the root is one.

    Raises ContentNotFound with what each source said, BlockMismatch when a source lied and no
    other had the rest, BadDAG and ContentTooLarge for what is not worth having.
    """
    limits = limits or Limits()
    one = _Fetch(root, blocks, limits, progress)
    try:
        async with asyncio.timeout(limits.total_s):
            await one.complete(sources)
    except TimeoutError as error:
        raise ContentNotFound(
            f"{root} did not come within {limits.total_s:.0f} s",
            hint="try again: the verified blocks are kept",
        ) from error
    await asyncio.to_thread(tree.write, root, into, blocks, limits)


class _Fetch:
    def __init__(
        self,
        root: CID,
        blocks: BlockStore,
        limits: Limits,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._root = root
        self._blocks = blocks
        self._limits = limits
        self._progress = progress
        self._verified = 0
        self._declared: int | None = None

    async def complete(self, sources: Sequence[Source]) -> None:
        """Ask until nothing is missing. Raises the last lie or ContentNotFound."""
        began = time.monotonic()
        said: list[str] = []
        lie: BlockMismatch | None = None
        for source in sources:
            if not await self._missing():
                return
            try:
                await self._from(source)
            except BlockMismatch as error:
                lie = error
                said.append(str(error))
            except (SourceFailed, BadCAR) as error:
                said.append(str(error))
        if not (missing := await self._missing()):
            return
        if lie is not None:
            raise BlockMismatch(f"{self._root}: {'; '.join(said)}") from lie
        seconds = time.monotonic() - began
        raise ContentNotFound(
            f"nobody offered {missing[0]}, asked for {seconds:.0f} s: {'; '.join(said)}",
            hint="is the publisher online? Another gateway: --ipfs-gateway URL",
        )

    async def _missing(self) -> tuple[CID, ...]:
        found = await asyncio.to_thread(tree.survey, self._root, self._blocks, self._limits)
        self._declared = found.declared or None
        return found.missing

    async def _from(self, source: Source) -> None:
        """All that one source has: a CAR if nothing is here yet, then block by block."""
        if self._blocks.get(self._root) is None:
            try:
                await self._car(source)
            except BlockMismatch:
                raise
            except (SourceFailed, BadCAR):
                if not self._verified:
                    raise
                # It ended early: the rest is asked for by name.
        while missing := await self._missing():
            for at in range(0, len(missing), _AT_ONCE):
                await _all(self._block(source, cid) for cid in missing[at : at + _AT_ONCE])

    async def _car(self, source: Source) -> None:
        """Keep the blocks of the tree; what nothing links to is dropped with the stream."""
        wanted = {self._root}
        waiting: dict[CID, bytes] = {}
        room, unwanted = _WAITING_LIMIT, 0
        async with aclosing(source.car(self._root)) as stream:
            async for cid, data in stream:
                if cid not in wanted:
                    unwanted += len(data) + 1
                    if unwanted > _WAITING_LIMIT + self._limits.bytes:
                        raise SourceFailed(f"{source.name} sends what nobody asked for")
                    if cid not in waiting and len(data) <= room:
                        waiting[cid] = data
                        room -= len(data)
                    continue
                ready = [(cid, data)]
                while ready:
                    cid, data = ready.pop()
                    wanted.discard(cid)
                    await self._keep(source, cid, data)
                    if cid.codec != DAG_PB:
                        continue
                    for link in read(cid, data).links:
                        if (early := waiting.pop(link.cid, None)) is not None:
                            room += len(early)
                            ready.append((link.cid, early))
                        elif not self._blocks.has(link.cid):
                            wanted.add(link.cid)

    async def _block(self, source: Source, cid: CID) -> None:
        await self._keep(source, cid, await source.block(cid))

    async def _keep(self, source: Source, cid: CID, data: bytes) -> None:
        self._verified += len(data)
        if self._verified > self._limits.bytes + (self._limits.bytes >> 4) + (1 << 20):
            raise ContentTooLarge(f"{self._root} is over {self._limits.bytes} bytes")
        await asyncio.to_thread(self._blocks.keep, cid, data)
        if self._progress:
            self._progress(Progress(self._verified, self._declared, source.name))


async def _all(calls: Iterable[Coroutine[None, None, None]]) -> None:
    """Run them at once; the first failure ends the others and is raised."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
