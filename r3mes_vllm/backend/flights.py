"""What this router has under way at a node, and what it learns of the node by that."""

import math
from collections.abc import Callable
from datetime import datetime

from r3mes_vllm.backend.outliers import Standing
from r3mes_vllm.backend.speed import Kinds, Speed

_WIDTH_MEMORY_S = 600.0
_STEP = 1.25
"""Speeds that differ by less are equal, so that a small difference does not draw all requests."""


class Load:
    """Of one node, in seconds of the router's clock."""

    def __init__(self, now: float) -> None:
        self.since = now
        self.in_flight = 0
        self.speed = Speed()
        self.standing = Standing()
        self.undialled: datetime | None = None
        """The last beat before a dial failed."""
        self.full_until = float("-inf")
        self._streams = 0
        self._most, self._most_at = 1.0, now

    @property
    def ramping_since(self) -> float:
        """When it was new, or came back."""
        return max(self.since, self.standing.ejected_until)

    def width(self, now: float) -> float:
        """How many answers it has been seen to give at once: a request beyond that may wait."""
        most = 1 + (self._most - 1) * math.exp((self._most_at - now) / _WIDTH_MEMORY_S)
        return max(most, self._streams)

    def cost(self, now: float) -> float:
        """Of sending a request now; 1.0 at an idle node of average speed. Squared, because one that
        has to queue keeps others waiting too: the fast would get long queues beside idle others."""
        speed = _STEP ** round(math.log(self.speed.at(now), _STEP))
        return (1 + self.in_flight / self.width(now)) ** 2 / speed

    def begin_stream(self, now: float) -> None:
        self._streams += 1
        if self._streams >= self.width(now):
            self._most, self._most_at = float(self._streams), now

    def end_stream(self) -> None:
        self._streams -= 1


class Flight:
    """One request at one node, while in its `with`. If neither `finished` nor `broke` is said, it
    counts for nothing: the client left, or this backend is at fault."""

    __slots__ = (
        "_began", "_clock", "_held_s", "_kind", "_kinds", "_left", "_load", "_on_began", "_over",
        "_size", "_started", "_turns",
    )  # fmt: skip

    def __init__(
        self,
        load: Load,
        kinds: Kinds,
        clock: Callable[[], float],
        on_began: Callable[[], None] | None = None,
    ) -> None:
        self._load, self._kinds, self._clock, self._on_began = load, kinds, clock, on_began
        self._size, self._held_s = 0, 0.0
        self._began = self._over = self._left = False
        self._kind = ""

    def __enter__(self) -> "Flight":
        load, now = self._load, self._clock()
        self._started = now
        width = load.width(now)
        self._turns = 1 + max(0.0, load.in_flight + 1 - width) / width
        load.in_flight += 1
        return self

    def __exit__(self, *_: object) -> None:
        """More than once is once."""
        if self._left:
            return
        self._left = True
        self._load.in_flight -= 1
        if self._began:
            self._load.end_stream()

    def began(self, kind: str = "") -> None:
        """The first byte of the body is there. Answers of one `kind` (path and media type, say) are
        alike: their speeds are compared."""
        if not self._began:
            self._began, self._kind = True, kind
            self._load.begin_stream(self._clock())
            if self._on_began:
                self._on_began()

    def passed(self, size: int, held_s: float = 0.0) -> None:
        """`size` bytes came; the client did not take them for `held_s` seconds."""
        self._size += size
        self._held_s += held_s

    def finished(self) -> None:
        """The answer ended well. (One of an error's status is neither this nor broken.)"""
        if self._over:
            return
        self._over = True
        now = self._clock()
        self._load.standing.answered(now)
        seconds = max(now - self._started - self._held_s, 0.0) / self._turns
        if self._size:
            self._load.speed.add(now, *self._kinds.compared(self._kind, self._size, seconds))

    def broke(self) -> None:
        """The node gave no answer, or ended it before its end."""
        if not self._over:
            self._over = True
            self._load.standing.failed(self._started, self._clock())

    def refused(self, seconds: float = 1.0) -> None:
        """The node is full, and may have room again in `seconds`. That is no failure."""
        self._over = True
        self._load.full_until = self._clock() + min(max(seconds, 0.5), 10.0)
