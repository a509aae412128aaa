"""From a name to the nodes that can answer it."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from r3mes_vllm.backend.cids import is_cid
from r3mes_vllm.backend.state import Backend
from r3mes_vllm.errors import AdapterNotReady, UnknownAdapter
from r3mes_vllm.wire import AdapterName, Node

_NAME = TypeAdapter(AdapterName)
_RETRY_AFTER_S = 10


@dataclass(frozen=True)
class Served:
    """An adapter that has a live holder; `cid` and `base_model` are None if nobody says."""

    name: str
    cid: str | None
    base_model: str | None
    created: int
    """Seconds since the epoch; 0 if the registry doesn't know the adapter."""


async def holders(backend: Backend, asked: str) -> list[Node]:
    """The nodes to try, in order, for the adapter `asked`: a name or `NAME@CID`.

    Raises UnknownAdapter, or AdapterNotReady if no holder is alive.
    """
    name, at, wanted = asked.partition("@")
    if not _is_name(name) or (at and not is_cid(wanted)):
        raise _unknown(asked)
    lora = await backend.registry.lora(name)
    cid = wanted or (lora.ipfs_hash if lora else None)
    nodes = await backend.live_nodes()
    found = backend.balancer.holders(nodes, name, cid, exact=bool(wanted))
    if found:
        return found
    if lora is None and not await _ever_listed(backend, name):
        raise _unknown(asked)
    if any(name in node.available_lora_list for node in nodes):
        reason = "each node that lists it holds another version or can't be reached"
    else:
        reason = "no node that holds it is alive"
    raise AdapterNotReady(
        f"adapter {asked[:300]!r} can't be served now: {reason}", retry_after=_RETRY_AFTER_S
    )


async def model_nodes(backend: Backend, model: str) -> list[Node]:
    """The nodes to try for an OpenAI `model`: an adapter, `NAME@CID` or a base model.

    Raises UnknownAdapter or AdapterNotReady.
    """
    try:
        return await holders(backend, model)
    except UnknownAdapter:
        nodes = [node for node in await backend.live_nodes() if node.base_model == model]
        found = backend.balancer.routable(nodes)
        if found:
            return found
        if any(node.base_model == model for node in await backend.registry.all_nodes()):
            raise AdapterNotReady(
                f"no node with the base model {model[:300]!r} is alive",
                retry_after=_RETRY_AFTER_S,
            ) from None
        raise


async def any_nodes(backend: Backend) -> list[Node]:
    """All live nodes, in random order. Raises AdapterNotReady if there are none."""
    found = backend.balancer.routable(await backend.live_nodes())
    if not found:
        raise AdapterNotReady(
            "no node is alive",
            retry_after=_RETRY_AFTER_S,
            hint="start one: r3mes-vllm serve --backend-url URL-of-this-backend",
        )
    return found


async def served(backend: Backend) -> list[Served]:
    """Every adapter that has a live holder, by name."""
    nodes = await backend.live_nodes()
    registered = {lora.name: lora for lora in await backend.registry.loras()}
    listing: dict[str, list[Node]] = {}
    for node in backend.balancer.routable(nodes):
        for name in node.available_lora_list:
            listing.setdefault(name, []).append(node)
    found = []
    for name in filter(_is_name, sorted(listing)):
        lora = registered.get(name)
        cid = lora.ipfs_hash if lora else None
        able = backend.balancer.holders(listing[name], name, cid)
        if not able:
            continue
        said = sorted({node.adapters[name] for node in able if name in node.adapters})
        bases = sorted({node.base_model for node in able if node.base_model})
        created = int(lora.created_at.timestamp()) if lora and lora.created_at else 0
        found.append(Served(name, cid or next(iter(said), None), next(iter(bases), None), created))
    return found


def base_models(nodes: Sequence[Node]) -> list[str]:
    return sorted({node.base_model for node in nodes if node.base_model})


async def _ever_listed(backend: Backend, name: str) -> bool:
    nodes = await backend.registry.all_nodes()
    return any(name in node.available_lora_list for node in nodes)


def _is_name(text: str) -> bool:
    try:
        _NAME.validate_python(text)
    except ValidationError:
        return False
    return True


def _unknown(asked: str) -> UnknownAdapter:
    return UnknownAdapter(
        f"nobody knows an adapter or model {asked[:300]!r}", hint="GET /v1/models lists them"
    )
