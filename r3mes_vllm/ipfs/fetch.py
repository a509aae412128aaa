"""Fetch what a CID names from several sources at once, check every block, prove completeness.

A 200 and a clean end mean nothing: an export of a missing CID is both. Only a tree in which
nothing is wanted any more is complete.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from r3mes_vllm.errors import ContentNotFound
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.disk import disk_errors_are_said
from r3mes_vllm.ipfs.http import exchange
from r3mes_vllm.ipfs.own_loop import in_own_loop
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.ipfs.race import OnThread, Progress, Race
from r3mes_vllm.ipfs.sources import Source
from r3mes_vllm.ipfs.tree import Limits, Tree, Way

T = TypeVar("T")
TreeT = TypeVar("TreeT", bound=Tree)


async def fetch(
    root: CID,
    folder: Path,
    *,
    sources: Sequence[Source],
    limits: Limits | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Fetch the tree under `root`; its directory, or its file if the root is one.

    `folder` keeps what came, also of a fetch that failed or was killed, so that the next goes on
    there. `progress` is called from another thread, four times a second.

    Raises ContentNotFound with what each source said, BlockMismatch when one lied and no other
    had the rest, BadDAG and ContentTooLarge for what is not worth having, StorageFull, and
    AdapterError when the disk fails otherwise.
    """
    limits = limits or Limits()
    with disk_errors_are_said(folder):
        return await in_own_loop(
            lambda: _grow(
                lambda: Tree(root, folder, limits), Tree.finish, sources, limits, progress
            ),
            name="r3mes-fetch",
        )


async def resolve(
    path: IpfsPath, folder: Path, *, sources: Sequence[Source], limits: Limits | None = None
) -> CID:
    """The CID at the end of `path`, with `folder` as in `fetch`. Raises what `fetch` raises."""
    limits = limits or Limits()
    if not path.names:
        return path.root
    with disk_errors_are_said(folder):
        return await in_own_loop(
            lambda: _grow(
                lambda: Way(path.root, path.names, folder, limits),
                Way.found,
                sources,
                limits,
                None,
            ),
            name="r3mes-resolve",
        )


async def _grow(
    plant: Callable[[], TreeT],
    result: Callable[[TreeT], T],
    sources: Sequence[Source],
    limits: Limits,
    progress: Callable[[Progress], None] | None,
) -> T:
    with (
        ThreadPoolExecutor(1, "r3mes-tree") as tree_thread,
        ThreadPoolExecutor(1, "r3mes-hash") as hash_thread,
    ):
        in_tree = OnThread(tree_thread)
        tree = await in_tree(plant)
        try:
            async with exchange(limits) as connections:
                one = Race(tree, connections, in_tree, OnThread(hash_thread), progress)
                try:
                    async with asyncio.timeout(limits.total_s):
                        await one.complete(sources)
                except TimeoutError as error:
                    said = f": {one.said}" if one.said else ""
                    raise ContentNotFound(
                        f"{tree.root} did not come within {limits.total_s:g} s{said}",
                        hint="try again: the verified blocks are kept",
                    ) from error
            return await in_tree(result, tree)
        finally:
            await in_tree(tree.close)
