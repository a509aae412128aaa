"""What the router has answered lately, counted as it goes by.

Only `/chat` and `POST /v1/...` count: what people ask of models, not what monitors and pages ask of
the router. Time goes in slots of a fixed length, kept in a ring, so that nothing has to run while
nobody asks.
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from r3mes_vllm.backend.inference import ASKED, asks_a_model

SLOT_S = 2.0
SLOTS = 150
"""Five minutes of them."""

_NAMES = 10_000


@dataclass
class Slot:
    requests: int = 0
    """That came."""
    in_flight: int = 0
    """At once, at the most."""
    bytes: int = 0
    """Of answers' bodies."""


class Traffic:
    """`clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._index = self._now()
        self._ring = deque([Slot() for _ in range(SLOTS + 1)], maxlen=SLOTS + 1)
        self._in_flight = 0
        self._names: Counter[str] = Counter()

    def arrived(self) -> None:
        slot = self._slot()
        self._in_flight += 1
        slot.requests += 1
        slot.in_flight = max(slot.in_flight, self._in_flight)

    def sent(self, count: int) -> None:
        self._slot().bytes += count

    def left(self) -> None:
        self._slot()  # the slots until now had it
        self._in_flight -= 1

    def answered(self, name: str) -> None:
        """A node began to answer as `name`, an adapter or a base model."""
        if name in self._names or len(self._names) < _NAMES:
            self._names[name] += 1

    def answers(self, name: str) -> int:
        """How many nodes have begun as `name` since the router started."""
        return self._names[name]

    def slots(self) -> list[Slot]:
        """The last `SLOTS` that are over, the oldest first."""
        self._slot()
        return list(self._ring)[:-1]

    def _slot(self) -> Slot:
        index = self._now()
        for _ in range(min(index - self._index, SLOTS + 1)):
            self._ring.append(Slot(in_flight=self._in_flight))
        self._index = index
        return self._ring[-1]

    def _now(self) -> int:
        return int(self._clock() / SLOT_S)


class Counted:
    """ASGI middleware that tells `traffic` of each request to a model."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not asks_a_model(scope):
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.body":
                self._traffic.sent(len(message.get("body", b"")))
            elif message.get("status") == 200 and (asked := scope.get(ASKED)):
                self._traffic.answered(asked.partition("@")[0])
            await send(message)

        self._traffic.arrived()
        try:
            await self._app(scope, receive, counting)
        finally:
            self._traffic.left()
