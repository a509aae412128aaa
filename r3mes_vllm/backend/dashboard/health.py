"""How a node is doing, and why it gets no requests, in a sentence."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from r3mes_vllm import wire
from r3mes_vllm.backend import balancer
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.backend.state import Backend

Health = Literal["live", "ejected", "unproven", "draining", "stale", "offline"]

_DEAD = timedelta(seconds=wire.HEARTBEAT_TIMEOUT_S)


@dataclass(frozen=True)
class State:
    health: Health
    reason: str
    """Why it gets no requests, or few; else empty."""
    routing: balancer.State

    @property
    def is_gone(self) -> bool:
        return self.health in ("stale", "offline")


def state(backend: Backend, node: KnownNode, now: datetime, *, alive: bool) -> State:
    """`alive`: whether it is among the registry's live nodes."""
    routing = backend.balancer.state(node)
    health, reason = _health(backend, node, now - node.last_heartbeat, routing, alive)
    return State(health, reason, routing)


def _health(
    backend: Backend, node: KnownNode, silent: timedelta, routing: balancer.State, alive: bool
) -> tuple[Health, str]:
    if node.status == wire.OFFLINE:
        return "offline", f"It left the network. Its last beat was {duration(silent)} ago."
    if not alive and (node.status == wire.ACTIVE or silent >= _DEAD):
        return "stale", f"Taken for dead: no beat for {duration(silent)}."
    if node.status == wire.DRAINING:
        return "draining", "It is draining: it ends its answers and takes no new requests."
    if not alive:
        return "draining", f"Its status is “{node.status}”; only “active” gets requests."
    if node.signature == wire.UNSIGNED and backend.require_signatures:
        return "unproven", "It does not sign, and this backend takes only nodes that do."
    reason = _sentence(routing.reason)
    if not node.usable:
        return "unproven", reason
    if routing.ejected_s or not backend.balancer.routable([node]):
        return "ejected", reason
    return "live", reason


def duration(span: timedelta) -> str:
    """`span` in the largest unit that makes at least 2 of it, such as `90 s` or `3 h`."""
    seconds = max(0, int(span.total_seconds()))
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _sentence(text: str | None) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""
