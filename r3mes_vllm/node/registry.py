"""What the backend's registry says of adapters, while the node runs.

A name that a request asks for is looked up here, and a name that got another CID is switched to it.
"""

import asyncio
import time
from collections.abc import Iterable

from r3mes_vllm.adapters.catalog import Catalog
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.engine.host import Host
from r3mes_vllm.engine.names import BY_CID
from r3mes_vllm.engine.version import Version
from r3mes_vllm.errors import (
    BackendError,
    BadCID,
    ConfigError,
    R3mesError,
    SourceFailed,
    UnknownAdapter,
)
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.node.backend_client import BackendClient, Listing
from r3mes_vllm.report import say, warn
from r3mes_vllm.settings import Settings

_FRESH_S = 5.0
"""For so long a name that is not in the list is unknown without asking the backend again."""


class Registry:
    """`fixed` are names for which the operator gave the CID: the registry does not change those."""

    def __init__(self, settings: Settings, supply: Supply, fixed: Iterable[str]) -> None:
        self.fixed = set(fixed)
        self._settings = settings
        self._supply = supply
        self._catalog = Catalog(settings.state_dir, None)
        self._listing: Listing | None = None
        self._read_at = float("-inf")
        self._lock = asyncio.Lock()
        self._complaints: dict[str, str] = {}
        self._switching: set[str] = set()
        self._prompts: dict[tuple[str, str], str] = {}
        """Of a name in the version with that CID."""

    def system_prompt(self, name: str, cid: str) -> str | None:
        """What the registry has an answer of this version of the adapter begin with."""
        return None if name in self.fixed else self._prompts.get((name, cid))

    def take_system_prompt(self, name: str, cid: CID) -> bool:
        """From now on it is what the registry has; whether it was another one before."""
        before = self._prompts.pop((name, str(cid)), None)
        try:
            now = self._catalog.system_prompt_of(name)
        except ConfigError as error:
            now = None
            self._complain(f"prompt of {name}", f"adapter {name!r} goes without: {error}")
        if now:
            self._prompts[name, str(cid)] = now
        return now != before

    async def lookup(self, name: str) -> CID:
        """Raises UnknownAdapter, and IpfsError when a path below a CID can't be followed."""
        if not self._settings.on_demand:
            raise UnknownAdapter(f"no adapter {name[:200]!r} here")
        try:
            place = self._catalog.place_of(name)
        except (UnknownAdapter, ConfigError, BadCID):
            await self._read(no_older_than_s=_FRESH_S)
            try:
                place = self._catalog.place_of(name)
            except BadCID as error:
                raise SourceFailed(f"the registry's adapter {name!r}: {error}") from error
            except (UnknownAdapter, ConfigError) as error:
                raise UnknownAdapter(  # the catalog's hints are for who starts the node
                    f"no adapter {name[:200]!r} here or in the registry"
                ) from error
        cid = await self._supply.resolve(place)
        self.take_system_prompt(name, cid)
        return cid

    async def follow(self, host: Host) -> None:
        """Switch names to the versions that the registry has, until cancelled; one that comes
        slowly keeps no other from being switched."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._read(no_older_than_s=self._settings.registry_refresh / 2)
                for name in set(host.adapters) - self.fixed - self._switching:
                    if not name.startswith(BY_CID):
                        self._switching.add(name)
                        group.create_task(self._switch(host, name))
                await asyncio.sleep(self._settings.registry_refresh)

    async def _switch(self, host: Host, name: str) -> None:
        try:
            cid = await self._supply.resolve(self._catalog.place_of(name))
            served = host.find(name)
            if served is None or name in host.being_put:
                return  # removed, or the operator's to say
            prompt_changed = self.take_system_prompt(name, cid)
            if served.cid != str(cid):
                await self._put(host, name, cid, served)
            elif prompt_changed:
                say(f"adapter {name!r} has another system prompt now")
                self._catalog.remember({name: cid})
        except UnknownAdapter:
            return  # no longer listed: no reason to stop serving it
        except R3mesError as error:
            self._complain(name, f"adapter {name!r} stays at its version: {error}")
        finally:
            self._switching.discard(name)

    async def _put(self, host: Host, name: str, cid: CID, served: Version) -> None:
        try:
            host.failures.raise_known(str(cid))
            await host.put(name, cid, keep=served.keep)
        except R3mesError:
            self._prompts.pop((name, str(cid)), None)
            raise
        self._prompts.pop((name, served.cid), None)
        say(f"adapter {name!r} is {cid} now; answers under way finish on {served.cid}")
        self._catalog.remember({name: cid})

    def _complain(self, of: str, text: str) -> None:
        """The first of a row of equal ones is enough for a reader."""
        if self._complaints.get(of) != text:
            warn(text)
        self._complaints[of] = text

    async def _read(self, *, no_older_than_s: float) -> None:
        async with self._lock:
            if time.monotonic() - self._read_at < no_older_than_s:
                return
            try:
                async with BackendClient.of(self._settings) as client:
                    listing = await client.listing(self._listing)
                if listing is not self._listing:
                    self._listing = listing
                    self._catalog = Catalog(self._settings.state_dir, listing.loras)
            except BackendError:
                pass  # the heartbeat says so
            except ConfigError as error:  # the file of certificates can be gone by now
                self._complain("the backend", f"its registry is not read: {error}")
            self._read_at = time.monotonic()
