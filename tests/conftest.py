"""Real servers for every test: started once a session, with a fresh database and an empty Valkey for each test.

postgres, valkey     the running servers
database_url         a new database with the schema, made from a template that was migrated once
redis_url            Valkey, emptied
settings             the product's settings, pointing at these two; `get_settings()` returns the same
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
import redis
import structlog

from tests import schema
from worker.embedded import EmbeddedPostgres, EmbeddedValkey
from worker.settings import Settings, get_settings

"""Being written, under its own issue: `pytest tests/test_benchmarks.py` runs what there is."""

START_SECONDS = 60.0
TEMPLATE = "template_chatkeep"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def own_logging() -> Iterator[None]:
    """For a test that sets logging up: afterwards it is as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def state_dir() -> Iterator[Path]:
    """Where the session's servers live."""
    with schema.state_directory() as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def postgres(state_dir: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(
        state_dir, durable=False, start_seconds=START_SECONDS, settings={"max_connections": "200", "autovacuum": "off"}
    )
    server.start()
    yield server
    server.destroy()


@pytest.fixture(scope="session")
def valkey(state_dir: Path) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(state_dir, durable=False, start_seconds=START_SECONDS)
    server.start()
    yield server
    server.destroy()


@pytest.fixture(scope="session")
def migrated_template(postgres: EmbeddedPostgres) -> str:
    """The name of a database that `alembic upgrade head` was run on, to be copied."""
    _administer(postgres, f"CREATE DATABASE {TEMPLATE}")
    schema.upgrade(_url(postgres, TEMPLATE))
    return TEMPLATE


@pytest.fixture
def database_url(postgres: EmbeddedPostgres, migrated_template: str) -> Iterator[str]:
    name = f"test_{secrets.token_hex(6)}"
    _administer(postgres, f"CREATE DATABASE {name} TEMPLATE {migrated_template} STRATEGY file_copy")
    yield _url(postgres, name)
    postgres.start()  # in case the test has killed it
    _administer(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def redis_url(valkey: EmbeddedValkey) -> str:
    valkey.start()  # in case another test has killed it
    with closing(redis.Redis.from_url(valkey.url, socket_timeout=10, socket_connect_timeout=5)) as client:
        client.flushall()
        client.config_resetstat()
    return valkey.url


@pytest.fixture
def settings(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """The settings of this test's stores, in the environment too, for the processes that a test starts. No `.env` is read."""
    monkeypatch.setitem(Settings.model_config, "env_file", None)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("JWT_SECRET", secrets.token_urlsafe(48))
    get_settings.cache_clear()
    yield get_settings()
    get_settings.cache_clear()


def _administer(postgres: EmbeddedPostgres, statement: str) -> None:
    with closing(psycopg2.connect(postgres.url, connect_timeout=10, options="-c statement_timeout=30000")) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)


def _url(postgres: EmbeddedPostgres, database: str) -> str:
    return postgres.url.rsplit("/", 1)[0] + "/" + database
