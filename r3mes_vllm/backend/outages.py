"""When the database did not answer. No beat is kept meanwhile, so that time makes no node stale."""

from collections import deque
from datetime import datetime, timedelta

_LONGEST = timedelta(minutes=5)
"""After that the nodes are taken for dead."""

_REMEMBERED = 64


class Outages:
    def __init__(self) -> None:
        self.since: datetime | None = None
        """When the present one began."""
        self._past: deque[tuple[datetime, datetime]] = deque(maxlen=_REMEMBERED)

    def begin(self, at: datetime) -> None:
        self.since = self.since or at

    def end(self, at: datetime) -> None:
        if self.since:
            self._past.append((self.since, at))
            self.since = None

    def oldest(self, now: datetime, max_age_s: float) -> datetime:
        """Whoever beat after that is alive: it was `max_age_s` seconds ago, without outages."""
        found = now - timedelta(seconds=max_age_s)
        present = [(self.since, now)] if self.since else []
        for began, ended in reversed([*self._past, *present]):
            if ended > found:
                found -= min(ended - began, _LONGEST)
        return found
