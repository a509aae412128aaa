"""Nodes that will not come back: a container without a volume has a new key, and so a new wallet,
each time it starts, and nobody tells of the old one.

What a row protects from is over by then: a captured request is refused by its time, and a wallet
that is derived from a key stays that key's. Another wallet is free again.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from r3mes_vllm.backend.refusals import DatabaseDown
from r3mes_vllm.backend.registry import Registry

log = logging.getLogger(__name__)

UNPROVEN_AFTER = timedelta(days=1)
"""Whoever never proved to live at its URL: anyone can register those."""
_EVERY_S = 3600.0
"""The first time after as long: nodes can't beat while the backend is away."""


async def forget(registry: Registry, now: datetime, after: timedelta) -> int:
    """Forget the nodes that have been silent for `after`, and those that have proved nothing after
    a day. Returns how many. Raises DatabaseDown."""
    return await registry.forget_nodes(now - after, now - min(after, UNPROVEN_AFTER))


@asynccontextmanager
async def forgetting(
    registry: Registry, clock: Callable[[], datetime], after: timedelta, every_s: float = _EVERY_S
) -> AsyncIterator[None]:
    """Again and again, until the context ends."""

    async def again_and_again() -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                if count := await forget(registry, clock(), after):
                    log.warning("%d nodes that were silent for long are forgotten", count)
            except DatabaseDown as error:
                log.warning("no node is forgotten now: %r", error)
            except Exception:
                log.exception("no node is forgotten now")

    task = asyncio.create_task(again_and_again(), name="forgetting")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
