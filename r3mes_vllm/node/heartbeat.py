"""The node's place in the network: registered at the backend, with a beat every 30 s."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from r3mes_vllm import __version__
from r3mes_vllm.errors import BackendError, BackendRefused
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.report import say, warn
from r3mes_vllm.versions import is_older
from r3mes_vllm.wire import ACTIVE, DRAINING, OFFLINE, Heartbeat, RegisterNode, Told

_FIRST_RETRY_S = 1.0
_FAREWELL_S = 3.0
_JITTER = 0.1
_CALM_S = 3.0
"""Between two registrations: the existing backend takes 20 requests a minute."""


class Registration:
    """Registers, beats, registers again when the backend forgot the node; never gives up.

    `describe` gives the registration as it is now, `load` the number of requests in flight.
    """

    def __init__(
        self,
        client: BackendClient,
        describe: Callable[[], RegisterNode],
        load: Callable[[], int],
        interval_s: float,
    ) -> None:
        self._client = client
        self._describe = describe
        self._load = load
        self._interval = interval_s
        self._registered = False
        self._known = False
        """To the backend, perhaps with other adapters than it has now."""
        self._registered_at = -_CALM_S
        self._outdated = asyncio.Event()
        self.beats: Counter[str] = Counter()
        """And registrations, by outcome."""
        self.accepted_at: float | None = None
        """The last one, by `time.monotonic`."""
        self.trouble = ""
        """Why the last try failed; empty if it did not."""
        self.upgrade = ""
        """Why another version should be installed; empty if nothing is known of one."""
        self.outdated = False
        """The backend sends nothing to a node of this version."""

    def adapters_changed(self) -> None:
        """Register again soon: the existing backend learns of a node's adapters in no other way."""
        self._outdated.set()

    async def drain(self) -> None:
        """Tell the backend to send this node nothing more."""
        if self._known:
            with suppress(BackendError, TimeoutError):
                async with asyncio.timeout(_FAREWELL_S):
                    await self._beat(DRAINING)

    async def goodbye(self) -> None:
        """Tell the backend that this node is gone; an absent backend costs seconds at most."""
        if not self._known:
            return
        self._known = False
        with suppress(BackendError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                # The existing backend has no deregister route: the last beat takes the node off
                # its list.
                await self._beat(OFFLINE)
                await self._client.deregister(self._describe().wallet_address)

    async def run(self) -> None:
        """Register and beat until cancelled."""
        delay = _FIRST_RETRY_S
        while True:
            try:
                await (self._beat() if self._registered else self._register())
                self.beats["accepted"] += 1
                self.accepted_at = time.monotonic()
                self.trouble = ""
                pause, delay = self._interval, _FIRST_RETRY_S
            except BackendError as error:
                refused = error if isinstance(error, BackendRefused) else None
                self.beats["refused" if refused else "unreachable"] += 1
                if refused and refused.answered == 404 and self._registered:
                    self._registered = False  # it forgot us: register without waiting
                    continue
                self._complain(error)
                if refused and refused.retry_after:  # who is silent for longer is off the list
                    pause = min(refused.retry_after / (1 - _JITTER), self._interval)
                elif refused and refused.answered < 500:
                    pause = self._interval
                else:  # one lost beat and a wait of as long again would take the node off the list
                    pause, delay = delay, min(delay * 2, self._interval)
            await self._rest(pause * random.uniform(1 - _JITTER, 1))  # noqa: S311

    async def _rest(self, seconds: float) -> None:
        def too_early() -> float:
            return self._registered_at + _CALM_S - time.monotonic()

        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._outdated.wait()
                await asyncio.sleep(too_early())
        if self._registered and self._outdated.is_set() and too_early() <= 0:
            self._registered = False

    async def _register(self) -> None:
        self._outdated.clear()
        node = self._describe()
        self._registered_at = time.monotonic()
        told = await self._client.register(node)
        self._registered = self._known = True
        say(
            f"Serving node registered with {self._client.url} as {node.endpoint_url} "
            f"(wallet {node.wallet_address})"
        )
        self._heed(told)

    async def _beat(self, status: str = ACTIVE) -> None:
        node = self._describe()
        told = await self._client.beat(
            Heartbeat(
                wallet_address=node.wallet_address,
                status=status,
                current_load=self._load(),
                adapters=node.adapters,
                version=__version__,
            )
        )
        self._heed(told)

    def _heed(self, told: Told) -> None:
        """What the backend says of versions; each change is said once."""
        before, self.upgrade = self.upgrade, ""
        self.outdated = is_older(__version__, told.required_version)
        if self.outdated:
            self.upgrade = (
                f"the backend sends no requests to nodes before version {told.required_version}, "
                f"and this is {__version__}"
            )
        elif is_older(__version__, told.latest_version):
            self.upgrade = f"version {told.latest_version} is out, and this is {__version__}"
        if self.upgrade and self.upgrade != before:
            warn(
                f"{self.upgrade}; try: git pull && make setup, or pull the newer image; then start "
                "the node again"
            )

    def _complain(self, error: BackendError) -> None:
        """The first of a row of equal failures is enough for a reader."""
        if error.message != self.trouble:
            warn(f"not registered: {error}; trying again, serving meanwhile")
        self.trouble = error.message
