"""What the network has told the backend, kept in a database: adapters and nodes.

Every write is one transaction that begins with its write, so that concurrent callers, in this
process or another, wait for each other instead of failing or overwriting. What is read comes from
memory (`View`); it has this backend's own writes at once, and others' as soon as they are told.
"""

import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import and_, select
from sqlalchemy.ext.asyncio import AsyncEngine

from r3mes_vllm import wire
from r3mes_vllm.backend import claims, loras
from r3mes_vllm.backend.database import ERRORS, NodeRow, database_url, open_engine
from r3mes_vllm.backend.following import Follower
from r3mes_vllm.backend.known import KnownLora, KnownNode, known, known_lora
from r3mes_vllm.backend.loras import MOST_VERSIONS, Author
from r3mes_vllm.backend.migrate import upgrade
from r3mes_vllm.backend.refusals import Replayed, WrongKey
from r3mes_vllm.backend.view import View
from r3mes_vllm.backend.writing import Change, changing, rows
from r3mes_vllm.errors import DatabaseUnreachable, R3mesError
from r3mes_vllm.signatures import Claim

_NODES: Any = NodeRow.__table__
_AT_ONCE = 200
"""Nodes in a transaction: others wait for its end."""


def now_utc() -> datetime:
    return datetime.now(UTC)


