"""Which node gets a request: of a few drawn by chance, the one that should be done with it first.

That is told by the requests which this router itself has there, and by how fast the node answered
earlier ones. A node's own word on its load is too old when it comes: sending to the least loaded by
their beats waits longer than choosing blindly. `benchmarks/routing.py` runs this code on a
simulated clock.
"""

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from r3mes_vllm.backend.cids import canonical
from r3mes_vllm.backend.conversations import Conversations
from r3mes_vllm.backend.flights import Flight, Load
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.backend.speed import Kinds
from r3mes_vllm.versions import is_older

_DRAWN = 32
"""Of how many the best is taken. Two choices leave a quarter of the mean wait that chance makes."""
_CLEARLY = 2.25
"""Times the least cost: what a conversation's own node may cost."""
_RAMP_S, _RAMP_FROM = 30.0, 0.1
_MOST_NODES = 4096

_Asked = tuple[KnownNode, Load]


@dataclass(frozen=True)
class State:
    """Of a node, as this router sees it now."""

    in_flight: int
    """Requests of this router."""
    speed: float
    """1.0 is as fast as the average answer of this router."""
    ejected_s: float | None
    """Seconds for which it is still asked last; None if it isn't."""
    reason: str | None
    """Why it gets no requests, or few: a sentence. None if nothing is wrong."""


