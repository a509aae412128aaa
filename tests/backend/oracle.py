"""What a run with failing nodes must give, told by what the nodes themselves saw and did.

A node notes what it told the backend, and each question that comes to it. So it is known of each
request whether its node could be thought to hold the CID, and of each answer that broke whether
another holder was left to go on with it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

MOST_NODES = 8
"""That the backend asks for one answer."""

NO_OTHER, NOT_IN_TIME, MOST = "no other holder", "none in time", f"{MOST_NODES} were asked"
STOOD_STILL = "the machine stood still"
EXCUSES = (NO_OTHER, NOT_IN_TIME, MOST, STOOD_STILL)
"""For which an answer may end as an error, or be refused."""
BROKEN = ("broken: node_failed:", "broken: plain text:")
"""How an answer may end as an error: by an event that says so, or, where there are no events, by
its connection."""
MOST_STILL = 0.01
"""Of the answers, that the machine may break: else the run has told nothing."""

FATES = ("refuses", "dies", "is gone", "is silent", "has another version")
"""Of a node with a question, which excuse it from giving the answer."""

SHOWN = (
    *("whole", "routed", "moved", "deaths", "switches"),
    "answered by a version not told yet",
)
"""What must have happened."""
_MOST_SHOWN = 5


@dataclass
class Flight:
    """A question at a node."""

    node: int
    fate: str = "answers"
    moved_at: float = field(default_factory=time.monotonic)
    """When the node last said something of it that no other node had said."""

    def moves(self, silence_s: float) -> None:
        self.fate = self.fate_now(silence_s)
        self.moved_at = time.monotonic()

    def says_all(self, silence_s: float) -> None:
        self.moves(silence_s)
        if self.fate == "answers":
            self.fate = "has said all"

    def fate_now(self, silence_s: float) -> str:
        """It is silent after `silence_s` seconds without a word."""
        if self.fate == "answers" and time.monotonic() - self.moved_at > silence_s:
            return "is silent"
        return self.fate


@dataclass
class Asking:
    """A client's question, and where it came."""

    cid: str
    """That may answer it."""
    at: float = field(default_factory=time.monotonic)
    flights: list[Flight] = field(default_factory=list)


@dataclass
class _Telling:
    cid: str
    taken_at: float | None = None


class Told:
    """What a node told the backend of its CID. `lag_s` is how long a backend goes by what was true
    before: none, unless another one was told."""

    def __init__(self, lag_s: float = 0.0) -> None:
        self._lag_s = lag_s
        self._tellings: list[_Telling] = []

    def tells(self, cid: str) -> _Telling:
        """Until its `taken_at` is set the backend may know of it or not."""
        telling = _Telling(cid)
        if self._tellings and self._tellings[-1].cid == cid:
            telling = self._tellings[-1]
        else:
            self._tellings.append(telling)
        return telling

    def taken(self, telling: _Telling) -> None:
        telling.taken_at = telling.taken_at or time.monotonic()

    def possible(self, since: float) -> set[str]:
        """What a backend that chose after `since` may have thought that it holds."""
        found = set()
        for telling in reversed(self._tellings):
            found.add(telling.cid)
            if telling.taken_at and telling.taken_at + self._lag_s <= since:
                break
        return found

    def holds(self, cid: str, since: float) -> bool:
        """Whether no backend can have thought otherwise since then."""
        last = self._tellings[-1] if self._tellings else _Telling("")
        is_known = last.taken_at is not None and last.taken_at + self._lag_s <= since
        return is_known and last.cid == cid


@dataclass
class Lags:
    """When this process, which holds backend and nodes, got no processor."""

    _EVERY_S = 0.02
    _LEAST_S = 0.1

    seen: list[tuple[float, float]] = field(default_factory=list)
    """When each ended, and how long it took."""

    async def watch(self, goes_on: Callable[[], bool]) -> None:
        began = time.monotonic()
        while goes_on():
            await asyncio.sleep(self._EVERY_S)
            now = time.monotonic()
            if (took := now - began - self._EVERY_S) > self._LEAST_S:
                self.seen.append((now, took))
            began = now

    def longest(self, since: float) -> float:
        """Seconds."""
        found = 0.0
        for ended, took in reversed(self.seen):
            if ended < since:
                break
            found = max(found, took)
        return found


def cause(
    asking: Asking,
    holders: Collection[int],
    *,
    silence_s: float,
    patience_s: float,
    lag_s: float = 0.0,
) -> str:
    """Why there is no whole answer. `holders` are the nodes that held the CID all the while;
    `silence_s` and `patience_s` are for how long the backend waits for a node's next word, and for
    the first of any node; `lag_s` is for how long the machine stood still meanwhile."""
    found = _cause(asking, holders, silence_s, patience_s)
    return STOOD_STILL if found not in EXCUSES and lag_s > silence_s / 2 else found


def _cause(asking: Asking, holders: Collection[int], silence_s: float, patience_s: float) -> str:
    fates = {it.node: it.fate_now(silence_s) for it in asking.flights}
    for fate in fates.values():
        if fate not in FATES:
            return f"a node {fate}"
    if set(holders) <= set(fates):
        return NO_OTHER
    if len(fates) >= MOST_NODES:
        return MOST
    last = max((it.moved_at for it in asking.flights), default=asking.at)
    if time.monotonic() - last >= patience_s:
        return NOT_IN_TIME
    return "another holder was not asked"


@dataclass
class Found:
    """What became of the answers."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """A sentence each."""

    def problems(self, *, answers: int = 0) -> list[str]:
        """Why the run has failed; `answers` is how many had to be whole."""
        return [*self.violations(), *self.unshown(answers=answers)]

    def violations(self) -> list[str]:
        found = [f"{len(self.wrong)} wrong: {it}" for it in self.wrong[:_MOST_SHOWN]]
        return found + [f"{n} times {it}" for it, n in unexcused(self.counts.items())]

    def unshown(self, *, answers: int = 0) -> list[str]:
        """Why the run has shown nothing, or less than it had to."""
        found = [f"no {what}: nothing was shown" for what in SHOWN if not self.counts[what]]
        if self.counts["whole"] < answers:
            found.append(f"{self.counts['whole']} answers were whole, of {answers} asked for")
        if self.counts["routed"] < self.counts["whole"]:
            found.append("more answers than requests that came to nodes")
        still = sum(n for it, n in self.counts.items() if it.endswith(STOOD_STILL))
        if still > MOST_STILL * self.counts["whole"]:
            found.append(f"{STOOD_STILL} in {still} answers: it is too busy for this")
        return found


def unexcused(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Answers that broke or were refused though they need not have been, or not so."""
    return [
        (it, n)
        for it, n in counts
        if it.startswith(("broken", "refused"))
        and not it.endswith(STOOD_STILL)
        and not (it.endswith(EXCUSES) and it.startswith(("refused", *BROKEN)))
    ]
