"""The tables as they were before there were revisions: a database that has them is left alone."""

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "loras",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False, unique=True),
        sa.Column("ipfs_hash", sa.String(256), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("category", sa.String(128), nullable=False),
        sa.Column("version", sa.String(128), nullable=False),
        sa.Column("is_active", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "lora_versions",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("lora_id", sa.Integer(), sa.ForeignKey("loras.id"), nullable=False),
        sa.Column("ipfs_hash", sa.String(256), nullable=False),
        sa.Column("version", sa.String(128), nullable=False),
        sa.Column("registered_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("lora_id", "ipfs_hash", "version"),
        if_not_exists=True,
    )
    op.create_table(
        "nodes",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("wallet_address", sa.String(64), nullable=False, unique=True),
        sa.Column("endpoint_url", sa.Text(), nullable=False),
        sa.Column("available_lora_list", sa.JSON(), nullable=False),
        sa.Column("adapters", sa.JSON(), nullable=False),
        sa.Column("base_model", sa.Text()),
        sa.Column("version", sa.String(128)),
        sa.Column("status", sa.String(32), nullable=False),
        sa.Column("current_load", sa.Float(), nullable=False),
        sa.Column("last_heartbeat", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        if_not_exists=True,
    )
    op.create_index("ix_nodes_last_heartbeat", "nodes", ["last_heartbeat"], if_not_exists=True)
