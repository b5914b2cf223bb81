"""The migrations: there and back, the same as the models, one at a time, and as a plain command."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import alembic.util
import psycopg2
import pytest
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from tests import schema
from worker import database
from worker.database import sqlalchemy_url
from worker.embedded import EmbeddedPostgres
from worker.models import Table

_CATALOG = {
    "columns": """
        SELECT attrelid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull, attidentity::text,
               pg_get_expr(adbin, adrelid)
        FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE attnum > 0 AND NOT attisdropped AND relkind = 'r' AND relnamespace = 'public'::regnamespace
    """,
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    """,
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
    "sequences": "SELECT sequencename, data_type::text FROM pg_sequences WHERE schemaname = 'public'",
}


class TestTables:
    def test_alembic_finds_no_drift(self, database_url: str) -> None:
        schema.check(database_url)

    def test_models_and_migrations_make_the_same(self, empty_url: str, database_url: str) -> None:
        """`alembic check` does not look at CHECK constraints, nor at the names of primary keys."""
        Table.metadata.create_all(create_engine(sqlalchemy_url(empty_url)))
        assert _catalog(empty_url) == _catalog(database_url)

    def test_drift_is_noticed(self, database_url: str) -> None:
        for change in (
            "ALTER TABLE message ALTER content TYPE varchar(10)",
            "DROP INDEX ix_conversation_user_id_updated_at_id",
            "ALTER TABLE shard ALTER last_id DROP DEFAULT",
        ):
            _query(database_url, change)
            with pytest.raises(alembic.util.CommandError):
                schema.check(database_url)
            schema.downgrade(database_url, "base")
            schema.upgrade(database_url)
        schema.check(database_url)

    def test_there_and_back_and_there(self, empty_url: str) -> None:
        schema.upgrade(empty_url)
        first = _catalog(empty_url)
        schema.downgrade(empty_url, "base")
        assert not any(_catalog(empty_url).values())
        schema.upgrade(empty_url)
        assert _catalog(empty_url) == first


class TestPolicies:
    """What they do is tests/worker/test_rls.py's subject."""

    def test_there_and_back_and_there(self, empty_url: str) -> None:
        schema.upgrade(empty_url)
        first = _protection(empty_url)
        assert all(first.values())
        schema.downgrade(empty_url, "first_tables")
        assert not any(_protection(empty_url).values())
        schema.upgrade(empty_url)
        assert _protection(empty_url) == first

    def test_migration_sees_every_row(self, empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """FORCE holds for the owner too: one that changes rows would change none, and say nothing."""
        said: list[Any] = []
        upgrade = MigrationContext.run_migrations

        def run(context: MigrationContext, **options: Any) -> None:
            assert context.connection is not None
            said.append(context.connection.execute(text("SELECT current_setting('chatkeep.role')")).scalar_one())
            upgrade(context, **options)

        monkeypatch.setattr(MigrationContext, "run_migrations", run)
        schema.upgrade(empty_url)
        assert said == ["owner"]


class TestCommand:
    def test_needs_nothing_but_the_database(self, empty_url: str, tmp_path: Path) -> None:
        done = _alembic(tmp_path, "upgrade", "head", DATABASE_URL=empty_url)
        assert done.returncode == 0, done.stderr
        assert _alembic(tmp_path, "check", DATABASE_URL=empty_url).returncode == 0
        assert _alembic(tmp_path, "downgrade", "base", DATABASE_URL=empty_url).returncode == 0

    def test_takes_the_direct_connection_where_there_is_one(self, empty_url: str, tmp_path: Path) -> None:
        done = _alembic(tmp_path, "upgrade", "head", DATABASE_URL="postgresql://nobody@127.0.0.1:1/pooled", DATABASE_URL_UNPOOLED=empty_url)
        assert done.returncode == 0, done.stderr
        assert _query(empty_url, "SELECT version_num FROM alembic_version") == [("outside_accounts",)]

    @pytest.mark.parametrize("url", [None, "mysql://u:s3cr3t@host/db", "postgresql://u:s3cr3t@host:port/db"])
    def test_wrong_setting_is_one_clear_line(self, tmp_path: Path, url: str | None) -> None:
        done = _alembic(tmp_path, "upgrade", "head", **({"DATABASE_URL": url} if url else {}))
        said = done.stdout + done.stderr
        assert done.returncode != 0
        assert "FAILED: DATABASE_URL" in said
        assert "Traceback" not in said
        assert "s3cr3t" not in said
        assert len(said.splitlines()) == 1

    def test_as_sql(self, tmp_path: Path, empty_url: str) -> None:
        done = _alembic(tmp_path, "upgrade", "head", "--sql")
        assert done.returncode == 0, done.stderr
        assert "CREATE TABLE message" in done.stdout
        _query(empty_url, done.stdout)
        schema.check(empty_url)

    def test_several_at_once_take_turns(self, empty_url: str, tmp_path: Path) -> None:
        running = [_start(tmp_path, "upgrade", "head", DATABASE_URL=empty_url) for _ in range(3)]
        said = [process.communicate(timeout=60)[1] for process in running]
        assert [process.returncode for process in running] == [0, 0, 0], said
        assert sum("Running upgrade" in words for words in said) == 1
        schema.check(empty_url)

    def test_unreachable_database_is_one_clear_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(database, "MIGRATION_WAKE_SECONDS", 0.3)
        with pytest.raises(alembic.util.CommandError, match=r"cannot be reached.*127\.0\.0\.1.*refused") as caught:
            schema.upgrade("postgresql://u:s3cr3t@127.0.0.1:1/db")
        assert "s3cr3t" not in str(caught.value)


@pytest.fixture
def empty_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """A database without tables."""
    name = f"empty_{secrets.token_hex(6)}"
    _query(postgres.url, f"CREATE DATABASE {name}")
    yield postgres.url.rsplit("/", 1)[0] + "/" + name
    _query(postgres.url, f"DROP DATABASE {name} WITH (FORCE)")


def _alembic(directory: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    process = _start(directory, *arguments, **settings)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _start(directory: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    """In a directory without `.env`, which is somebody's real database."""
    environment = {"PATH": os.environ.get("PATH", ""), **settings}
    command = [sys.executable, "-m", "alembic", "-c", str(schema.ROOT / "alembic.ini"), *arguments]
    return subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _catalog(url: str) -> dict[str, set[tuple[Any, ...]]]:
    """All that the migrations made, without Alembic's own table."""
    return {what: {row for row in _query(url, query) if row[0] != "alembic_version"} for what, query in _CATALOG.items()}


def _protection(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """What holds rows and tables back."""
    return {
        "policies": _query(url, "SELECT tablename, policyname, roles::text, cmd, qual, with_check FROM pg_policies ORDER BY 1, 2"),
        "tables": _query(url, "SELECT relname, relforcerowsecurity FROM pg_class WHERE relrowsecurity OR relforcerowsecurity ORDER BY 1"),
        "privileges": _query(
            url,
            "SELECT grantee::text, table_name::text, privilege_type::text FROM information_schema.table_privileges "
            "WHERE grantee IN ('chatkeep_api', 'chatkeep_worker') ORDER BY 1, 2, 3",
        ),
    }


def _query(url: str, statement: str) -> list[tuple[Any, ...]]:
    with closing(psycopg2.connect(url, connect_timeout=10)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []
