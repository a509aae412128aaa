"""Whether the adapters can be had, and the network knows of them."""

import asyncio
import time
from collections.abc import Callable

from r3mes_vllm.adapters import inspection, shipped
from r3mes_vllm.adapters.catalog import Catalog, Wanted
from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.adapters.store import Store
from r3mes_vllm.adapters.vetting import LARGEST_RANK
from r3mes_vllm.engine.model import served_name, shape_of, targets_of
from r3mes_vllm.errors import BackendError, ConfigError, IpfsError, R3mesError, UnknownAdapter
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.http import exchange
from r3mes_vllm.ipfs.sources import BlocksSource, GatewaySource, KuboSource, Source
from r3mes_vllm.ipfs.tree import Limits
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.node.doctor.checks_engine import model_folder
from r3mes_vllm.node.doctor.findings import Finding
from r3mes_vllm.node.standing import Observer, why_no_requests
from r3mes_vllm.settings import Settings
from r3mes_vllm.wire import Lora

_BLOCK_S = 6.0
_LOOKED_AT = 8
"""Adapters of many."""
_EMPTY = CID.parse("bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku")
"""Of no bytes at all: any gateway may be asked for it."""
_WELL = "All is well"


async def registered(settings: Settings) -> Finding:
    """A node serves what the backend's registry names, unless it is told CIDs or files."""
    try:
        loras = await _listed(settings)
    except BackendError as error:
        return Finding("skip", f"the registry can't be read: {error}")
    try:
        Catalog(settings.state_dir, loras).choose(settings.loras, settings.lora_policy)
    except (UnknownAdapter, ConfigError, IpfsError) as error:
        return Finding("fail", str(error), error.hint or "r3mes-vllm serve --loras NAME=CID")
    if not loras:
        fix = "r3mes-vllm adapter publish DIRECTORY --name NAME"
        return Finding("warn", "the backend's registry has no adapter", fix)
    return Finding("ok", f"{len(loras)} in the backend's registry")


async def gateways(settings: Settings) -> Finding:
    """A gateway that is slow is overtaken; one that lies is left alone."""
    if not settings.ipfs_gateways:
        fix = "r3mes-vllm serve --ipfs-gateway https://trustless-gateway.link"
        return Finding("skip", "none is configured", fix)
    wanted = [cid for cid in (_root(it) for it in await _wanted(settings)) if cid is not None]
    asked = wanted[0] if wanted else _EMPTY
    said, failed = [], 0
    for url in settings.ipfs_gateways:
        source, began = GatewaySource(url), time.monotonic()
        trouble = await _trouble(source, asked)
        failed += trouble is not None
        said.append(f"{source.name}: {trouble or f'{(time.monotonic() - began) * 1000:.0f} ms'}")
    text = "; ".join(said)
    if failed == len(settings.ipfs_gateways):
        fix = "r3mes-vllm doctor --ipfs-gateway https://trustless-gateway.link"
        return Finding("fail", text, fix)
    return Finding("warn" if failed else "ok", text, "take the failing one out" if failed else "")


async def retrievable(settings: Settings) -> Finding:
    """What no source has can't be served."""
    wanted = (await _wanted(settings))[:_LOOKED_AT]
    sources: list[Source] = [
        *map(BlocksSource, settings.ipfs_blocks),
        KuboSource(settings.ipfs_api_url),
        *map(GatewaySource, settings.ipfs_gateways),
    ]
    missing = []
    for it in wanted:
        root = _root(it)
        if root is None or _is_here(settings, root):
            continue
        troubles = await asyncio.gather(*(_trouble(source, root) for source in sources))
        if all(troubles):
            missing.append(f"{it.name} ({root})")
    if missing:
        fix = "ipfs daemon  # or pass --ipfs-gateway URL"
        return Finding("fail", f"no source has {', '.join(missing)}", fix)
    if not wanted:
        return Finding("skip", "no adapter is chosen")
    return Finding("ok", ", ".join(it.name for it in wanted))


async def load(settings: Settings) -> Finding:
    """What vetting refuses is never loaded."""
    folder = model_folder(settings)
    base = None
    if folder:
        name = served_name(settings.model or str(folder))
        base = shape_of(str(folder), name, targets_of(settings.vllm_arguments))
    return await asyncio.to_thread(_vetted, settings, await _wanted(settings), base)


async def heartbeat(settings: Settings) -> Finding:
    """A node whose beats are not accepted gets no requests."""
    async with Observer(settings) as observer:
        reading = await observer.look()
    if reading.node is None:
        fix = f"r3mes-vllm serve --port {settings.serving_node_port}"
        return Finding("skip", f"no node to ask: {reading.trouble}", fix)
    why = why_no_requests(reading)
    if why.startswith(_WELL):
        return Finding("ok", f"accepted {reading.node['beat_age_s']:.0f} s ago")
    return Finding("fail", why, "r3mes-vllm status")


async def _listed(settings: Settings) -> list[Lora]:
    async with BackendClient.of(settings) as client:
        return await client.loras()


async def _wanted(settings: Settings) -> list[Wanted]:
    """As `serve` would choose, as far as that can be told now."""
    loras: list[Lora] | None
    try:
        loras = await _listed(settings)
    except BackendError:
        loras = None
    try:
        return Catalog(settings.state_dir, loras).choose(settings.loras, settings.lora_policy)
    except R3mesError:
        return []


def _root(wanted: Wanted) -> CID | None:
    return wanted.where.root if wanted.where else None


def _is_here(settings: Settings, root: CID) -> bool:
    if str(root) in shipped.cids().values():
        return True
    if not settings.cache_dir.is_dir():
        return False
    lease = Store(settings.cache_dir).lease(root)
    if lease:
        lease.release()
    return lease is not None


async def _trouble(source: Source, cid: CID) -> str | None:
    """Why `source` does not give that block; None if it does, and it is the right one."""
    try:
        async with asyncio.timeout(_BLOCK_S), exchange(Limits(stall_s=_BLOCK_S)) as asking:
            cid.check(await source.block(cid, asking), source.name)
    except TimeoutError:
        return f"nothing within {_BLOCK_S:g} s"
    except (IpfsError, OSError) as error:
        return str(error)[:200]
    return None


def _vetted(settings: Settings, wanted: list[Wanted], base: ModelShape | None) -> Finding:
    refused, looked_at = [], 0
    judge: Callable[..., inspection.Inspection] = inspection.inspect
    for it in wanted[:_LOOKED_AT]:
        root, lease = _root(it), None
        if root is not None:
            lease = Store(settings.cache_dir).lease(root) if settings.cache_dir.is_dir() else None
            if lease is None:
                continue
        looked_at += 1
        path = lease.path if lease else it.source
        found = judge(path, base=base, max_rank=settings.max_lora_rank or LARGEST_RANK)
        if lease:
            lease.release()
        refused += [f"{it.name}: {f.message}" for f in found.findings if f.verdict == "refused"]
    if refused:
        fix = "r3mes-vllm adapter inspect NAME"
        return Finding("fail", "; ".join(refused)[:600], fix)
    if not looked_at:
        return Finding("skip", "none is here yet: they are vetted when they are fetched")
    return Finding("ok", f"{looked_at} pass every rule")
