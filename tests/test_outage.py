"""Postgres is away for an hour at 50 messages a second: every write is taken, and all of it is written within 10 minutes of its return.

`make test` puts two minutes' worth into the log and asks for the same proportion; `make outage` all 180,000. They go in through the
product's own append as fast as it takes them, because what an hour does is the backlog, not the hour; limits and memory are the defaults.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import psycopg2
import pytest

from tests.people import ok, sign_up, until
from tests.processes import SHARDS, Installation
from worker import keys
from worker.database import dispose
from worker.pending import PendingLog
from worker.redis import connect
from worker.settings import Settings

RATE = 50
"""Messages a second."""
HOUR = 3600
BACK_SECONDS = 600
"""In which the backlog of an hour has to be gone."""
MESSAGES = int(os.environ.get("OUTAGE_MESSAGES", 2 * 60 * RATE))
CHARACTERS = 200
PEOPLE, CONVERSATIONS = 60, 4
AT_ONCE = 200


@dataclass
class Backlog:
    """What the log and Redis's memory held when Postgres came back."""

    entries: int
    bytes: int
    memory: int
    memory_before: int

    @property
    def memory_for_each(self) -> float:
        return (self.memory - self.memory_before) / self.entries


@pytest.fixture(scope="module")
def chatkeep() -> Iterator[Installation]:
    with Installation(durable=MESSAGES >= HOUR * RATE) as made:
        made.migrate()
        made.start("api", "worker", "beat")
        yield made


@pytest.fixture
def database_url(chatkeep: Installation) -> Iterator[str]:
    """For `settings`: the defaults, on this installation."""
    yield chatkeep.postgres.url
    dispose()


@pytest.fixture
def redis_url(chatkeep: Installation) -> str:
    return chatkeep.valkey.url


@pytest.mark.timeout(3600)
def test_an_hour_without_postgres(chatkeep: Installation, settings: Settings) -> None:
    ann = sign_up(chatkeep.api.url, "ann@example.org")
    conversation = ann.start()["id"]
    texts = [f"{number:06d} ".ljust(CHARACTERS, "x") for number in range(MESSAGES)]
    places = asyncio.run(_places(settings, _people(chatkeep)))
    chatkeep.drain()
    before = _memory(chatkeep)
    chatkeep.postgres.kill()
    began = time.monotonic()
    asyncio.run(_write(settings, places, texts))
    wrote = time.monotonic() - began
    said = ann.say(conversation, "Postgres is still away")
    assert said["state"] == "pending"
    assert ann.http.get("/readyz").json()["status"] == "degraded"
    backlog = _backlog(chatkeep, before)
    assert backlog.entries == MESSAGES + 1
    chatkeep.postgres.start()
    began = time.monotonic()
    until(lambda: chatkeep.pending() == 0, "everything is written", max(30.0, MESSAGES / (RATE * HOUR) * BACK_SECONDS))
    drained = time.monotonic() - began
    rows = chatkeep.query("SELECT content FROM message WHERE conversation_id <> %s ORDER BY content", conversation)
    assert [content for (content,) in rows] == texts, "each once, and none missing"
    assert ok(ann.http.get(f"/api/conversations/{conversation}/messages"))["items"] == [said | {"state": "committed"}]
    assert chatkeep.query("SELECT count(*) FROM dead_letter") == [(0,)]
    of_an_hour = HOUR * RATE / backlog.entries
    assert backlog.bytes * of_an_hour < settings.pending_bytes_max / 2, "the default limit takes such an hour, and another"
    sys.stdout.write(
        f"\n{MESSAGES} messages of {CHARACTERS} characters, taken in {wrote:.0f} s: {backlog.bytes / 2**20:.1f} MiB of PENDING_BYTES_MAX, "
        f"Redis at {backlog.memory / 2**20:.1f} MiB ({backlog.memory_for_each:.0f} bytes each); written {drained:.1f} s after the return\n"
    )


def _people(chatkeep: Installation) -> list[int]:
    with closing(psycopg2.connect(chatkeep.postgres.url, connect_timeout=5)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(
            """INSERT INTO "user" (email, password_hash) SELECT n || '@example.org', 'x' FROM generate_series(1, %s) n RETURNING id""",
            (PEOPLE,),
        )
        return [number for (number,) in cursor.fetchall()]


async def _places(settings: Settings, users: list[int]) -> list[tuple[int, int]]:
    """(user, conversation)."""
    async with _log(settings) as log:
        return [(user, (await log.create(user, f"Number {number}")).conversation.id) for number in range(CONVERSATIONS) for user in users]


async def _write(settings: Settings, places: list[tuple[int, int]], texts: list[str]) -> None:
    """All of it, in the order of each conversation; a write that is refused ends the test."""
    numbers = iter(range(len(texts)))

    async def one(log: PendingLog) -> None:
        for number in numbers:
            user, conversation = places[number % len(places)]
            await log.append(user, conversation, "user" if number % 2 == 0 else "assistant", texts[number])

    async with _log(settings) as log, asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(one(log))


class _log:
    """The API's side of the log; nobody is woken, the sweep finds everything."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def __aenter__(self) -> PendingLog:
        self._client = connect(self._settings)
        self._made = PendingLog(self._client, self._settings, wake=lambda _: None)
        await self._made.start()
        return self._made

    async def __aexit__(self, *_: object) -> None:
        await self._made.close()
        await self._client.aclose()


def _memory(chatkeep: Installation) -> int:
    with chatkeep.redis() as client:
        return int(client.info("memory")["used_memory"])


def _backlog(chatkeep: Installation, before: int) -> Backlog:
    with chatkeep.redis() as client:
        counted = sum(int(client.get(keys.backlog_bytes(shard)) or 0) for shard in range(SHARDS))
    return Backlog(chatkeep.pending(), counted, _memory(chatkeep), before)
