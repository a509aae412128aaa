"""What takes long to make, in a network of thousands, is not made for everyone who asks."""

import time
from collections.abc import Callable
from typing import Any

_CHEAP_S = 0.005
_SHARE = 20
"""At most one part in so many of the time goes into it."""


class Costly:
    """`clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: Any = None
        self._until = float("-inf")

    def get(self, make: Callable[[], Any]) -> Any:
        """What `make` gives: now, or what it gave a moment ago if that took long."""
        began = self._clock()
        if began >= self._until:
            self._last = made = make()
            took = self._clock() - began
            if took <= _CHEAP_S:
                self._last = None
                return made
            self._until = began + took * _SHARE
        return self._last