class Registry:
    """Every write raises DatabaseDown."""

    def __init__(self, engine: AsyncEngine, view: View, name: str) -> None:
        self._engine = engine
        self._view = view
        self._name = name

    @classmethod
    @asynccontextmanager
    async def open(
        cls, url: str | None, clock: Callable[[], datetime] = now_utc
    ) -> "AsyncIterator[Registry]":
        """Connect to `url` (see `database_url`) and bring its tables to this version.

        Raises DatabaseUnreachable if that can't be done, ConfigError for no URL of a database.
        """
        where = database_url(url)
        engine, view, name = open_engine(where), View(), uuid.uuid4().hex
        try:
            async with aclosing(Follower(engine, view, clock, name)) as follower:
                try:
                    async with engine.begin() as connection:
                        await connection.run_sync(upgrade)
                    await follower.start()
                except ERRORS as error:
                    shown = where.render_as_string(hide_password=True)
                    cause = getattr(error, "orig", None) or error
                    raise DatabaseUnreachable(
                        f"can't open the database {shown}: {cause}",
                        hint="check --database-url; that its server runs, or that its directory "
                        "exists and is writable",
                    ) from error
                yield cls(engine, view, name)
        finally:
            await engine.dispose()

    @property
    def where(self) -> str:
        """The database's URL without its password."""
        return self._engine.url.render_as_string(hide_password=True)

    @property
    def down_since(self) -> datetime | None:
        """When the database last answered, if it does not now."""
        return self._view.outages.since

    async def register_lora(
        self, lora: wire.RegisterLora, now: datetime, author: Author
    ) -> tuple[int, bool]:
        """Upsert by name. Returns the id, and whether it is new. Raises as `loras.refusal`."""
        async with self._changing() as change:
            row, created = await loras.register(change, lora, now, author)
        self._view.put_lora(known_lora(row))
        return row["id"], created

    async def set_lora_active(self, name: str, author: Author, *, active: bool) -> int:
        """Returns the id. Raises UnknownAdapter, and as `loras.refusal`."""
        async with self._changing() as change:
            row = await loras.set_active(change, name, author, active=active)
        self._view.put_lora(known_lora(row))
        found: int = row["id"]
        return found

    async def lora_versions(self, name: str) -> list[wire.LoraVersion]:
        """What `name` has stood for, the latest first, at most `MOST_VERSIONS`. Raises
        UnknownAdapter and DatabaseDown."""
        lora = self._view.lora(name)
        if lora is None:
            raise loras.unknown(name)
        return (await self.latest_versions([lora], MOST_VERSIONS))[name]

    async def latest_versions(
        self, of: Collection[KnownLora], most: int
    ) -> dict[str, list[wire.LoraVersion]]:
        """The same by name, at most `most` of each. Raises DatabaseDown."""
        by_id = {lora.id: lora for lora in of}
        found: dict[str, list[wire.LoraVersion]] = {lora.name: [] for lora in of}
        for row in await rows(self._engine, loras.versions_of(list(by_id), most)):
            lora = by_id[row["lora_id"]]
            current = (row["ipfs_hash"], row["version"]) == (lora.ipfs_hash, lora.version)
            found[lora.name].append(wire.LoraVersion(**row, current=current))
        return found

    async def loras(self, *, active_only: bool = True) -> list[KnownLora]:
        """All adapters in the order they were first registered."""
        return self._view.loras(active_only=active_only)

    def loras_json(
        self, *, active_only: bool = True, category: str | None = None
    ) -> tuple[bytes, str | None]:
        """The same as JSON, and its entity tag; or those of a category."""
        if category is None:
            return self._view.loras_json(active_only=active_only)
        found = self._view.loras(active_only=active_only)
        return self._view.dump(lora for lora in found if lora.category == category), None

    async def lora(self, name: str) -> KnownLora | None:
        return self.lora_now(name)

    def is_deactivated(self, name: str) -> bool:
        found = self._view.lora(name)
        return found is not None and not found.active

    def is_registered(self, name: str) -> bool:
        """Also if it is deactivated."""
        return self._view.lora(name) is not None

    def lora_now(self, name: str) -> KnownLora | None:
        """None also if it is deactivated."""
        found = self._view.lora(name)
        return found if found and found.active else None

    def nodes_json(self, nodes: Sequence[KnownNode]) -> bytes:
        return self._view.nodes_json(nodes)

    async def register_node(
        self, node: wire.RegisterNode, now: datetime, claim: Claim | None = None
    ) -> tuple[int, bool]:
        """Upsert by wallet; registering is a beat too. Returns the id, and whether it is new.

        The first `claim` binds the wallet to its key. Raises WrongKey and Replayed.
        """
        oldest = self._view.outages.oldest(now, wire.HEARTBEAT_TIMEOUT_S)
        free = claims.may_register(claim, node.wallet_address, oldest)
        values = (
            node.model_dump()
            | {"status": wire.ACTIVE, "current_load": 0.0, "last_heartbeat": now}
            | claims.claimed(claim)
        )
        wallet = _NODES.c.wallet_address
        async with self._changing() as change:
            row, created = await change.upsert(_NODES, wallet, values, now, where=free)
            if row is None:
                refusal = await _refusal(change, node.wallet_address, claim)
                raise refusal or WrongKey(
                    f"{node.wallet_address} is in use by a node that does not sign",
                    hint=f"it is free {wire.HEARTBEAT_TIMEOUT_S} s after that node's last beat",
                )
        self._view.put_node(known(row))
        return row["id"], created

    async def beat(
        self, beat: wire.Heartbeat, now: datetime, claim: Claim | None = None
    ) -> KnownNode | None:
        """Note that a node lives, and what it holds now if it says so; None if it is unknown, or
        signs now and has not registered so. Raises WrongKey and Replayed."""
        changed = {
            "status": beat.status,
            "current_load": beat.current_load,
            "last_heartbeat": now,
        } | ({"version": beat.version} if beat.version is not None else {})
        async with self._changing() as change:
            row = await _change(change, beat.wallet_address, changed, claim)
            if row is not None and beat.adapters is not None and beat.adapters != row["adapters"]:
                names = _names_after(row["available_lora_list"], row["adapters"], beat.adapters)
                held = {"available_lora_list": names, "adapters": beat.adapters}
                row = (await change.update(_NODES, _NODES.c.id == row["id"], held))[0]
        return self._noted(row)

    async def deregister_node(self, wallet: str, claim: Claim | None = None) -> bool:
        """Take a node out of routing until it beats or registers; False if it is unknown.

        Raises WrongKey and Replayed."""
        async with self._changing() as change:
            row = await _change(change, wallet, {"status": wire.OFFLINE}, claim)
        return self._noted(row) is not None

    async def forget_nodes(self, oldest: datetime, oldest_unproven: datetime) -> int:
        """Delete the nodes whose last beat is older than that, by whether they have proved their
        URL. Each backend of a database does so for its own memory. Returns how many were there."""
        found = self._view.silent(oldest, oldest_unproven)
        forgettable = claims.is_forgettable(oldest, oldest_unproven)
        wallet, gone = _NODES.c.wallet_address, dict[str, int]()
        for start in range(0, len(found), _AT_ONCE):
            some = found[start : start + _AT_ONCE]
            these = and_(wallet.in_([it.wallet_address for it in some]), forgettable)
            async with self._changing() as change:
                deleted = await change.delete(wallet, these)
            gone |= dict.fromkeys(deleted, change.revision)
            self._view.forget(some, gone)
        return len(found)

    async def note_proof(self, node: KnownNode, failure: str | None, now: datetime) -> None:
        """`node` was asked whether it lives at its URL; nothing is noted if it has moved since.

        A URL belongs to one key: others that proved it earlier have to do so again.
        """
        here = _NODES.c.endpoint_url == node.endpoint_url
        wallet, key = _NODES.c.wallet_address, _NODES.c.public_key
        this = and_(wallet == node.wallet_address, key == node.public_key, here)
        noted = {"proof_url": node.endpoint_url, "proof_failure": failure, "proof_at": now}
        async with self._changing() as change:
            changed = await change.update(_NODES, this, noted)
            if changed and failure is None:
                others = and_(wallet != node.wallet_address, here, _NODES.c.proof_failure.is_(None))
                changed = [*changed, *await change.update(_NODES, others, {"proof_url": None})]
        for row in changed:
            self._noted(row)

    async def live_nodes(
        self,
        now: datetime,
        max_age_s: float = wire.HEARTBEAT_TIMEOUT_S,
        *,
        listing: str | None = None,
    ) -> list[KnownNode]:
        """The active nodes whose last beat is under `max_age_s` seconds old; the time in which the
        database did not answer is left out. With `listing` those that list an adapter of that
        name."""
        return self._view.live_nodes(now, max_age_s, listing=listing)

    async def all_nodes(self) -> list[KnownNode]:
        """Every node that is not forgotten, dead ones included."""
        return self._view.nodes()

    async def node(self, wallet: str) -> KnownNode | None:
        return self._view.node(wallet)

    def _changing(self) -> AbstractAsyncContextManager[Change]:
        return changing(self._engine, self._name)

    def _noted(self, row: Any) -> KnownNode | None:
        if row is None:
            return None
        self._view.put_node(node := known(row))
        return node


