"""What a minute allows, counted in windows that slide."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import (
    MovingWindowRateLimiter,
    RateLimiter,
    SlidingWindowCounterRateLimiter,
)

REQUESTS = "requests"
TOKENS = "tokens"


@dataclass(frozen=True)
class Allowance:
    item: RateLimitItem
    what: str
    of: str

    def __str__(self) -> str:
        return f"{self.item.amount} {self.what} a minute for this {self.of.partition(' ')[0]}"


def allowances(
    what: str, key: str | None, of_key: int | None, address: str, of_address: int | None
) -> list[Allowance]:
    """Of `what` (`REQUESTS` or `TOKENS`) for who calls from `address`, with `key` if it has one."""
    found = []
    if key and of_key:
        found.append(Allowance(RateLimitItemPerMinute(of_key), what, f"key {key} {what}"))
    if of_address:
        item = RateLimitItemPerMinute(of_address)
        found.append(Allowance(item, what, f"address {address} {what}"))
    return found


class Meter:
    def __init__(self) -> None:
        kept = MemoryStorage()
        # Of requests every one is remembered, so that it is known when the next one may come.
        self._limiters: dict[str, RateLimiter] = {
            REQUESTS: MovingWindowRateLimiter(kept),
            TOKENS: SlidingWindowCounterRateLimiter(kept),
        }

    def over(self, of: Sequence[Allowance]) -> Allowance | None:
        """The first of them that is used up."""
        return next((it for it in of if not self._limiters[it.what].test(it.item, it.of)), None)

    def take(self, of: Sequence[Allowance], amount: int) -> None:
        for it in of:
            # A cost over what is left would not be counted at all.
            limiter = self._limiters[it.what]
            left = limiter.get_window_stats(it.item, it.of).remaining
            if cost := min(amount, left):
                limiter.hit(it.item, it.of, cost=cost)

    def retry_after(self, over: Allowance) -> int:
        """Seconds until there is something of it again, at least 1."""
        reset = self._limiters[over.what].get_window_stats(over.item, over.of).reset_time
        return max(ceil(reset - time.time()), 1)