class Balancer:
    """`clock` gives seconds that never go back."""

    def __init__(
        self,
        chance: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        drawn: int = _DRAWN,
        required_version: str | None = None,
    ) -> None:
        self._chance = chance or random.Random()  # noqa: S311
        self._drawn = drawn
        self._clock = clock
        self._required = required_version
        self._loads = OrderedDict[str, Load]()
        self._conversations = Conversations()
        self._kinds = Kinds()

    def dial_failed(self, node: KnownNode) -> None:
        """Keep `node` out of routing until it beats or registers again. It is a failure of the
        node, so its flight should not be told of it too."""
        load, now = self._load(node), self._clock()
        load.undialled = node.last_heartbeat
        load.standing.failed(now, now)

    def flight(self, node: KnownNode, conversation: str | None = None) -> Flight:
        """To be entered when a request is sent to `node`, and left when that is over. It is the
        `conversation`'s own node once it has begun to answer."""
        note = None
        if conversation:
            note = partial(self._conversations.note, conversation, node.wallet_address)
        return Flight(self._load(node), self._kinds, self._clock, note)

    def routable(self, nodes: Sequence[KnownNode]) -> list[KnownNode]:
        """`nodes` without those whose dial failed after their last beat, those that have not
        proved their URL, and those of a version that is too old."""
        return [n for n in nodes if self.may_be_asked(n) and not self._is_undialled(n)]

    def may_be_asked(self, node: KnownNode) -> bool:
        """Whatever became of earlier requests."""
        return node.usable and not is_older(node.version, self._required)

    def holders(
        self,
        nodes: Sequence[KnownNode],
        name: str,
        cid: str | None,
        *,
        exact: bool = False,
        conversation: str | None = None,
    ) -> list[KnownNode]:
        """Those `holding` the adapter, in the order of trying: who is known to hold `cid` first."""
        sure, unsure = self.holding(nodes, name, cid, exact=exact)
        found = self.order(sure, conversation=conversation)
        return found + self.order(unsure, conversation=None if sure else conversation)

    def holding(
        self, nodes: Sequence[KnownNode], name: str, cid: str | None, *, exact: bool = False
    ) -> tuple[list[KnownNode], list[KnownNode]]:
        """The routable `nodes` that hold the adapter `name`: those known to hold `cid`, and others.

        A node that says which CIDs it holds must hold this one; an old node that says nothing
        is taken at its word, unless `exact`.
        """
        listing = [node for node in self.routable(nodes) if name in node.names]
        return parted(listing, name, cid, exact=exact)

    def order(
        self, nodes: Sequence[KnownNode], *, conversation: str | None = None
    ) -> list[KnownNode]:
        """All `nodes` in the order of trying: full ones late, ejected ones last, but at most half
        of `nodes` count as ejected. See `conversations` for what names a conversation."""
        now = self._clock()
        asked = [(node, self._load(node)) for node in nodes]
        out = _ejected(asked, now)
        oldest = max((_ramp(load, now) for _, load in asked), default=1.0)
        ready, late, full = list[_Asked](), list[_Asked](), list[_Asked]()
        for node, load in asked:
            if node.wallet_address in out:
                continue
            if now < load.full_until:
                full.append((node, load))
            elif (ramp := _ramp(load, now)) < oldest and ramp <= oldest * self._chance.random():
                late.append((node, load))
            else:
                ready.append((node, load))
        own = self._conversations.wallet(conversation) if conversation else None
        return [
            *self._ranked(ready, now, own),
            *self._ranked(late, now),
            *self._ranked(full, now),
            *out.values(),
        ]

    def state(self, node: KnownNode) -> State:
        now = self._clock()
        # One that was never asked is not held back yet.
        load = self._loads.get(node.wallet_address) or Load(now - _RAMP_S)
        ejected_s = max(load.standing.ejected_until - now, 0.0) or None
        reason = None
        if not node.usable:
            reason = f"it has not proved that its URL is its own: {node.signature_reason}"
        elif is_older(node.version, self._required):
            reason = f"its version {node.version} is older than {self._required}, which is required"
        elif self._is_undialled(node):
            reason = "it could not be reached after its last beat"
        elif ejected_s:
            reason = f"it failed again and again: for {ejected_s:.0f} s it is asked last"
        elif now < load.full_until:
            reason = "it said that it is full"
        elif (ramp := _ramp(load, now)) < 1:
            reason = f"it is new: it gets {ramp:.0%} of its share"
        return State(load.in_flight, load.speed.at(now), ejected_s, reason)

    def _is_undialled(self, node: KnownNode) -> bool:
        load = self._loads.get(node.wallet_address)
        return load is not None and load.undialled == node.last_heartbeat

    def _load(self, node: KnownNode) -> Load:
        wallet = node.wallet_address
        load = self._loads.get(wallet)
        if load is None:
            load = self._loads[wallet] = Load(self._clock())
            for _ in range(len(self._loads) - _MOST_NODES):
                oldest, kept = self._loads.popitem(last=False)
                if kept.in_flight:
                    self._loads[oldest] = kept
        elif load.undialled and load.undialled < node.last_heartbeat:
            load.undialled, load.since = None, self._clock()
        self._loads.move_to_end(wallet)
        return load

    def _ranked(
        self, asked: Sequence[_Asked], now: float, own: str | None = None
    ) -> list[KnownNode]:
        """The best of a few of `asked` first; `own` before it if that costs not much more."""
        if not asked:
            return []
        mixed = self._chance.sample(asked, len(asked))
        drawn = sorted(mixed[: self._drawn], key=lambda it: it[1].cost(now))
        ranked = drawn + mixed[self._drawn :]
        for place, (node, load) in enumerate(ranked if own else ()):
            if node.wallet_address == own:
                least = drawn[0][1].cost(now)
                if not load.standing.in_trouble and load.cost(now) <= _CLEARLY * least:
                    ranked.insert(0, ranked.pop(place))
                break
        return [node for node, _ in ranked]


def parted(
    listing: Sequence[KnownNode], name: str, cid: str | None, *, exact: bool = False
) -> tuple[list[KnownNode], list[KnownNode]]:
    """As `Balancer.holding`, of routable nodes that list `name`."""
    if cid is None:
        return [*listing], []
    wanted = canonical(cid)
    sure = [n for n in listing if canonical(n.adapters.get(name, "")) == wanted]
    unsure = [] if exact else [n for n in listing if name not in n.adapters]
    return sure, unsure


def _ejected(asked: Sequence[_Asked], now: float) -> dict[str, KnownNode]:
    """By wallet, the soonest to return first."""
    out = [(load.standing.ejected_until, node) for node, load in asked]
    out = sorted((it for it in out if it[0] > now), key=lambda it: it[0])
    most = len(asked) // 2
    return {node.wallet_address: node for _, node in (out[-most:] if most else [])}


def _ramp(load: Load, now: float) -> float:
    """The part of its share that a node gets which is new, or was ejected."""
    return min(max((now - load.ramping_since) / _RAMP_S, _RAMP_FROM), 1.0)
