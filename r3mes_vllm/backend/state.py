"""What the routes share: one `Backend` for each application, at `app.state.backend`."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from fastapi import Request

from r3mes_vllm.backend.balancer import Balancer
from r3mes_vllm.backend.costly import Costly
from r3mes_vllm.backend.dial import Dialler, Timeouts
from r3mes_vllm.backend.elsewhere import Server
from r3mes_vllm.backend.endpoints import Resolve
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.backend.lately import Lately
from r3mes_vllm.backend.metrics import Metrics
from r3mes_vllm.backend.prover import Prover
from r3mes_vllm.backend.registry import Registry
from r3mes_vllm.choice import Policy
from r3mes_vllm.keys import Keys
from r3mes_vllm.wire import HEARTBEAT_TIMEOUT_S, UNSIGNED, Told

Clock = Callable[[], datetime]
"""The current time, aware."""

_WOULD_NOT_LOAD_S = 10.0
"""Then a node is asked again: perhaps it has heard of the adapter by now."""


@dataclass(frozen=True)
class Backend:
    registry: Registry
    balancer: Balancer
    dialler: Dialler
    prover: Prover
    timeouts: Timeouts
    metrics: Metrics
    policy: Policy
    client_keys: Keys
    admin_keys: Keys
    allow_private_nodes: bool
    require_signatures: bool
    told: Told
    resolve: Resolve
    clock: Clock
    servers: Sequence[Server] = ()
    """That answer in place of nodes."""
    fallback: Sequence[str] = ()
    """Kinds, in the order of trying."""
    would_not_load: Lately = field(default_factory=lambda: Lately(_WOULD_NOT_LOAD_S))
    """`(wallet, name)` of a node and an adapter."""
    lately_served: Costly = field(default_factory=Costly)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Marks this process in `X-R3MES-Via`."""

    async def live_nodes(
        self, max_age_s: float = HEARTBEAT_TIMEOUT_S, *, listing: str | None = None
    ) -> list[KnownNode]:
        """Those that may be in this network: perhaps it does without the unsigned ones. With
        `listing` those that list an adapter of that name."""
        nodes = await self.registry.live_nodes(self.clock(), max_age_s, listing=listing)
        return [n for n in nodes if n.signature != UNSIGNED or not self.require_signatures]


def backend_of(request: Request) -> Backend:
    found: Backend = request.app.state.backend
    return found