async def _change(change: Change, wallet: str, changed: dict[str, Any], claim: Claim | None) -> Any:
    """The row of `wallet`, changed; None if it is unknown. Raises WrongKey and Replayed."""
    this = and_(_NODES.c.wallet_address == wallet, claims.may_change(claim))
    found: Sequence[Any] = await change.update(_NODES, this, changed | claims.claimed(claim))
    if not found and (refusal := await _refusal(change, wallet, claim)):
        raise refusal
    return found[0] if found else None


async def _refusal(change: Change, wallet: str, claim: Claim | None) -> R3mesError | None:
    """Why a request of `claim` could not change the row of `wallet`; None if there is no such
    row, or none that signs yet."""
    row = await change.first(select(_NODES.c.public_key).where(_NODES.c.wallet_address == wallet))
    if row is None or (key := row["public_key"]) is None:
        return None
    if claim is None:
        return WrongKey(f"{wallet} signs its requests, and this one has no signature")
    if claim.key.hex() != key:
        return WrongKey(f"{wallet} belongs to another key")
    return Replayed(
        "a request of this boot with this sequence or a later one, or of a later boot, "
        "was here before",
        hint="restart the node; if it comes back, a second node runs with the same key",
    )


def _names_after(listed: list[str], before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The names a node lists once its CIDs go from `before` to `after`; a name it listed without
    a CID is untouched."""
    kept = dict.fromkeys(name for name in listed if name in after or name not in before)
    return [*(kept | dict.fromkeys(after))]
