"""How many requests to a model are at work, and whether there may be more."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

INFERENCE = ("/chat", "/v1/")
"""What the paths of requests to a model begin with."""


class Load:
    """Counted from a request's first byte to the last of its answer."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.running = 0
        self.draining = False
        """The node ends when none is left, and takes no new ones."""
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    async def idle(self) -> None:
        """Return when none is at work."""
        await self._idle.wait()
