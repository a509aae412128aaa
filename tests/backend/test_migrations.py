"""A database of an earlier version keeps what it has."""

import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from r3mes_vllm import wire
from r3mes_vllm.backend import registry
from r3mes_vllm.backend.database import Table, database_url, open_engine
from r3mes_vllm.backend.loras import Author
from r3mes_vllm.backend.migrate import upgrade
from r3mes_vllm.backend.registry import Registry
from r3mes_vllm.errors import ConfigError, DatabaseUnreachable
from tests.backend.stand_ins import LEGAL_CID, wallet

ON_BOTH = True
NOW = datetime(2026, 1, 1, tzinfo=UTC)
HEAD = "4"
ANYONE = Author(is_admin=False, claim=None, is_open=True)

# As SQLAlchemy made them before there were revisions.
OLD_LORAS = """
CREATE TABLE loras (
    id INTEGER NOT NULL,
    name VARCHAR(128) NOT NULL,
    ipfs_hash VARCHAR(256) NOT NULL,
    description TEXT NOT NULL,
    category VARCHAR(128) NOT NULL,
    version VARCHAR(128) NOT NULL,
    is_active BOOLEAN NOT NULL,
    created_at DATETIME NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (name)
);
"""
OLD = f"""
{OLD_LORAS}
CREATE TABLE nodes (
    id INTEGER NOT NULL,
    wallet_address VARCHAR(64) NOT NULL,
    endpoint_url TEXT NOT NULL,
    available_lora_list JSON NOT NULL,
    adapters JSON NOT NULL,
    base_model TEXT,
    version VARCHAR(128),
    status VARCHAR(32) NOT NULL,
    current_load FLOAT NOT NULL,
    last_heartbeat DATETIME NOT NULL,
    created_at DATETIME NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (wallet_address)
);
CREATE INDEX ix_nodes_last_heartbeat ON nodes (last_heartbeat);
CREATE TABLE lora_versions (
    id INTEGER NOT NULL,
    lora_id INTEGER NOT NULL,
    ipfs_hash VARCHAR(256) NOT NULL,
    version VARCHAR(128) NOT NULL,
    registered_at DATETIME NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (lora_id, ipfs_hash, version),
    FOREIGN KEY(lora_id) REFERENCES loras (id)
);
"""
ROWS = f"""
INSERT INTO loras (id, name, ipfs_hash, description, category, version, is_active, created_at)
VALUES (7, 'legal', '{LEGAL_CID}', 'law', 'legal', '1.0.0', TRUE, '2025-12-31 23:59:00.000000');
INSERT INTO lora_versions (id, lora_id, ipfs_hash, version, registered_at)
VALUES (1, 7, '{LEGAL_CID}', '1.0.0', '2025-12-31 23:59:00.000000');
INSERT INTO nodes (id, wallet_address, endpoint_url, available_lora_list, adapters, base_model,
                   version, status, current_load, last_heartbeat, created_at)
VALUES (3, '{wallet(1)}', 'http://127.0.0.1:9', '["legal"]', '{{"legal": "{LEGAL_CID}"}}', 'base',
        '0.1.0', 'active', 0.5, '2025-12-31 23:59:30.000000', '2025-12-31 23:59:00.000000');
"""
KEY = "ab" * 32
SIGNED = f"""
UPDATE nodes SET public_key = '{KEY}', boot = '0', sequence = 5, access_key = 'secret',
                 proof_url = endpoint_url;
UPDATE loras SET system_prompt = 'Be brief.';
"""


def in_dialect(script: str, url: str) -> str:
    if url.startswith("sqlite"):
        return script
    for name, other in (("id INTEGER", "id SERIAL"), ("DATETIME", "TIMESTAMP WITH TIME ZONE")):
        script = script.replace(name, other)
    return f"SET TIME ZONE 'UTC'; {script}"


async def run(url: str, script: str, *, revision: str | None = None) -> None:
    """After the steps up to `revision`."""
    engine = open_engine(database_url(url))
    async with engine.begin() as connection:
        if revision:
            await connection.run_sync(upgrade, revision)
        for statement in in_dialect(script, url).split(";"):
            if statement.strip():
                await connection.exec_driver_sql(statement)
    await engine.dispose()


async def ask(url: str, query: str) -> Sequence[Any]:
    engine = open_engine(database_url(url))
    async with engine.connect() as connection:
        found = (await connection.execute(text(query))).all()
    await engine.dispose()
    return [tuple(row) for row in found]


async def use(url: str) -> tuple[list[wire.Lora], list[wire.Node]]:
    async with Registry.open(url) as found:
        return [*await found.loras()], [*await found.all_nodes()]


