"""From a name to the nodes that can answer it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter, ValidationError

from r3mes_vllm.backend.balancer import parted
from r3mes_vllm.backend.cids import canonical, is_cid
from r3mes_vllm.backend.known import KnownLora, KnownNode
from r3mes_vllm.backend.state import Backend
from r3mes_vllm.errors import AdapterNotReady, UnknownAdapter
from r3mes_vllm.wire import AdapterName

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


async def holders(
    backend: Backend, asked: str, *, conversation: str | None = None
) -> list[KnownNode]:
    """The nodes to try, in order, for the adapter `asked`: a name or `NAME@CID`. All hold the same
    CID, as far as they say.

    Raises UnknownAdapter, or AdapterNotReady if no holder is alive.
    """
    name, at, wanted = asked.partition("@")
    if not _is_name(name) or (at and not is_cid(wanted)):
        raise _unknown(asked)
    if backend.registry.is_deactivated(name):
        raise UnknownAdapter(f"the adapter {name} was taken out of the registry")
    lora = await backend.registry.lora(name)
    nodes = await _live(backend, lambda node: True, listing=name)
    for cid, exact in [(wanted, True)] if wanted else _versions(lora):
        found = backend.balancer.holders(nodes, name, cid, exact=exact, conversation=conversation)
        if found:
            return found
    if lora is None and not await _ever_listed(backend, name):
        raise _unknown(asked)
    if nodes:
        reason = "each node that lists it holds another version or can't be reached"
    else:
        reason = "no node that holds it is alive"
    raise AdapterNotReady(
        f"adapter {asked[:300]!r} can't be served now: {reason}", retry_after=_RETRY_AFTER_S
    )


async def loadable(backend: Backend, asked: str) -> list[KnownNode]:
    """The nodes of ours that may hold the adapter `asked` once they are asked for it: the registry
    must have it, in that version. One that lists it holds another."""
    name, _, wanted = asked.partition("@")
    lora = await backend.registry.lora(name)
    if lora is None or canonical(wanted or lora.ipfs_hash) != canonical(lora.ipfs_hash):
        return []
    base_model = lora.base_model

    def is_able(node: KnownNode) -> bool:
        listed = name in node.names
        return node.version is not None and not listed and _fits(node.base_model, base_model)

    return backend.balancer.routable(await _live(backend, is_able))


async def model_nodes(
    backend: Backend, model: str, *, conversation: str | None = None
) -> list[KnownNode]:
    """The nodes to try for an OpenAI `model`: an adapter, `NAME@CID` or a base model. A name that
    is a base model's is an adapter's only where that is registered: any node may list any name.

    Raises UnknownAdapter or AdapterNotReady.
    """
    if not backend.registry.is_registered(model):
        bases = [node for node in await _routed(backend) if node.base_model == model]
        if bases:
            return backend.balancer.order(bases, conversation=conversation)
    try:
        return await holders(backend, model, conversation=conversation)
    except UnknownAdapter:
        nodes = await _live(backend, lambda node: node.base_model == model)
        if found := backend.balancer.routable(nodes):
            return backend.balancer.order(found, conversation=conversation)
        if any(node.base_model == model for node in await backend.registry.all_nodes()):
            raise AdapterNotReady(
                f"no node with the base model {model[:300]!r} is alive",
                retry_after=_RETRY_AFTER_S,
            ) from None
        raise


async def any_nodes(backend: Backend, *, conversation: str | None = None) -> list[KnownNode]:
    """All live nodes, in the order of trying. Raises AdapterNotReady if there are none."""
    found = backend.balancer.routable(await _live(backend, lambda node: True))
    if not found:
        raise AdapterNotReady(
            "no node is alive",
            retry_after=_RETRY_AFTER_S,
            hint="start one: r3mes-vllm serve --backend-url URL-of-this-backend",
        )
    return backend.balancer.order(found, conversation=conversation)


async def served(backend: Backend) -> list[Served]:
    """Every adapter that has a live holder, by name; in a large network as of a moment ago."""
    return _served(backend, await _routed(backend))


async def served_version(backend: Backend, asked: str) -> Served | None:
    """The adapter of `NAME@CID` in that version, if a live node says that it holds it."""
    name, _, wanted = asked.partition("@")
    if not is_cid(wanted):
        return None
    listing = [node for node in await _routed(backend) if name in node.names]
    return _serving(backend, name, listing, wanted=wanted)


class Servable(Sequence[str]):
    """The names of what is `served`. Whether one of them is among them is found at once."""

    def __init__(self, backend: Backend, nodes: Sequence[KnownNode]) -> None:
        self._backend = backend
        self._nodes = nodes

    @classmethod
    async def now(cls, backend: Backend) -> "Servable":
        return cls(backend, await _routed(backend))

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        listing = [node for node in self._nodes if name in node.names]
        return _serving(self._backend, name, listing) is not None

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        return self._names[index]

    @cached_property
    def _names(self) -> list[str]:
        return [adapter.name for adapter in _served(self._backend, self._nodes)]


async def base_models(backend: Backend) -> list[str]:
    """Those of nodes that may be asked, without what is registered as an adapter."""
    found = {node.base_model for node in await _routed(backend) if node.base_model}
    return sorted(base for base in found if not backend.registry.is_registered(base))


async def _routed(backend: Backend) -> list[KnownNode]:
    return backend.balancer.routable(await backend.live_nodes())


def _served(backend: Backend, nodes: Sequence[KnownNode]) -> list[Served]:
    def look() -> list[Served]:
        listing: dict[str, list[KnownNode]] = {}
        for node in nodes:
            for name in node.names:
                listing.setdefault(name, []).append(node)
        found = (_serving(backend, name, listing[name]) for name in sorted(listing))
        return [it for it in found if it]

    found: list[Served] = backend.lately_served.get(look)
    return found


def _serving(
    backend: Backend, name: str, listing: Sequence[KnownNode], *, wanted: str | None = None
) -> Served | None:
    """The adapter `name`, if one of the nodes that list it holds it, in the version `wanted`; those
    may all be asked."""
    if not listing or backend.registry.is_deactivated(name) or not _is_name(name):
        return None
    lora = backend.registry.lora_now(name)
    for cid, exact in [(wanted, True)] if wanted else _versions(lora):
        sure, unsure = parted(listing, name, cid, exact=exact)
        if able := sure + unsure:
            break
    else:
        return None
    said = (
        None if cid else min((n.adapters[name] for n in able if name in n.adapters), default=None)
    )
    base = min((node.base_model for node in able if node.base_model), default=None)
    created = int(lora.created_at.timestamp()) if lora and lora.created_at else 0
    return Served(name, cid or said, base, created)


def _versions(lora: KnownLora | None) -> list[tuple[str | None, bool]]:
    """The CIDs that a bare name may be answered by, in the order of trying, and whether a node must
    say that it holds that one: while none holds the registry's, the latest before it goes on."""
    if lora is None:
        return [(None, False)]
    return [(lora.ipfs_hash, False), *((cid, True) for cid in lora.earlier)]


async def _live(
    backend: Backend, wanted: Callable[[KnownNode], bool], *, listing: str | None = None
) -> list[KnownNode]:
    """The live nodes that are `wanted`, and list that adapter if one is named. If none of them may
    be used, but one is new, this waits until the new ones have been asked for a proof of their
    URL."""
    nodes = [node for node in await backend.live_nodes(listing=listing) if wanted(node)]
    if any(node.usable for node in nodes) or not await backend.prover.settle(nodes):
        return nodes
    return [node for node in await backend.live_nodes(listing=listing) if wanted(node)]


async def _ever_listed(backend: Backend, name: str) -> bool:
    nodes = await backend.registry.all_nodes()
    return any(name in node.names for node in nodes)


def _fits(model: str | None, other: str | None) -> bool:
    """Whether the two may be the same base model: a node that has it in a folder tells the folder's
    name alone."""
    last = [name.rpartition("/")[2].lower() for name in (model or "", other or "")]
    return not all(last) or last[0] == last[1]


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
