"""What one source is asked for by name in a race: which block is next."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.sources import Source

_ASKED_AT_MOST = 2
"""Times, one source for one block."""


@dataclass
class Asking:
    source: Source
    raw: bool | None = None
    """Whether it gives raw blocks; None until it gave one or refused."""
    cars: bool = True
    """Whether it may give a block in a CAR of its own."""
    failures: int = 0
    times: dict[CID, int] = field(default_factory=dict)
    queue: list[CID] = field(default_factory=list)
    last_resort: bool = False

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
            self.queue = free or [cid for cid in left if cid not in self.times]
            if from_start:
                self.queue.reverse()
        return None
