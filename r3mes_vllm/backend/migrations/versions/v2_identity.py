"""Who a node is, what it wants of its backend, and the system prompt of an adapter."""

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"


def upgrade() -> None:
    with op.batch_alter_table("nodes") as nodes:
        nodes.add_column(sa.Column("public_key", sa.String(64)))
        nodes.add_column(sa.Column("boot", sa.String(32)))
        nodes.add_column(sa.Column("sequence", sa.BigInteger()))
        nodes.add_column(sa.Column("access_key", sa.Text()))
        nodes.add_column(sa.Column("proof_url", sa.Text()))
        nodes.add_column(sa.Column("proof_failure", sa.Text()))
        nodes.add_column(sa.Column("proof_at", sa.DateTime(timezone=True)))
    with op.batch_alter_table("loras") as loras:
        loras.add_column(sa.Column("system_prompt", sa.Text()))
