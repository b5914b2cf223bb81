"""The schema as the migrations make it; as a command (`python -m tests.schema`) the check that models and migrations agree."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import alembic.command
import alembic.util
from alembic.config import Config

from worker.embedded import EmbeddedPostgres
from worker.settings import get_settings

ROOT = Path(__file__).resolve().parent.parent


def upgrade(database_url: str, revision: str = "head") -> None:
    """Run the migrations on one database, as `alembic upgrade` does."""
    _run(database_url, lambda config: alembic.command.upgrade(config, revision))


def downgrade(database_url: str, revision: str) -> None:
    """Take the migrations back, as `alembic downgrade` does."""
    _run(database_url, lambda config: alembic.command.downgrade(config, revision))


def check(database_url: str) -> None:
    """Raise `alembic.util.CommandError` where the models say something else than the database has."""
    _run(database_url, alembic.command.check)


def state_directory() -> tempfile.TemporaryDirectory[str]:
    """A place for embedded servers that root's PostgreSQL user can reach; temporary directories are closed to it."""
    directory = tempfile.TemporaryDirectory(prefix="chatkeep-", ignore_cleanup_errors=True)
    Path(directory.name).chmod(0o711)
    return directory


def _run(database_url: str, command: Callable[[Config], object]) -> None:
    changes = {"DATABASE_URL": database_url, "DATABASE_URL_UNPOOLED": database_url}  # both: one in `.env` is somebody's real database
    get_settings.cache_clear()
    try:
        with mock.patch.dict(os.environ, changes):
            command(Config(str(ROOT / "alembic.ini")))
    finally:
        get_settings.cache_clear()


def main() -> None:
    """Migrate an empty database and compare it with the models."""
    with state_directory() as state:
        postgres = EmbeddedPostgres(Path(state), durable=False)
        postgres.start()
        try:
            upgrade(postgres.url)
            check(postgres.url)
        except alembic.util.CommandError as exc:
            sys.exit(f"models and migrations disagree: {exc}")
        finally:
            postgres.destroy()


if __name__ == "__main__":
    main()
