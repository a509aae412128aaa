"""Which CIDs a name stood for before, for requests while no node holds the one it stands for."""

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"


def upgrade() -> None:
    with op.batch_alter_table("loras") as loras:
        loras.add_column(sa.Column("earlier", sa.JSON(), nullable=False, server_default="[]"))
