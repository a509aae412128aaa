"""What answers when no holder of an adapter does, for names that are known: a node that loads it on
demand, a server of the operator's choice, an engine of the backend's own; in the operator's order.
"""

import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial

import httpx

from r3mes_vllm.backend.cids import canonical
from r3mes_vllm.backend.dial import Ask, Beginning, Timeouts, http_client
from r3mes_vllm.backend.elsewhere import CLIENTS_MISTAKES, Asked, Server, Substitute, Where, root_of
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.backend.local_model import LocalModel
from r3mes_vllm.backend.proxy import Source
from r3mes_vllm.backend.refusals import NodeFailed, Unavailable
from r3mes_vllm.backend.routing import loadable
from r3mes_vllm.backend.state import Backend
from r3mes_vllm.settings import Settings

log = logging.getLogger(__name__)

ON_DEMAND, URL, LOCAL = "on-demand", "url", "local"
_MOST_LOADING = 3
"""Nodes that are asked to load an adapter, for one request."""


@asynccontextmanager
async def servers(settings: Settings, timeouts: Timeouts) -> AsyncIterator[list[Server]]:
    """Those that `settings` name, as long as the context lasts. Raises ConfigError."""
    async with AsyncExitStack() as running:
        found = []
        client = await running.enter_async_context(http_client(timeouts))
        if settings.fallback_url and URL in settings.fallback:
            where = Where(root_of(settings.fallback_url), settings.fallback_key)
            model = settings.fallback_model
            found.append(Server(URL, lambda: where, client, timeouts, model=model))
        if settings.with_local_model and LOCAL in settings.fallback:
            local = LocalModel(settings.with_local_model, settings)
            await running.enter_async_context(aclosing(local))
            found.append(Server(LOCAL, lambda: local.where, client, timeouts))
        yield found


def sources(backend: Backend, asked: Asked) -> list[Source]:
    """What may answer `asked` in place of its holders, in the order of trying."""
    found: dict[str, Source] = {it.kind: partial(_elsewhere, it, asked) for it in backend.servers}
    if asked.name:
        found[ON_DEMAND] = partial(_on_demand, backend, asked.name)
    return [
        partial(_counted, backend, kind, found[kind]) for kind in backend.fallback if kind in found
    ]


async def loading(backend: Backend, name: str) -> list[KnownNode]:
    """The nodes to ask for the registry's adapter `name` although they don't hold it: always the
    same ones first, so that not all nodes load it; none that refused it just now."""
    if ON_DEMAND not in backend.fallback:
        return []
    nodes = [
        it
        for it in await loadable(backend, name)
        if (it.wallet_address, name) not in backend.would_not_load
    ]
    nodes.sort(key=lambda it: hashlib.sha256(f"{name} {it.wallet_address}".encode()).digest())
    return nodes[:_MOST_LOADING]


async def _elsewhere(server: Server, asked: Asked, ask: Ask) -> Substitute:
    return await server.begin(asked)


async def _on_demand(backend: Backend, name: str, ask: Ask) -> Beginning:
    nodes = await loading(backend, name)
    lora = await backend.registry.lora(name.partition("@")[0])
    if not nodes or lora is None:
        raise Unavailable("no node would load it")

    def is_an_answer(node: KnownNode, response: httpx.Response) -> bool:
        if response.status_code == 200:
            said = response.headers.get("x-r3mes-cid", "")
            return canonical(said) == canonical(lora.ipfs_hash)
        if response.status_code in (404, 422):  # it does not load on demand, or not this one
            backend.would_not_load.note((node.wallet_address, name))
            return False
        return response.status_code in CLIENTS_MISTAKES

    return await backend.dialler.begin(nodes, ask, is_an_answer=is_an_answer)


async def _counted(backend: Backend, kind: str, source: Source, ask: Ask) -> Beginning | Substitute:
    try:
        begun = await source(ask)
    except NodeFailed as error:
        log.warning("fallback %s: %s", kind, error)
        backend.metrics.fallback_failures.labels(kind).inc()
        raise
    backend.metrics.fallback_answers.labels(kind).inc()
    return begun
