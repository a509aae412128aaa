"""What an adapter is and whose, and which rows are new to a backend that has read the others."""

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"


def upgrade() -> None:
    with op.batch_alter_table("loras") as loras:
        loras.add_column(sa.Column("base_model", sa.Text()))
        loras.add_column(sa.Column("size_bytes", sa.BigInteger()))
        loras.add_column(sa.Column("rank", sa.Integer()))
        loras.add_column(sa.Column("public_key", sa.String(64)))
        loras.add_column(sa.Column("boot", sa.String(32)))
        loras.add_column(sa.Column("sequence", sa.BigInteger()))
        loras.add_column(sa.Column("deactivated_by", sa.String(16)))
    for table in ("loras", "nodes"):
        with op.batch_alter_table(table) as rows:
            rows.add_column(
                sa.Column("revision", sa.BigInteger(), nullable=False, server_default="0")
            )
        op.create_index(f"ix_{table}_revision", table, ["revision"])
    revisions = op.create_table(
        "registry_revision",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("value", sa.BigInteger(), nullable=False),
    )
    op.bulk_insert(revisions, [{"id": 1, "value": 0}])
