"""What the network has told the backend, kept in a database: adapters and nodes.

Every write is one transaction that begins with its write, so that concurrent callers, in this
process or another, wait for each other instead of failing or overwriting.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Table as SqlTable
from sqlalchemy import select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from r3mes_vllm import wire
from r3mes_vllm.backend.database import (
    LoraRow,
    LoraVersionRow,
    NodeRow,
    Table,
    database_url,
    open_engine,
)
from r3mes_vllm.errors import ConfigError

_LORAS: Any = LoraRow.__table__
_VERSIONS: Any = LoraVersionRow.__table__
_NODES: Any = NodeRow.__table__


class Registry:
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str | None) -> "AsyncIterator[Registry]":
        """Connect to `url` (see `database_url`) and make the tables that are missing.

        Raises ConfigError if that can't be done.
        """
        where = database_url(url)
        engine = open_engine(where)
        try:
            try:
                async with engine.begin() as connection:
                    await connection.run_sync(Table.metadata.create_all)
            except (SQLAlchemyError, OSError) as error:
                shown = where.render_as_string(hide_password=True)
                cause = getattr(error, "orig", None) or error
                raise ConfigError(
                    f"can't open the database {shown}: {cause}",
                    hint="check --database-url, and that its directory exists and is writable",
                ) from error
            yield cls(engine)
        finally:
            await engine.dispose()

    @property
    def where(self) -> str:
        """The database's URL without its password."""
        return self._engine.url.render_as_string(hide_password=True)

    async def ping(self) -> None:
        """Raise SQLAlchemyError if the database doesn't answer."""
        async with self._engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    async def register_lora(self, lora: wire.RegisterLora, now: datetime) -> tuple[int, bool]:
        """Upsert by name. Returns the id, and whether it is new."""
        values = lora.model_dump()
        async with self._engine.begin() as connection:
            lora_id, created = await self._upsert(
                connection, _LORAS, _LORAS.c.name, values | {"is_active": True}, now
            )
            version = {
                "lora_id": lora_id,
                "ipfs_hash": lora.ipfs_hash,
                "version": lora.version,
                "registered_at": now,
            }
            await connection.execute(
                self._insert(_VERSIONS).values(version).on_conflict_do_nothing()
            )
        return lora_id, created

    async def loras(self, *, active_only: bool = True) -> list[wire.Lora]:
        """All adapters in the order they were first registered."""
        query = select(_LORAS).order_by(_LORAS.c.id)
        if active_only:
            query = query.where(_LORAS.c.is_active)
        return [wire.Lora(**row) for row in await self._rows(query)]

    async def lora(self, name: str) -> wire.Lora | None:
        query = select(_LORAS).where(_LORAS.c.name == name, _LORAS.c.is_active)
        rows = await self._rows(query)
        return wire.Lora(**rows[0]) if rows else None

    async def register_node(self, node: wire.RegisterNode, now: datetime) -> tuple[int, bool]:
        """Upsert by wallet; registering is a beat too. Returns the id, and whether it is new."""
        values = node.model_dump() | {
            "status": wire.ACTIVE,
            "current_load": 0.0,
            "last_heartbeat": now,
        }
        async with self._engine.begin() as connection:
            return await self._upsert(connection, _NODES, _NODES.c.wallet_address, values, now)

    async def beat(self, beat: wire.Heartbeat, now: datetime) -> bool:
        """Note that a node lives, and what it holds now if it says so; False if it is unknown."""
        changed = {
            "status": beat.status,
            "current_load": beat.current_load,
            "last_heartbeat": now,
        } | ({"version": beat.version} if beat.version is not None else {})
        this = _NODES.c.wallet_address == beat.wallet_address
        async with self._engine.begin() as connection:
            returning = update(_NODES).where(this).values(changed).returning(_NODES)
            row = (await connection.execute(returning)).mappings().first()
            if row is not None and beat.adapters is not None:
                names = _names_after(row["available_lora_list"], row["adapters"], beat.adapters)
                held = {"available_lora_list": names, "adapters": beat.adapters}
                await connection.execute(update(_NODES).where(this).values(held))
        return row is not None

    async def deregister_node(self, wallet: str) -> bool:
        """Take a node out of routing until it beats or registers; False if it is unknown."""
        query = (
            update(_NODES)
            .where(_NODES.c.wallet_address == wallet)
            .values(status=wire.OFFLINE)
            .returning(_NODES.c.id)
        )
        async with self._engine.begin() as connection:
            return (await connection.execute(query)).first() is not None

    async def live_nodes(
        self, now: datetime, max_age_s: float = wire.HEARTBEAT_TIMEOUT_S
    ) -> list[wire.Node]:
        """The active nodes whose last beat is under `max_age_s` seconds old."""
        oldest = now - timedelta(seconds=max_age_s)
        query = select(_NODES).where(
            _NODES.c.status == wire.ACTIVE, _NODES.c.last_heartbeat > oldest
        )
        return await self._nodes(query)

    async def all_nodes(self) -> list[wire.Node]:
        """Every node that ever registered, dead ones included."""
        return await self._nodes(select(_NODES))

    async def _nodes(self, query: Any) -> list[wire.Node]:
        return [wire.Node(**row) for row in await self._rows(query.order_by(_NODES.c.id))]

    async def _rows(self, query: Any) -> Sequence[Any]:
        async with self._engine.connect() as connection:
            return (await connection.execute(query)).mappings().all()

    async def _upsert(
        self,
        connection: AsyncConnection,
        table: SqlTable,
        key: Any,
        values: dict[str, Any],
        now: datetime,
    ) -> tuple[int, bool]:
        """Insert, else update by `key`. Rows are never deleted, so one of the two succeeds."""
        insert = self._insert(table).values(values | {"created_at": now})
        inserted = await connection.execute(insert.on_conflict_do_nothing().returning(table.c.id))
        new_id: int | None = inserted.scalar()
        if new_id is not None:
            return new_id, True
        change = update(table).where(key == values[key.name]).values(values)
        changed: int = (await connection.execute(change.returning(table.c.id))).scalar_one()
        return changed, False

    def _insert(self, table: SqlTable) -> "sqlite.Insert | postgresql.Insert":
        if self._engine.dialect.name == "postgresql":
            return postgresql.insert(table)
        return sqlite.insert(table)


def _names_after(listed: list[str], before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The names a node lists once its CIDs go from `before` to `after`; a name it listed without
    a CID is untouched."""
    kept = [name for name in listed if name in after or name not in before]
    return kept + [name for name in after if name not in kept]
