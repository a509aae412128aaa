"""Nodes, adapters and models as the dashboard shows them: text, of what anyone may know.

Most of it is what strangers say of themselves: names, descriptions, versions, reasons. Whoever
renders it must escape it.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import get_args

from r3mes_vllm import wire
from r3mes_vllm.backend.cids import canonical
from r3mes_vllm.backend.dashboard import health
from r3mes_vllm.backend.dashboard.health import Health, State, duration
from r3mes_vllm.backend.dashboard.history import History
from r3mes_vllm.backend.dashboard.traffic import Traffic
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.backend.routing import Served, base_models, served
from r3mes_vllm.backend.state import Backend

NODES = 200
"""Shown; those that are gone are left out first."""
ADAPTERS = 500
SHOWN_FOR = timedelta(days=1)
"""After its last beat a node is shown, as in the list of nodes at its widest."""

_CHARACTERS = 300
"""Of a description."""
_NAMES = 30
"""Of adapters in one node's line."""

_FRESH_S = 1.0
_SHARE = 20
"""At most one part in so many of the time goes into looking."""
_OLD_S = 30.0


@dataclass(frozen=True)
class NodeLine:
    key: str
    name: str
    endpoint: str
    health: str
    reason: str
    load: str
    speed: str
    adapters: str
    version: str
    base: str
    beat: str


@dataclass(frozen=True)
class AdapterLine:
    key: str
    description: str
    cid: str
    short_cid: str
    copy: str
    """Name of the button that copies the CID."""
    holders: str
    others: str
    requests: str
    category: str
    base: str
    size: str
    summary: str
    versions: list[str]


@dataclass(frozen=True)
class Choice:
    """A model that the playground offers."""

    key: str
    kind: str


@dataclass(frozen=True)
class View:
    headline: str
    details: str
    at: str
    notice: str
    nodes: list[NodeLine]
    adapters: list[AdapterLine]
    choices: list[Choice]


