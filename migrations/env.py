"""Alembic's entry: the tables of `worker.models`, on `DATABASE_URL_UNPOOLED` or else `DATABASE_URL`; no other setting is needed.

Two migrations that are started at once run one after the other: a transaction-level advisory lock, which a transaction pooler
carries too, is taken before the current revision is read, in the one transaction that does everything.
"""

from __future__ import annotations

from logging.config import fileConfig

from alembic import context
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from worker.database import migration_connection
from worker.errors import ChatkeepError
from worker.models import Table

LOCK = 0x636861746B656570
"""Of the one-number kind; the shards' locks are of the two-number kind, so they never meet."""

LOCK_WAIT = "10min"
"""For the other migration to end."""
DDL_LOCK_TIMEOUT = "10s"
"""For a table that is in use: a waiting ALTER TABLE blocks every read behind it."""

AS_OWNER = "SELECT set_config('chatkeep.role', 'owner', true)"
"""Or row-level security would hide every row from a migration that changes rows, which would then change none and say nothing."""


def migrate() -> None:
    try:
        with migration_connection() as connection:
            context.configure(connection=connection, target_metadata=Table.metadata, compare_type=True, compare_server_default=True)
            with context.begin_transaction():
                connection.execute(text("SELECT set_config('lock_timeout', :wait, true)"), {"wait": LOCK_WAIT})
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
                connection.execute(text("SELECT set_config('lock_timeout', :wait, true)"), {"wait": DDL_LOCK_TIMEOUT})
                connection.execute(text(AS_OWNER))
                context.run_migrations()
    except ChatkeepError as exc:
        raise CommandError(str(exc)) from exc
    except OperationalError as exc:
        raise CommandError(f"The migration did not run, and changed nothing: {exc.orig}".strip()) from exc


def print_sql() -> None:
    """`alembic upgrade head --sql`: for whoever may not migrate, but may hand over a script."""
    context.configure(dialect_name="postgresql", target_metadata=Table.metadata, literal_binds=True)
    with context.begin_transaction():
        context.execute(AS_OWNER)
        context.run_migrations()


if context.config.config_file_name and context.config.cmd_opts is not None:  # as a command; a program has its own logging
    fileConfig(context.config.config_file_name, disable_existing_loggers=False)

if context.is_offline_mode():
    print_sql()
else:
    migrate()
