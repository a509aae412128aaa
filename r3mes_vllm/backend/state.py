"""What the routes share: one `Backend` for each application, at `app.state.backend`."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from fastapi import Request

from r3mes_vllm.backend.balancer import Balancer
from r3mes_vllm.backend.dial import Dialler, Timeouts
from r3mes_vllm.backend.endpoints import Resolve
from r3mes_vllm.backend.metrics import Metrics
from r3mes_vllm.backend.registry import Registry
from r3mes_vllm.choice import Policy
from r3mes_vllm.keys import Keys
from r3mes_vllm.wire import Node

Clock = Callable[[], datetime]
"""The current time, aware."""


@dataclass(frozen=True)
class Backend:
    registry: Registry
    balancer: Balancer
    dialler: Dialler
    timeouts: Timeouts
    metrics: Metrics
    policy: Policy
    client_keys: Keys
    admin_keys: Keys
    allow_private_nodes: bool
    resolve: Resolve
    clock: Clock
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Marks this process in `X-R3MES-Via`."""

    async def live_nodes(self) -> list[Node]:
        return await self.registry.live_nodes(self.clock())


def backend_of(request: Request) -> Backend:
    found: Backend = request.app.state.backend
    return found
