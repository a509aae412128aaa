"""The tables, and an engine for SQLite or PostgreSQL. A change here needs a step in `migrations`.

Times are UTC. JSON columns hold what a node said about itself. `revision` is what `RevisionRow` was
when the row was last changed.
"""

import logging
import os
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import platformdirs
from sqlalchemy import (
    JSON,
    BigInteger,
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
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from r3mes_vllm.errors import ConfigError

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
}
Errors = tuple[type[Exception], ...]

_BUSY_TIMEOUT_MS = 10_000
_CONNECT_TIMEOUT_S = 5.0
_COMMAND_TIMEOUT_S = 10.0
_FROZEN_TIMEOUT_S = 5.0
"""A backend that is silent for so long within a transaction loses it: others wait for its end."""


def _errors() -> Errors:
    found: Errors = (SQLAlchemyError, OSError)
    try:
        import asyncpg
    except ModuleNotFoundError:
        return found
    return (*found, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


ERRORS = _errors()
"""What a database that does not answer raises; SQLAlchemy wraps nothing while it connects."""


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
    system_prompt: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(Instant)
    base_model: Mapped[str | None] = mapped_column(Text)
    size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    rank: Mapped[int | None]
    public_key: Mapped[str | None] = mapped_column(String(64))
    """Of the owner, hexadecimal; None if nobody signed when the name was registered."""
    boot: Mapped[str | None] = mapped_column(String(32))
    sequence: Mapped[int | None] = mapped_column(BigInteger)
    """Of the owner's last request that was taken."""
    deactivated_by: Mapped[str | None] = mapped_column(String(16))
    earlier: Mapped[list[str]] = mapped_column(JSON, server_default="[]")
    """CIDs that the name stood for, the latest first, of which none was withdrawn since."""
    revision: Mapped[int] = mapped_column(BigInteger, index=True, server_default="0")


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
    public_key: Mapped[str | None] = mapped_column(String(64))
    """Hexadecimal. Once it is there, it alone changes the row."""
    boot: Mapped[str | None] = mapped_column(String(32))
    sequence: Mapped[int | None] = mapped_column(BigInteger)
    """Of the last request that was taken."""
    access_key: Mapped[str | None] = mapped_column(Text)
    proof_url: Mapped[str | None] = mapped_column(Text)
    """The URL that was asked last for a proof that the key answers there."""
    proof_failure: Mapped[str | None] = mapped_column(Text)
    """None if it gave one."""
    proof_at: Mapped[datetime | None] = mapped_column(Instant)
    revision: Mapped[int] = mapped_column(BigInteger, index=True, server_default="0")


class RevisionRow(Table):
    """The one row counts the transactions that changed another table. Each begins by counting
    itself, and so waits for the end of the one before: who has read everything up to a number
    misses nothing below it."""

    __tablename__ = "registry_revision"

    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)


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
    in_memory = url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:")
    if url.get_backend_name() == "sqlite" and not in_memory:
        # aiosqlite's thread prints a traceback of its own when it can't open the file.
        folder = Path(str(url.database)).absolute().parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"can't open the database {url.database}: no writable folder {folder}",
                hint="make it, or pass another --database-url",
            )
        if not url.query:
            try:
                sqlite3.connect(str(url.database)).close()
            except sqlite3.Error as error:
                raise ConfigError(
                    f"can't open the database {url.database}: {error}",
                    hint="is it a file, and yours? Or pass another --database-url",
                ) from error
    try:
        # Nodes' access keys are among the parameters, which would come into logs and errors.
        engine = create_async_engine(
            url,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args=_postgresql_arguments() if url.get_backend_name() == "postgresql" else {},
            # The only connection of a database in memory has nothing to wait for.
            **({} if in_memory else {"pool_timeout": _COMMAND_TIMEOUT_S}),
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the driver {error.name} is not installed", hint=f"pip install {error.name}"
        ) from error
    if engine.dialect.name == "sqlite":
        logging.getLogger("aiosqlite").setLevel(logging.INFO)  # below, it logs the parameters too
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    return engine


def _postgresql_arguments() -> dict[str, Any]:
    frozen_ms = str(int(_FROZEN_TIMEOUT_S * 1000))
    return {
        "timeout": _CONNECT_TIMEOUT_S,
        "command_timeout": _COMMAND_TIMEOUT_S,
        "server_settings": {"idle_in_transaction_session_timeout": frozen_ms},
    }


def _prepare_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    # With NORMAL a power cut takes back what was acknowledged, and which requests were seen.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()
