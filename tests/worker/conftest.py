"""What tests of the core start from: the API's side of the log, the worker's connection, and somebody who writes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from redis import Redis

from tests import core
from worker import keys
from worker.database import dispose
from worker.embedded import EmbeddedPostgres
from worker.pending import PendingLog
from worker.redis import connect, connect_sync
from worker.settings import Settings

_EMPTY = 'TRUNCATE "user", conversation, message, dead_letter, shard RESTART IDENTITY CASCADE'


@pytest.fixture(scope="module")
def emptied_database(postgres: EmbeddedPostgres, migrated_template: str) -> Iterator[str]:
    """One database for all tests of a module (making one takes a quarter of a second), with the connections to it."""
    core.administer(postgres.url, "DROP DATABASE IF EXISTS core WITH (FORCE)")
    core.administer(postgres.url, f"CREATE DATABASE core TEMPLATE {migrated_template} STRATEGY file_copy")
    yield postgres.url.rsplit("/", 1)[0] + "/core"
    core.dismiss_administrators()
    dispose()


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str:
    """Emptied, for the modules that say so (`EMPTIED = True`); else a new one."""
    if not getattr(request.module, "EMPTIED", False):
        return str(request.getfixturevalue("database_url"))
    url = str(request.getfixturevalue("emptied_database"))
    core.administer(url, _EMPTY)
    return url


@pytest.fixture
def redis(settings: Settings) -> Iterator[Redis]:
    client = connect_sync(settings)
    yield client
    client.close()


@pytest.fixture
def wakes() -> list[int]:
    """The shards for which a flush was asked, in order."""
    return []


@pytest.fixture
async def log(settings: Settings, redis: Redis, wakes: list[int]) -> AsyncIterator[PendingLog]:
    client = connect(settings)
    made = PendingLog(client, settings, wake=wakes.append)
    await made.start()
    yield made
    await made.close()
    await client.aclose()


@pytest.fixture
def user(redis: Redis) -> int:
    return core.make_user()


@pytest.fixture
def shard(user: int, settings: Settings) -> int:
    return keys.shard_of_user(user, settings.shards)


@pytest.fixture
async def conversation(log: PendingLog, user: int) -> int:
    """One that is pending, without a message."""
    return (await log.create(user, None)).conversation.id