class Latest:
    """The view of a moment ago, made anew when somebody asks and it is old, for all who ask."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._history = History()
        self._lock = asyncio.Lock()
        self._view: View | None = None
        self._forms: dict[Callable[[View], bytes], bytes] = {}
        self._until = 0.0

    async def view(self, backend: Backend) -> View:
        async with self._lock:
            began = time.monotonic()
            if self._view is None or began >= self._until:
                self._view = await look(backend, self._traffic, self._history)
                self._forms.clear()
                took = time.monotonic() - began
                self._until = began + min(max(_FRESH_S, took * _SHARE), _OLD_S)
            return self._view

    async def shown(self, backend: Backend, form: Callable[[View], bytes]) -> bytes:
        """What `form` makes of the view, made once for all who ask."""
        view = await self.view(backend)
        if form not in self._forms:
            self._forms[form] = form(view)
        return self._forms[form]


async def look(backend: Backend, traffic: Traffic, history: History) -> View:
    now, registry = backend.clock(), backend.registry
    known = [node for node in await registry.all_nodes() if now - node.last_heartbeat < SHOWN_FOR]
    alive = {node.wallet_address for node in await registry.live_nodes(now)}
    states = {
        (wallet := node.wallet_address): health.state(backend, node, now, alive=wallet in alive)
        for node in known
    }
    routed = [node for node in known if states[node.wallet_address].health == "live"]
    loras = {lora.name: lora for lora in await registry.loras()}
    answering = {it.name: it for it in await served(backend)}
    names = sorted({*loras, *answering}, key=str.casefold)
    bases = await base_models(backend)
    listing = _listing(routed)
    asked = {name: answering[name].cid for name in loras.keys() & answering.keys()}
    wrong = _other_versions(routed, {it.name: it.ipfs_hash for it in loras.values()} | asked)
    versions = await history.versions(
        registry, [loras[name] for name in names[:ADAPTERS] if name in loras]
    )
    shown = sorted(known, key=lambda node: states[node.wallet_address].is_gone)[:NODES]
    return View(
        headline=_headline(states.values()),
        details=_details(states.values(), len(names), len(bases)),
        at=f"{now:%H:%M:%S} UTC",
        notice=_notice(registry.down_since),
        nodes=[
            _node(node, states[node.wallet_address], wrong[node.wallet_address], now)
            for node in shown
        ],
        adapters=[
            _adapter(
                answering.get(name) or Served(name, None, None, 0),
                loras.get(name),
                listing.get(name, []),
                traffic.answers(name),
                versions.get(name, []),
            )
            for name in names[:ADAPTERS]
        ],
        choices=[Choice(base, "base model") for base in bases[:ADAPTERS]]
        + [
            Choice(name, "adapter" if name in answering else "adapter without a holder")
            for name in names[:ADAPTERS]
        ],
    )


def _headline(states: Iterable[State]) -> str:
    here = [state.health for state in states if state.health != "offline"]
    routed, known = here.count("live"), len(here)
    if not known:
        return "No node is in the network now"
    if routed == known:
        return "The one node takes requests" if known == 1 else f"All {known} nodes take requests"
    return f"{routed} of {known} nodes {'takes' if routed == 1 else 'take'} requests"


def _details(states: Iterable[State], adapters: int, bases: int) -> str:
    healths = Counter(state.health for state in states)
    parts = [f"{healths[name]} {name}" for name in get_args(Health) if healths[name]]
    return " · ".join([*parts, _count(adapters, "adapter"), _count(bases, "base model")])


def _notice(down_since: datetime | None) -> str:
    if down_since is None:
        return ""
    since = f"{down_since:%H:%M:%S} UTC"
    return f"The database has not answered since {since}. This is how it was then."


def _node(node: KnownNode, state: State, wrong: Sequence[str], now: datetime) -> NodeLine:
    reason = state.reason
    if wrong and not reason:
        reason = f"Not asked for {_names(wrong)}: it holds another version."
    return NodeLine(
        key=node.wallet_address,
        name=shortened(node.wallet_address),
        endpoint=node.endpoint_url,
        health=state.health,
        reason=reason,
        load=f"{state.routing.in_flight} in flight",
        speed=f"reports {node.current_load:g}, speed {state.routing.speed:.2g}×",
        adapters=_names(node.available_lora_list) or "none",
        version=node.version or "unknown",
        base=node.base_model or "",
        beat=f"{duration(now - node.last_heartbeat)} ago",
    )


def _adapter(
    answering: Served,
    lora: wire.Lora | None,
    listing: Sequence[KnownNode],
    answers: int,
    versions: list[str],
) -> AdapterLine:
    """`listing`: the nodes that get requests and list it, whichever version they hold."""
    name = answering.name
    cid = (lora.ipfs_hash if lora else answering.cid) or ""
    others = sum(not _holds(node, name, cid) for node in listing)
    return AdapterLine(
        key=name,
        description=_beginning(lora.description or "") if lora else "not in the registry",
        cid=cid,
        short_cid=shortened(cid) or "unknown",
        copy=f"Copy the CID of {name}",
        holders=str(len(listing) - others),
        others=f"{_count(others, 'other')} with another version" if others else "",
        requests=f"{answers:,}",
        category=(lora.category if lora else None) or "none",
        base=(lora.base_model if lora else None) or answering.base_model or "unknown",
        size=_size(lora),
        summary=_count(len(versions), "version"),
        versions=versions,
    )


def _size(lora: wire.Lora | None) -> str:
    parts = []
    if lora and lora.rank is not None:
        parts.append(f"rank {lora.rank}")
    if lora and lora.size_bytes is not None:
        parts.append(f"{lora.size_bytes / 1e6:.3g} MB")
    return ", ".join(parts)


def _listing(nodes: Sequence[KnownNode]) -> dict[str, list[KnownNode]]:
    """The `nodes` that list each name."""
    found: dict[str, list[KnownNode]] = {}
    for node in nodes:
        for name in node.available_lora_list:
            found.setdefault(name, []).append(node)
    return found


def _other_versions(
    nodes: Sequence[KnownNode], cids: Mapping[str, str | None]
) -> Mapping[str, list[str]]:
    """By wallet, the names of which a node holds another version than the one in `cids`."""
    found: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        for name in node.available_lora_list:
            if not _holds(node, name, cids.get(name)):
                found[node.wallet_address].append(name)
    return found


def _holds(node: KnownNode, name: str, cid: str | None) -> bool:
    """An old node, which names no CIDs, is taken at its word, as by the balancer."""
    said = node.adapters.get(name)
    return said is None or not cid or canonical(said) == canonical(cid)


def shortened(text: str) -> str:
    """The beginning and the end of a long `text`."""
    return text if len(text) <= 18 else f"{text[:10]}…{text[-6:]}"


def _beginning(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}…"


def _names(names: Sequence[str]) -> str:
    more = len(names) - _NAMES
    return ", ".join(names[:_NAMES]) + (f" and {more} more" if more > 0 else "")


def _count(number: int, one: str) -> str:
    return f"{number} {one if number == 1 else one + 's'}"
