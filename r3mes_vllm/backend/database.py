"""The tables, and an engine for SQLite or PostgreSQL.

Times are UTC. JSON columns hold what a node said about itself.
"""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import platformdirs
from sqlalchemy import (
    JSON,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    event,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from r3mes_vllm.errors import ConfigError

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
}
_BUSY_TIMEOUT_MS = 10_000


class Instant(TypeDecorator[datetime]):
    """An aware datetime in UTC, also where the database keeps no zone (SQLite)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        read: datetime = value
        return read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)


class Table(DeclarativeBase):
    pass


class LoraRow(Table):
    __tablename__ = "loras"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    ipfs_hash: Mapped[str] = mapped_column(String(256))
    description: Mapped[str] = mapped_column(Text)
    category: Mapped[str] = mapped_column(String(128))
    version: Mapped[str] = mapped_column(String(128))
    is_active: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[datetime] = mapped_column(Instant)


class LoraVersionRow(Table):
    """Each content an adapter's name has stood for, and since when."""

    __tablename__ = "lora_versions"
    __table_args__ = (UniqueConstraint("lora_id", "ipfs_hash", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    lora_id: Mapped[int] = mapped_column(ForeignKey("loras.id"))
    ipfs_hash: Mapped[str] = mapped_column(String(256))
    version: Mapped[str] = mapped_column(String(128))
    registered_at: Mapped[datetime] = mapped_column(Instant)


class NodeRow(Table):
    __tablename__ = "nodes"

    id: Mapped[int] = mapped_column(primary_key=True)
    wallet_address: Mapped[str] = mapped_column(String(64), unique=True)
    endpoint_url: Mapped[str] = mapped_column(Text)
    available_lora_list: Mapped[list[str]] = mapped_column(JSON)
    adapters: Mapped[dict[str, str]] = mapped_column(JSON)
    base_model: Mapped[str | None] = mapped_column(Text)
    version: Mapped[str | None] = mapped_column(String(128))
    status: Mapped[str] = mapped_column(String(32))
    current_load: Mapped[float] = mapped_column(Float)
    last_heartbeat: Mapped[datetime] = mapped_column(Instant, index=True)
    created_at: Mapped[datetime] = mapped_column(Instant)


def database_url(given: str | None) -> URL:
    """`given` with its async driver; without it, SQLite in the user's data directory, which is
    made. Raises ConfigError for a database that is neither SQLite nor PostgreSQL."""
    if not given:
        path = Path(platformdirs.user_data_dir("r3mes-vllm"), "backend.sqlite3")
        path.parent.mkdir(parents=True, exist_ok=True)
        return URL.create(_DRIVERS["sqlite"], database=str(path))
    try:
        url = make_url(given)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(
            "database_url is no database URL",
            hint="such as sqlite:////var/lib/r3mes.sqlite3 or postgresql://user@host/r3mes",
        ) from error
    driver = _DRIVERS.get(url.drivername, url.drivername)
    if driver not in _DRIVERS.values():
        raise ConfigError(
            f"database_url: {url.drivername} is not supported", hint="use sqlite or postgresql"
        )
    return url.set(drivername=driver)


def open_engine(url: URL) -> AsyncEngine:
    """An engine for `url`; nothing is connected yet. Raises ConfigError without its driver or,
    for SQLite, without a folder to write to."""
    if url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:"):
        # aiosqlite's thread prints a traceback of its own when it can't open the file.
        folder = Path(str(url.database)).absolute().parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"can't open the database {url.database}: no writable folder {folder}",
                hint="make it, or pass another --database-url",
            )
    try:
        engine = create_async_engine(url, pool_pre_ping=True)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the driver {error.name} is not installed", hint=f"pip install {error.name}"
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()