@pytest.mark.parametrize("protected", [True, False])
async def test_a_database_of_before_the_revisions_loses_nothing(
    database: str, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    await run(database, OLD + ROWS)
    if not protected:
        monkeypatch.setattr(registry, "upgrade", lambda connection: None)
        with pytest.raises(DatabaseUnreachable, match="registry_revision") as caught:
            await use(database)
        assert isinstance(caught.value.__cause__, SQLAlchemyError)
        return
    for _ in range(2):
        (lora,), (node,) = await use(database)
        assert (lora.id, lora.name, lora.ipfs_hash) == (7, "legal", LEGAL_CID)
        assert (lora.description, lora.system_prompt) == ("law", None)
        assert lora.created_at == datetime(2025, 12, 31, 23, 59, tzinfo=UTC)
        assert (node.wallet_address, node.adapters) == (wallet(1), {"legal": LEGAL_CID})
        assert (node.current_load, node.signature) == (0.5, "unsigned")
    assert await ask(database, "SELECT version_num FROM alembic_version") == [(HEAD,)]
    versions = await ask(database, "SELECT lora_id, ipfs_hash FROM lora_versions")
    assert versions == [(7, LEGAL_CID)]


async def test_a_database_of_revision_2_loses_nothing(database: str) -> None:
    await run(database, ROWS + SIGNED, revision="2")
    (lora,), (node,) = await use(database)
    assert (lora.system_prompt, lora.base_model, lora.rank) == ("Be brief.", None, None)
    assert (lora.active, lora.owner) == (True, None)
    assert (node.wallet_address, node.signature) == (wallet(1), "signed")
    kept = await ask(database, "SELECT public_key, boot, sequence, access_key FROM nodes")
    assert kept == [(KEY, "0", 5, "secret")]
    assert await ask(database, "SELECT value FROM registry_revision") == [(0,)]


@pytest.mark.parametrize("revision", [None, "1", "2", "3"])
async def test_an_old_database_is_used_on(database: str, revision: str | None) -> None:
    await run(database, ROWS if revision else OLD + ROWS, revision=revision)
    async with Registry.open(database) as found:
        beat = wire.Heartbeat(wallet_address=wallet(1), status="active", current_load=1)
        assert await found.beat(beat, NOW)
        lora = wire.RegisterLora(name="legal", ipfs_hash=LEGAL_CID, system_prompt="Be brief.")
        assert await found.register_lora(lora, NOW, ANYONE) == (7, False)
        assert [it.system_prompt for it in await found.loras()] == ["Be brief."]
        assert await found.live_nodes(NOW) == await found.all_nodes()


async def test_a_backend_of_the_version_before_goes_on_with_the_same_database(
    database: str,
) -> None:
    await use(database)
    await run(database, ROWS)
    (lora,), (node,) = await use(database)
    assert (lora.name, node.wallet_address) == ("legal", wallet(1))


async def test_one_that_was_made_in_part_is_completed(database: str) -> None:
    await run(database, OLD_LORAS)
    assert await use(database) == ([], [])


@pytest.mark.parametrize("script", ["", OLD])
async def test_the_steps_lead_to_the_tables_of_the_models(database: str, script: str) -> None:
    def differences(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        found: list[Any] = compare_metadata(context, Table.metadata)
        return found

    await run(database, script)
    await use(database)
    engine = open_engine(database_url(database))
    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []
    await engine.dispose()


async def test_a_database_of_a_newer_version_is_a_sentence(database: str) -> None:
    await use(database)
    await run(database, "UPDATE alembic_version SET version_num = '99'")
    with pytest.raises(ConfigError, match="99") as caught:
        await use(database)
    assert "newer r3mes-vllm" in caught.value.hint


async def test_a_folder_with_a_percent_sign_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "100%s").mkdir()
    assert await use(f"sqlite:///{tmp_path}/100%s/b.sqlite3") == ([], [])


TOGETHER = """
import asyncio, sys, time
from pathlib import Path
from r3mes_vllm.backend import migrate
from r3mes_vllm.backend.registry import Registry

folder, mine, number, locked, url = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:]

def meet(connection=None):
    (folder / f"ready{mine}").touch()
    while len(list(folder.glob("ready*"))) < number:
        time.sleep(0.001)

async def start():
    async with Registry.open(url):
        pass

if locked == "True":
    meet()
else:
    migrate._lock = meet
asyncio.run(start())
"""


@pytest.mark.parametrize("script", ["", OLD])
@pytest.mark.parametrize("protected", [True, False])
async def test_backends_that_start_together_upgrade_once(
    tmp_path: Path, database: str, script: str, protected: bool
) -> None:
    """In the twin each begins when all of them have looked at the tables."""
    await run(database, script)
    number = 4
    arguments = [str(number), str(protected), database]
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, tmp_path, str(it), *arguments],
            stderr=subprocess.PIPE,
            text=True,
        )
        for it in range(number)
    ]
    errors = [error for it in programs if (error := it.communicate(timeout=60)[1])]
    assert bool(errors) != protected, errors
    if protected:
        assert await ask(database, "SELECT version_num FROM alembic_version") == [(HEAD,)]
