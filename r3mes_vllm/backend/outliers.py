"""A node that fails again and again is left alone for a while, each time twice as long."""

_TROUBLE = 3.0
"""Failures in a row that are enough."""
_FORGIVES = 0.25
"""Of a failure: what an answer makes good. Who fails more than one time in five gets out."""
_EJECTED_S, _MOST_EJECTED_S = 30.0, 900.0
_FORGOTTEN_S = 300.0
"""After an ejection; an answer that is later begins the doubling anew."""


class Standing:
    """Of one node, in seconds of the router's clock."""

    def __init__(self) -> None:
        self.ejected_until = float("-inf")
        self._trouble = 0.0
        self._ejections = 0

    @property
    def in_trouble(self) -> bool:
        return self._trouble >= 1

    def failed(self, started: float, now: float) -> None:
        """A request that was sent at `started` failed. All that were sent before an ejection ended
        tell of the same outage; after it, one failure is enough."""
        if started < self.ejected_until:
            return
        self._trouble += 1
        if self._trouble < _TROUBLE:
            return
        seconds = min(_EJECTED_S * 2**self._ejections, _MOST_EJECTED_S)
        self.ejected_until = now + seconds
        self._ejections = min(self._ejections + 1, 10)
        self._trouble = _TROUBLE - 1

    def answered(self, now: float) -> None:
        self._trouble = max(self._trouble - _FORGIVES, 0)
        if now > self.ejected_until + _FORGOTTEN_S:
            self._ejections = 0
