"""How fast a node is, by the answers that this router saw it finish; 1.0 is the average.

Nothing that a node says of itself counts. Answers differ (events have fifty times the bytes of
plain text, an embedding takes a hundredth of the time), so each is compared with the mean of its
kind.
"""

import math
from collections import OrderedDict

_MEMORY_S = 120.0
"""After which an answer counts for a third; a node that isn't asked becomes average again, so that
it is asked again."""
_MOST = 8.0
"""No node is taken for faster than this, or slower than its inverse."""
_KINDS = 64
_ANSWERS = 256
"""That the mean of a kind is of, about."""


class Speed:
    """Of one node. One average answer is taken for granted, so that few say little."""

    def __init__(self) -> None:
        self._work = self._time = self._at = 0.0

    def add(self, now: float, work: float, time: float) -> None:
        """An answer with `work` times the bytes of a mean one took `time` times as long as that."""
        fade = math.exp((self._at - now) / _MEMORY_S)
        self._work = self._work * fade + work
        self._time = self._time * fade + time
        self._at = now

    def at(self, now: float) -> float:
        fade = math.exp((self._at - now) / _MEMORY_S)
        speed = (1 + self._work * fade) / (1 + self._time * fade)
        return min(max(speed, 1 / _MOST), _MOST)


class Kinds:
    """The means of the kinds of answers, whichever node gave them."""

    def __init__(self) -> None:
        self._means = OrderedDict[str, _Mean]()

    def __len__(self) -> int:
        return len(self._means)

    def compared(self, kind: str, size: int, seconds: float) -> tuple[float, float]:
        """The bytes and the duration of an answer, as multiples of those of a mean one."""
        mean = self._means.setdefault(kind, _Mean())
        self._means.move_to_end(kind)
        if len(self._means) > _KINDS:
            self._means.popitem(last=False)
        mean.add(size, seconds)
        return size / mean.size, seconds / mean.seconds


class _Mean:
    def __init__(self) -> None:
        self.size = self.seconds = 1e-9
        self._count = 0

    def add(self, size: int, seconds: float) -> None:
        self._count = min(self._count + 1, _ANSWERS)
        self.size = max(self.size + (size - self.size) / self._count, 1e-9)
        self.seconds = max(self.seconds + (seconds - self.seconds) / self._count, 1e-9)
