"""What requests and loads were like, counted as they happen; `metrics.py` shows it.

By adapter: the names that are served now, `base` for the base model, and `other` for names beyond
`MOST`, for `ipfs://CID`, and for requests that came to no adapter. What is kept of a name goes with
it. In plain numbers: an observation costs less than a microsecond, a name some kilobytes.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from r3mes_vllm.engine.names import BY_CID
from r3mes_vllm.engine.watching import Generation

MOST = 1000
BASE, OTHER = "base", "other"

FIRST_TOKEN_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
QUEUE_S = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
LOAD_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
CHECK_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Histogram:
    """`bounds` in seconds, each the largest that its bucket takes."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self.sum += seconds

    def quantile(self, share: float) -> float | None:
        """About what `share` of them took at most, in seconds; None if there were none."""
        wanted, below, lower = share * sum(self._counts), 0, 0.0
        for bound, count in zip((*self._bounds, self._bounds[-1]), self._counts, strict=True):
            if count and below + count >= wanted:
                return lower + (bound - lower) * (wanted - below) / count
            below, lower = below + count, bound
        return None

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: how many were at most so long."""
        total, result = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            result.append((bound, float(total)))
        return result


@dataclass(eq=False)
class OfAdapter:
    """Of one name."""

    requests: Counter[str] = field(default_factory=Counter)
    """That have ended, by outcome."""
    running: int = 0
    """That the engine has."""
    asked_at: float | None = None
    """When the last one ended, in seconds since 1970."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_S))
    token: Histogram = field(default_factory=lambda: Histogram(TOKEN_S))
    queue: Histogram = field(default_factory=lambda: Histogram(QUEUE_S))


class Measures:
    """Used in one event loop; read in any thread."""

    def __init__(self) -> None:
        self.served: Callable[[], Collection[str]] = tuple
        """The names now."""
        self.loads: dict[str, Histogram] = {}
        """By phase."""
        self.checks: Counter[tuple[str, str]] = Counter()
        """Of the canary, by kind and outcome."""
        self.check_seconds: dict[str, Histogram] = {}
        self._by_name = {BASE: OfAdapter(), OTHER: OfAdapter()}

    def of(self, name: str | None) -> OfAdapter:
        """None is the base model; a name that isn't served is `other`."""
        known = self._by_name.get(name or BASE)
        if known is not None:
            return known
        if name is None or name.startswith(BY_CID) or name not in self.served():
            return self._by_name[OTHER]
        if len(self._by_name) >= MOST and len(self.by_name()) >= MOST:
            return self._by_name[OTHER]
        made = self._by_name[name] = OfAdapter()
        return made

    def by_name(self) -> Mapping[str, OfAdapter]:
        """Of the names that are served now. What others had is forgotten."""
        served = self.served()
        for name in list(self._by_name):
            if name not in (BASE, OTHER) and name not in served:
                self._by_name.pop(name, None)
        return dict(self._by_name)

    def observe(self, generation: Generation) -> "_Watch":
        """To be told of each generation of the engine."""
        return _Watch(generation, self.of(generation.adapter))

    def loaded(self, phase: str, seconds: float) -> None:
        """One phase of a load is over."""
        self.loads.setdefault(phase, Histogram(LOAD_S)).observe(seconds)

    def checked(self, kind: str, well: bool, seconds: float) -> None:
        """The canary has looked at the engine."""
        self.checks[kind, "well" if well else "unwell"] += 1
        self.check_seconds.setdefault(kind, Histogram(CHECK_S)).observe(seconds)


class _Watch:
    def __init__(self, generation: Generation, adapter: OfAdapter) -> None:
        self._generation = generation
        self._adapter = adapter
        self._begun = False
        adapter.running += 1

    def generated(self, tokens: int) -> None:
        it, adapter = self._generation, self._adapter
        adapter.generated_tokens += tokens
        if not self._begun:
            self._begin()
        if it.token_s is not None:
            adapter.token.observe(it.token_s)

    def _begin(self) -> None:
        self._begun = True
        if self._generation.first_s is not None:
            self._adapter.first_token.observe(self._generation.first_s)
        if self._generation.queue_s is not None:
            self._adapter.queue.observe(self._generation.queue_s)

    def ended(self) -> None:
        self._adapter.running -= 1
        self._adapter.prompt_tokens += self._generation.prompt_tokens
