"""Transactions that change the registry: one after the other, in whatever backend they are."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import Table, and_, delete, text, true, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from r3mes_vllm.backend.database import ERRORS
from r3mes_vllm.backend.refusals import DatabaseDown

CHANNEL = "r3mes_registry"
"""Of PostgreSQL's notifications: each change is told there at its end."""

_COUNT = "UPDATE registry_revision SET value = value + 1 RETURNING value"
_COUNT_AND_TELL = f"{_COUNT}, pg_notify('{CHANNEL}', :by)"


@contextmanager
def errors_said() -> Iterator[None]:
    """Raise DatabaseDown for what a database that does not answer raises."""
    try:
        yield
    except ERRORS as error:
        raise DatabaseDown(
            f"the registry's database failed: {type(error).__name__}", hint="try again shortly"
        ) from error


class Change:
    def __init__(self, connection: AsyncConnection, revision: int) -> None:
        self.connection = connection
        self.revision = revision

    async def first(self, query: Any) -> Any:
        """The first row of what `query` gives, or None."""
        return (await self.connection.execute(query)).mappings().first()

    async def all(self, query: Any) -> Sequence[Any]:
        return (await self.connection.execute(query)).mappings().all()

    async def update(self, table: Table, where: Any, values: dict[str, Any]) -> Sequence[Any]:
        """The rows that meet `where`, changed."""
        values = values | {"revision": self.revision}
        return await self.all(update(table).where(where).values(values).returning(table))

    async def delete(self, told: Any, where: Any) -> Sequence[Any]:
        """What the rows that met `where` had in the column `told`."""
        query = delete(told.table).where(where).returning(told)
        return (await self.connection.execute(query)).scalars().all()

    async def upsert(
        self,
        table: Table,
        key: Any,
        values: dict[str, Any],
        now: datetime,
        where: Any = None,
    ) -> tuple[Any, bool]:
        """Insert, else update by `key`; the row, and whether it is new. Changes come one
        after the other, so there is none only where it does not meet `where`."""
        inserted = await self.first(
            self.insert(table)
            .values(values | {"created_at": now, "revision": self.revision})
            .on_conflict_do_nothing()
            .returning(table)
        )
        if inserted is not None:
            return inserted, True
        this = and_(key == values[key.name], true() if where is None else where)
        changed = await self.update(table, this, values)
        return (changed[0] if changed else None), False

    def insert(self, table: Table) -> "sqlite.Insert | postgresql.Insert":
        if self.connection.dialect.name == "postgresql":
            return postgresql.insert(table)
        return sqlite.insert(table)


@asynccontextmanager
async def changing(engine: AsyncEngine, by: str) -> AsyncIterator[Change]:
    """A transaction that changes something. The other backends are told that backend `by` did.

    Raises DatabaseDown.
    """
    is_postgresql = engine.dialect.name == "postgresql"
    with errors_said():
        async with engine.begin() as connection:
            count = text(_COUNT_AND_TELL).bindparams(by=by) if is_postgresql else text(_COUNT)
            revision: int = (await connection.execute(count)).scalar_one()
            yield Change(connection, revision)


async def revision_of(connection: AsyncConnection) -> int:
    query = text("SELECT value FROM registry_revision")
    found: int = (await connection.execute(query)).scalar_one()
    return found


async def rows(engine: AsyncEngine, query: Any) -> Sequence[Any]:
    """Raises DatabaseDown."""
    with errors_said():
        async with engine.connect() as connection:
            return (await connection.execute(query)).mappings().all()
