"""Run by Alembic, on the connection that `migrate.upgrade` hands over."""

from alembic import context

from r3mes_vllm.backend.database import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,  # SQLite alters a table by making a new one
)
with context.begin_transaction():
    context.run_migrations()
