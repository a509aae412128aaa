"""The adapters of this node: what the engine has of each, and which requests hold it.

    absent → fetching → vetted → staged → resident → draining → gone

A request holds one version of an adapter from the moment its name is understood until its answer
has ended. What is held is neither taken off the engine nor off the disk, whatever its name leads to
by then. The engine has room for `room` adapters beside its slots; which of them stay is decided
here, so that vLLM never drops one by itself and reads it again between two tokens.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest

from r3mes_vllm.adapters.supply import Obtained
from r3mes_vllm.engine import staging
from r3mes_vllm.engine.failures import Failures
from r3mes_vllm.engine.names import BY_CID, Held, HeldNames, held
from r3mes_vllm.engine.version import State, Version
from r3mes_vllm.errors import (
    AdapterNotReady,
    AdapterRefused,
    BadCID,
    DiskFull,
    EngineError,
    R3mesError,
    StorageFull,
    UnknownAdapter,
)
from r3mes_vllm.ipfs.cid import CID

LOAD_TIMEOUT_S = 120.0
REMOVE_TIMEOUT_S = 30.0
_MOST_GONE = 32

Obtain = Callable[[CID], Awaitable[Obtained]]
"""Fetch, verify, vet and lease. Raises IpfsError, AdapterError, StorageFull."""

Lookup = Callable[[str], Awaitable[CID]]
"""What a name that isn't hosted stands for. Raises UnknownAdapter."""


