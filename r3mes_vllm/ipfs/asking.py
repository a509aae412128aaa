"""What one source is asked for by name in a race: which block is next, how many at a time, and when
it is asked no more."""

import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from r3mes_vllm.errors import SourceBusy, SourceShaky
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.sources import Source

_ASKED_AT_MOST = 2
"""Times, one source for one block that it does not have."""

_FAILURES = 3
"""In a row, after which a source has failed."""

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_PATIENCE_S = 5.0
"""With a source that answers, but gave nothing yet."""


@dataclass
class Asking:
    source: Source
    stall_s: float
    raw: bool | None = None
    """Whether it gives raw blocks; None until it gave one or refused."""
    cars: bool = True
    """Whether it may give a block in a CAR of its own."""
    under_way: int = 0
    """Requests."""
    pausing: int = 0
    """Of those that ask, how many wait before the next request; the others do too."""
    busy: SourceBusy | None = None
    """When it asked for a pause: it is asked for nothing more."""
    since: float = field(default_factory=time.monotonic)
    """When its last block came, or when it was first asked."""
    _failures: int = 0
    """In a row, as the next."""
    _shaken: int = 0
    _had: int = 0
    """Bytes that it had given before."""
    times: dict[CID, int] = field(default_factory=dict)
    queue: list[CID] = field(default_factory=list)
    last_resort: bool = False

    def __post_init__(self) -> None:
        self._had = self.source.standing.bytes

    @property
    def full(self) -> bool:
        """Whether it is asked for nothing more for now."""
        return bool(self.pausing) or self.under_way >= self.source.standing.bears

    def gave(self) -> None:
        """A block."""
        self._failures = self._shaken = 0
        self.since = time.monotonic()
        standing = self.source.standing
        if standing.bears < self.source.at_once:
            standing.bore()

    def failed(self) -> bool:
        """Whether that was once too often."""
        self._failures += 1
        return self._failures >= _FAILURES

    def refused(self, error: SourceBusy) -> None:
        if self.busy is None:
            self.busy = error
            self.source.standing.strained(self.source.at_once)

    def shaken(self, cid: CID, error: SourceShaky) -> float | None:
        """Seconds until it is asked again; None when it is given up."""
        came = self.source.standing.bytes > self._had
        if not (came or error.answered):
            # Nothing is there, it seems; but those under way may show that it is only full.
            given_up = self.failed()
            if not self.under_way:
                return None if given_up else 0.0
        patience = self.stall_s if came else min(self.stall_s, _PATIENCE_S)
        if time.monotonic() - self.since > patience:
            return None
        self.times[cid] -= 1
        if not self.pausing:
            self._shaken += 1
            self.source.standing.strained(self.source.at_once)
        pause = min(_FIRST_PAUSE_S * 2.0 ** (self._shaken - 1), _LONGEST_PAUSE_S)
        return pause * random.uniform(0.5, 1.5)  # noqa: S311

    def pick(
        self, wanted: Iterable[CID], claimed: Mapping[CID, int], *, from_start: bool
    ) -> CID | None:
        """What nobody is asked for; failing that, what only others are asked for."""
        for _ in range(2):
            while self.queue:
                cid = self.queue.pop()
                if cid in wanted and (self.last_resort or not claimed.get(cid)):
                    return cid
            left = [cid for cid in list(wanted) if self.times.get(cid, 0) < _ASKED_AT_MOST]
            free = [cid for cid in left if not claimed.get(cid)]
            self.last_resort = not free
            self.queue = free or [cid for cid in left if not self.times.get(cid)]
            if from_start:
                self.queue.reverse()
        return None
