"""Bring a database to the tables of this version, by the steps in `migrations`."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, text

from r3mes_vllm.errors import ConfigError

_FOLDER = Path(__file__).parent / "migrations"
_LOCK = 0x52334D4553
"""PostgreSQL's advisory locks are numbers; this one spells R3MES."""


def upgrade(connection: Connection, to: str = "head") -> None:
    """Do all that is missing up to revision `to`, in the transaction of `connection`. Another
    backend that starts meanwhile waits for it. Raises ConfigError for a database of a newer
    version."""
    _lock(connection)
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, to)
    except CommandError as error:  # it has a revision that is not among the steps
        raise ConfigError(
            f"the database is not of this version: {error}",
            hint="a newer r3mes-vllm has used it: upgrade this one, or pass another --database-url",
        ) from error


def _lock(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    else:
        # Python's driver would begin a transaction with the first INSERT only.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
