"""Which adapters this node serves, and all of them in the store: used before the engine starts,
to size it, and again in vLLM's server, to load them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from r3mes_vllm.adapters.catalog import ALL, FIRST, Catalog, Wanted
from r3mes_vllm.adapters.supply import Obtained, Supply
from r3mes_vllm.errors import AdapterError, BackendError, IpfsError, StorageFull
from r3mes_vllm.ipfs.race import Progress
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.report import warn
from r3mes_vllm.settings import Settings
from r3mes_vllm.wire import Lora


@dataclass(frozen=True)
class Named:
    name: str
    adapter: Obtained
    listed: bool
    """As in `Wanted`."""


async def obtain_all(
    settings: Settings,
    supply: Supply,
    *,
    progress: Callable[[str, Progress], None] | None = None,
) -> list[Named]:
    """The adapters to serve, fetched, vetted and held, in the order they were named; none where it
    is the base model alone.

    One that can't be had is a warning: the node serves what it has. Raises UnknownAdapter,
    BadCID or ConfigError for an item that means nothing.
    """
    if settings.base_only:
        return []
    catalog = Catalog(settings.state_dir, await _registry(settings))
    one_is_enough = not settings.loras and settings.lora_policy == FIRST
    wanted = catalog.choose(settings.loras, ALL if one_is_enough else settings.lora_policy)

    async def one(it: Wanted) -> Named | None:
        try:
            listed = it.listed or it.name in settings.followed
            return Named(it.name, await _obtain(supply, it, progress), listed)
        except (IpfsError, AdapterError, StorageFull) as error:
            hint = f" ({error.hint})" if error.hint else ""
            warn(f"adapter {it.name!r} is left out: {error}{hint}")
        except OSError as error:  # of the operator's own file, perhaps
            warn(f"adapter {it.name!r} is left out: {error.strerror}: {error.filename}")
        return None

    if one_is_enough:
        named: list[Named] = []
        for candidate in wanted:
            if found := await one(candidate):
                named = [found]
                break
    else:
        named = [it for it in await asyncio.gather(*map(one, wanted)) if it]
    for text in catalog.warnings:
        warn(text)
    for it in named:
        for text in (*it.adapter.facts.warnings, *it.adapter.facts.notes):
            warn(f"adapter {it.name!r}: {text}")
    catalog.remember({it.name: it.adapter.cid for it in named})
    return named


async def _obtain(
    supply: Supply, wanted: Wanted, progress: Callable[[str, Progress], None] | None
) -> Obtained:
    if wanted.where is None:
        return await supply.import_path(wanted.source)
    tell = (lambda it: progress(wanted.name, it)) if progress else None
    return await supply.obtain(wanted.where, progress=tell)


async def _registry(settings: Settings) -> list[Lora] | None:
    items = settings.loras
    if items and all("=" in item for item in items):
        return None  # every CID is given
    async with BackendClient.of(settings) as client:
        try:
            return await client.loras()
        except BackendError as error:
            warn(f"{error}; serving the adapters known here")
            return None