class Host:
    """`load_wait_s` is how long a request waits for an adapter that is not here yet; at most
    `loads` of them are fetched at a time. With `allow_cid`, `ipfs://CID` is a name."""

    def __init__(
        self,
        engine: EngineClient,
        models: OpenAIServingModels,
        obtain: Obtain,
        lookup: Lookup,
        *,
        room: int,
        load_wait_s: float = 20.0,
        loads: int = 64,
        allow_cid: bool = False,
    ) -> None:
        self.changed: Callable[[], None] = lambda: None
        """Called when a name begins or ceases to lead to a version."""
        self.loads: Counter[str] = Counter(done=0, failed=0)
        """Onto the engine, by outcome."""
        self.failures = Failures()
        self.timed: Callable[[str, float], None] = lambda phase, seconds: None
        """Called with the seconds of each phase of a load."""
        self._engine = engine
        self._models = models
        self._obtain = obtain
        self._lookup = lookup
        self._room = room
        self._load_wait = load_wait_s
        self._most_loads = loads
        self._allow_cid = allow_cid
        self._names: dict[str, Version] = {}
        self._versions: dict[str, Version] = {}
        self._gone: deque[Version] = deque(maxlen=_MOST_GONE)
        self._loading: dict[Version, asyncio.Task[None]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._engine_lock = asyncio.Lock()
        """Over which adapters the engine has; one is put on or taken off at a time."""
        self._let_go = asyncio.Event()
        self._puts: dict[str, object] = {}
        self._removed: set[str] = set()
        """Names that the operator took away: a request does not bring them back."""
        self._left_out: dict[str, str] = {}
        """CIDs that the engine refused in `add`, by name."""
        models.lora_requests = HeldNames()
        # Answers carry the name that was asked for, not the internal `name@cid`.
        models.model_name = self._model_name

    async def aclose(self) -> None:
        """End what is under way; the leases end with it."""
        tasks = [*self._loading.values(), *self._retiring]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for version in self._versions.values():
            if version.obtained:
                version.obtained.lease.release()
        self._versions.clear()
        self._names.clear()

    @property
    def adapters(self) -> dict[str, Version]:
        """By name; all of them can answer at once or after a load from this machine's disk."""
        return dict(self._names)

    @property
    def being_put(self) -> set[str]:
        """Names that `put` will let lead elsewhere as soon as it can."""
        return set(self._puts)

    @property
    def versions(self) -> list[Version]:
        """All that is here, and the last that have gone."""
        return [*self._versions.values(), *self._gone]

    @property
    def base_model(self) -> str:
        return str(self._models.base_model_paths[0].name)

    def is_base(self, name: str | None) -> bool:
        return not name or bool(self._models.is_base_model(name))

    def find(self, name: str) -> Version | None:
        """Of what is hosted, by `name` or `name@cid`."""
        plain, _, cid = name.partition("@")
        version = self._names.get(plain)
        return version if version and cid in ("", version.cid) else None

    async def add(self, name: str, obtained: Obtained, *, keep: bool = True) -> Version:
        """Serve what is in the store already as `name` and `name@cid`; put it on the engine while
        there is room. Raises AdapterRefused when the engine will not load it, EngineError; what
        the engine can't load now is loaded by its first request."""
        version = self._version(name, str(obtained.cid), keep=keep)
        if version.obtained is None:
            version.obtained = obtained
            version.became(State.VETTED)
        else:
            obtained.lease.release()  # known under another name
        if self._on_engine() < self._room:
            try:
                await self._load(version)
            except AdapterNotReady:
                pass
            except AdapterRefused as error:
                self.failures.note(version.cid, error)
                self._left_out[name] = version.cid
                if not version.names:
                    self._forget(version)
                raise
        self._point(name, version)
        return version

    async def put(self, name: str, cid: CID, *, keep: bool = True) -> Version:
        """Fetch, vet and stage `cid`, then let `name` lead to it; requests that hold the version
        before go on with that. Raises what `hold` raises, but waits as long as it takes; and
        AdapterNotReady when the name was put or removed once more meanwhile."""
        mine = self._puts[name] = object()
        self.failures.forget(str(cid))
        self._removed.discard(name)
        version = self._version(name, str(cid), keep=keep)
        version.keep |= keep
        try:
            with self._held(version):
                if not version.on_engine:
                    await asyncio.shield(self._loaded(version))
                if self._puts.get(name) is not mine:
                    raise AdapterNotReady(
                        f"{name!r} was put or removed once more meanwhile",
                        hint="GET /adapters shows what it leads to",
                    )
                self._point(name, version)
        finally:
            if self._puts.get(name) is mine:
                del self._puts[name]
        return version

    def remove(self, name: str) -> Version:
        """Let the name lead nowhere, until it is put again; the version leaves the engine when
        nothing holds it any more. Raises UnknownAdapter."""
        version = self._names.get(name)
        if version is None:
            raise UnknownAdapter(f"no adapter {name[:200]!r} here", hint=self._served())
        self._puts.pop(name, None)
        self._removed.add(name)
        self._unpoint(name)
        return version

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[Version]:
        """The version that `name` leads to, loaded if need be, for as long as the context lasts;
        in it, vLLM's handlers find that version under `name`.

        Raises UnknownAdapter, AdapterNotReady when it takes longer than a request may wait, and
        what stands against it: IpfsError, AdapterRefused, StorageFull, EngineError.
        """
        version = self.find(name) or await self._wanted(name)
        with self._held(version):
            if not version.on_engine:
                await self._in_time(version)
            held.set(Held(name, version.request))
            try:
                yield version
            finally:
                held.set(None)

    def is_ready(self, name: str) -> bool:
        """Whether `hold` would not wait."""
        version = self.find(name)
        return version is not None and version.on_engine

    async def load(self, name: str) -> None:
        """As `hold`, held by nobody afterwards."""
        async with self.hold(name):
            pass

    async def models(self) -> dict[str, Any]:
        """OpenAI's list of models: base first. No path of this machine is in it."""
        listing = await self._models.registry.show_available_models()
        base = [card.model_dump() | {"root": card.id} for card in listing.data]
        adapters = [
            base[0] | {"id": name, "root": name, "parent": self.base_model, "cid": it.cid}
            for name, it in self._names.items()
        ]
        return {"object": "list", "data": base + adapters}

    async def look_at_slots(self) -> None:
        """Ask the workers which adapters are in a slot now."""
        slots = await staging.resident(self._engine)
        for version in self._versions.values():
            if version.state in (State.STAGED, State.RESIDENT):
                now = State.RESIDENT if version.lora_id in slots else State.STAGED
                if now is not version.state:
                    version.became(now)

    async def _wanted(self, name: str) -> Version:
        """Of a name that leads nowhere yet. Raises UnknownAdapter."""
        plain, _, asked_cid = name.partition("@")
        if self._allow_cid and name.startswith(BY_CID):
            try:
                cid = CID.parse(name.removeprefix(BY_CID))
            except BadCID as error:
                raise UnknownAdapter(str(error)) from error
        elif plain in self._names:
            here = self._names[plain].cid
            raise UnknownAdapter(f"{plain!r} is {here} here, not {asked_cid[:100]!r}")
        elif plain in self._removed:
            raise UnknownAdapter(f"{plain!r} was removed here", hint=self._served())
        else:
            try:
                cid = await self._lookup(plain)
            except UnknownAdapter:
                self.failures.raise_known(self._left_out.get(plain, ""))
                raise
            if asked_cid not in ("", str(cid)):
                raise UnknownAdapter(f"{plain!r} is {cid} now, not {asked_cid[:100]!r}")
        self.failures.raise_known(str(cid))
        return self._version(name if name.startswith(BY_CID) else plain, str(cid), keep=False)

    def _version(self, name: str, cid: str, *, keep: bool) -> Version:
        version = self._versions.get(cid)
        if version is None:
            number = self._models.lora_id_counter.inc(1)
            version = self._versions[cid] = Version(name, cid, number, keep)
            version.became(State.FETCHING)
        return version

    async def _in_time(self, version: Version) -> None:
        fetches = sum(it.obtained is None for it in self._loading)  # the others don't take long
        if version not in self._loading and not version.obtained and fetches >= self._most_loads:
            raise AdapterNotReady(f"{fetches} adapters are being loaded already", hint="try again")
        task = self._loaded(version)
        done, _ = await asyncio.wait({task}, timeout=self._load_wait)
        if not done:
            raise AdapterNotReady(
                f"adapter {version.name!r} is {version.state} and was not ready within "
                f"{self._load_wait:g} s",
                hint="it goes on; ask again",
            )
        task.result()

    def _loaded(self, version: Version) -> asyncio.Task[None]:
        """The one task that loads it; callers that leave don't end it."""
        task = self._loading.get(version)
        if task is None:
            task = self._loading[version] = asyncio.create_task(self._load(version))
            task.add_done_callback(lambda it: self._load_ended(version, it))
        return task

    def _load_ended(self, version: Version, task: asyncio.Task[None]) -> None:
        del self._loading[version]
        if task.cancelled():
            return
        error = task.exception()  # that nobody waits for it any more is no reason to log it
        if error is None:
            if version.names:
                return
            if version.name not in self._names.keys() | self._puts.keys() | self._removed:
                self._point(version.name, version)
            elif not version.uses:
                self._retire(version)
            return
        self.loads["failed"] += 1
        if isinstance(error, R3mesError):
            self.failures.note(version.cid, error)
        if not version.names:
            self._forget(version)

    async def _load(self, version: Version) -> None:
        if version.obtained is None:
            version.obtained = await self._obtain_with_room(CID.parse(version.cid))
            version.became(State.VETTED)
        async with self._engine_lock:
            if version.on_engine:
                return
            await self._make_room()
            await staging.load(self._engine, version.request, LOAD_TIMEOUT_S, self.timed)
            version.on_engine = True
            self.loads["done"] += 1
            version.used_at = time.monotonic()
            version.became(State.STAGED)

    async def _obtain_with_room(self, cid: CID) -> Obtained:
        """While the cache is full of what is leased here, give up what was idle for longest."""
        while True:
            try:
                return await self._obtain(cid)
            except DiskFull:  # perhaps of others' files
                raise
            except StorageFull:
                idle = [it for it in self._versions.values() if self._can_go(it)]
                if not idle:
                    raise
            oldest = min(idle, key=lambda it: it.used_at)
            for name in tuple(oldest.names):
                self._unpoint(name)
            await self._end(oldest)

    def _can_go(self, version: Version) -> bool:
        busy = version.keep or version.uses or version in self._loading
        return version.obtained is not None and not busy

    def _on_engine(self) -> int:
        return sum(it.on_engine for it in self._versions.values())

    async def _make_room(self) -> None:
        """Take off the engine what was not used for longest; wait while all is in use."""
        while self._on_engine() >= self._room:
            idle = [it for it in self._versions.values() if it.on_engine and not it.uses]
            if idle:
                await self._take_off(min(idle, key=lambda it: it.used_at))
                continue
            self._let_go.clear()
            await self._let_go.wait()

    async def _take_off(self, version: Version) -> None:
        """Nothing holds it; the memory that the engine has of it is free afterwards."""
        version.on_engine = False
        try:
            await asyncio.wait_for(self._engine.remove_lora(version.lora_id), REMOVE_TIMEOUT_S)
        except TimeoutError as error:
            raise EngineError(
                f"the engine did not let go of {version.name!r} in {REMOVE_TIMEOUT_S:.0f} s"
            ) from error
        if version.names and not version.keep and not version.uses:
            for name in tuple(version.names):
                self._unpoint(name)
        elif version.names or version.uses:
            version.became(State.VETTED)

    @contextmanager
    def _held(self, version: Version) -> Iterator[None]:
        version.uses += 1
        try:
            yield
        finally:
            version.uses -= 1
            version.used_at = time.monotonic()
            if not version.uses:
                self._let_go.set()
                if not version.names and version not in self._loading:
                    self._retire(version)

    def _point(self, name: str, version: Version) -> None:
        before = self._names.get(name)
        if before is version:
            return
        self._names[name] = version
        version.names.add(name)
        if version.state is State.DRAINING:
            version.became(State.STAGED if version.on_engine else State.VETTED)
        if before is not None:
            self._leave(before, name)
        self.changed()

    def _unpoint(self, name: str) -> None:
        self._leave(self._names.pop(name), name)
        self.changed()

    def _leave(self, version: Version, name: str) -> None:
        version.names.discard(name)
        if not version.names:
            version.became(State.DRAINING)
            if not version.uses:
                self._retire(version)

    def _retire(self, version: Version) -> None:
        task = asyncio.create_task(self._end(version))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _end(self, version: Version) -> None:
        async with self._engine_lock:
            if version.uses or version.names or version in self._loading:
                return  # it is wanted again
            if version.state is State.GONE:
                return  # another call was quicker
            self._versions.pop(version.cid, None)  # whoever wants it now gets another number
            try:
                if version.on_engine:
                    await self._take_off(version)
            finally:
                self._forget(version)

    def _forget(self, version: Version) -> None:
        """Give up its place on disk, once."""
        if version.state is State.GONE:
            return
        if self._versions.get(version.cid) is version:
            del self._versions[version.cid]
        version.became(State.GONE)
        if version.obtained:
            version.obtained.lease.release()
            self._gone.append(version)

    def _model_name(self, lora_request: LoRARequest | None = None) -> str:
        it = held.get()
        if lora_request is None or it is None:
            return self.base_model
        return it.asked.partition("@")[0]

    def _served(self) -> str:
        return f"served are: {', '.join(self._names) or 'none'}"
