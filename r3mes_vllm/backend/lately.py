"""What happened a short while ago."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

_MOST = 8192


class Lately:
    """Remembers what it is told for `seconds`; of very much, the latest."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._told_at = OrderedDict[Hashable, float]()

    def note(self, it: Hashable) -> None:
        self._told_at[it] = self._clock()
        self._told_at.move_to_end(it)
        if len(self._told_at) > _MOST:
            self._told_at.popitem(last=False)

    def __contains__(self, it: Hashable) -> bool:
        told_at = self._told_at.get(it)
        return told_at is not None and self._clock() - told_at < self._seconds
